"""HF folder -> tp=2 x pp=2 -> one step -> checkpoint -> HF folder: what `transformers` trains by itself comes out."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megacore.checkpoint.find import folder_of
from megacore.checkpoint.hf.export import export
from megacore.checkpoint.opening import open_weights
from megacore.checkpoint.read import Checkpoint
from megacore.config.resolve import resolve
from megacore.config.schema import RunConfig
from megacore.train.state import State
from megacore.verify.samples import made_up
from megacore.verify.weights import engine_logits
from tests.checkpoint.common import save as save_state
from tests.checkpoint.common import saver_of
from tests.checkpoint.hf.tiny import MODELS, save, transformers
from tests.engine.common import built_rank, run_config, step_of
from tests.pool import WorkerPool

LR = 0.1
LAYOUT = ("parallel.tp=2", "parallel.pp=2", "parallel.sequence_parallel=true")
STEP = ("optim.name=sgd", "optim.momentum=0", "optim.weight_decay=0", "optim.clip=none", "precision.dtype=fp32")
QUICK = ("gpt-neox", "gemma2")


def config_of(source_path: str) -> RunConfig:
    base = run_config(4, *LAYOUT, *STEP, "train.micro_batch_size=1", "train.global_batch_size=4")
    return resolve(replace(base, model=open_weights(source_path).model), 4)


def train_rank(rank: int, source_path: str, folder: str) -> None:
    built = built_rank(rank, 4, config_of(source_path))
    state = State(built)
    state.load_weights(open_weights(source_path))
    state.publish()
    saver = saver_of(built, folder)
    step_of(built, 1, LR)
    assert not save_state(built, saver, 1).problem


def step_of_transformers(model: torch.nn.Module, config: RunConfig) -> None:
    """The same samples and loss, one step of plain gradient descent."""
    whole = made_up(config, 1)
    logits = model(whole.token_bs).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), whole.label_bs.flatten(), ignore_index=-100)
    loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= LR * parameter.grad


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in MODELS])
def test_one_step_of_four_ranks(pool: WorkerPool, tmp_path: Path, name: str) -> None:
    model = save(name, tmp_path / "hf")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    pool.run(train_rank, 4, str(tmp_path / "hf"), str(tmp_path / "checkpoints"))
    checkpoint = Checkpoint.open(str(tmp_path / "checkpoints" / folder_of(1)))
    export(checkpoint, str(tmp_path / "trained"))

    config = config_of(str(tmp_path / "hf"))
    step_of_transformers(model, config)
    trained = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "trained", attn_implementation="eager")
    for key, value in trained.eval().state_dict().items():
        far = (value - model.state_dict()[key]).abs().max().item()
        assert far <= 1e-5, f"{key}: {far}"
        assert not torch.equal(value, before[key]) or not value.is_floating_point(), f"{key} was not trained"
    token_bs = made_up(config, 2).token_bs
    with torch.no_grad():
        logits = trained(token_bs).logits
        torch.testing.assert_close(logits, model(token_bs).logits, rtol=0, atol=2e-5)
    torch.testing.assert_close(engine_logits(checkpoint, token_bs), logits, rtol=0, atol=1e-5)
