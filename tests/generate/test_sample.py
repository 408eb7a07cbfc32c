"""Continuing text: the same tokens in every layout, from the whole context and nothing else."""

from dataclasses import replace

import pytest
import torch

from megacore.config.resolve import resolve_model
from megacore.config.schema import ModelConfig
from megacore.generate.sample import choose, continue_tokens, next_logits
from megacore.kernels import counter
from megacore.kernels.table import resolve
from megacore.layout import Layout
from megacore.mesh.mesh import ParallelMesh
from megacore.model.inputs import Inputs
from megacore.model.stage import Objective, Stage
from megacore.parallel.parameters import ParameterMaker
from megacore.parallel.tensor import TensorParallel
from megacore.spec import ModelSpec
from tests.pool import WorkerPool

CPU = torch.device("cpu")
CONTEXT = 10  # learned positions end here, far below the padding
MODEL = ModelConfig(
    num_layers=2, hidden_size=12, num_heads=4, num_kv_heads=2, head_dim=4, vocab_size=13, init_std=0.5, dropout=0.5
)
LEARNED = replace(MODEL, position="learned")
PROMPT = [3, 1, 4, 1, 5]


def stage_of(rank: int, size: int, model: ModelConfig, sequence: bool = False) -> Stage:
    model = resolve_model(model, CONTEXT)
    tp = TensorParallel(ParallelMesh.build(Layout(tp=size), rank, CPU).tp, sequence)
    make = ParameterMaker(ModelSpec.of(model, tp.sequence).by_name, tp.group, CPU, torch.float64, seed=1)
    return Stage(model, make, tp, resolve(CPU, torch.float64)[0], Objective(), range(model.num_layers))


def logits_alone(stage: Stage, tokens: list[int]) -> torch.Tensor:
    """Of a sequence without padding, by one process."""
    token_bs = torch.tensor([tokens])
    with torch.no_grad():
        return stage.logits(stage.hidden(Inputs(token_bs, token_bs, torch.zeros(1, dtype=torch.long), training=False)))


@pytest.mark.parametrize("model", [MODEL, LEARNED, replace(MODEL, position="alibi")])
def test_padding_and_dropout_do_not_show(model: ModelConfig) -> None:
    stage = stage_of(0, 1, model)
    for length in (1, 5, CONTEXT):
        tokens = (3 * PROMPT)[:length]
        with torch.no_grad():
            got = next_logits(stage, tokens)
        torch.testing.assert_close(got, logits_alone(stage, tokens)[-1], rtol=1e-12, atol=1e-12)


def generate(rank: int, size: int, model: ModelConfig, sequence: bool) -> list[int]:
    return continue_tokens(stage_of(rank, size, model, sequence), PROMPT, 8, CONTEXT, temperature=0.9, seed=5)


@pytest.mark.parametrize("model", [MODEL, LEARNED])
def test_every_layout_says_the_same(pool: WorkerPool, model: ModelConfig) -> None:
    alone = generate(0, 1, model, False)
    assert len(alone) == 8
    assert len(set(alone)) > 2
    for size, sequence in ((2, False), (2, True), (4, False)):
        assert pool.run(generate, size, size, model, sequence) == [alone] * size


def test_three_ranks_cut_the_padded_tokens_evenly(pool: WorkerPool) -> None:
    model = replace(MODEL, num_heads=3, num_kv_heads=3)
    assert pool.run(generate, 3, 3, model, True) == 3 * [generate(0, 1, model, False)]


def test_only_the_newest_tokens_that_fit_are_seen() -> None:
    stage = stage_of(0, 1, LEARNED)
    long = [7] * 20 + PROMPT * 2
    (greedy,) = continue_tokens(stage, long, 1, CONTEXT, temperature=0)
    assert greedy == int(logits_alone(stage, long[-CONTEXT:])[-1].argmax())


def test_it_ends_behind_the_stop_token() -> None:
    stage = stage_of(0, 1, MODEL)
    free = continue_tokens(stage, PROMPT, 12, CONTEXT)
    stop = free[4]
    assert continue_tokens(stage, PROMPT, 12, CONTEXT, stop=stop) == free[: free.index(stop) + 1]


def test_the_seed_decides() -> None:
    stage = stage_of(0, 1, MODEL)
    texts = [tuple(continue_tokens(stage, PROMPT, 12, CONTEXT, seed=seed)) for seed in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one token"):
        continue_tokens(stage_of(0, 1, MODEL), [], 1, CONTEXT)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_come_as_often_as_the_softmax_says(temperature: float) -> None:
    logits = torch.tensor([0.0, 2.0, -1.0, -torch.inf, 1.0], dtype=torch.float64)
    key, tries = counter.key_of("test"), 3000
    drawn = torch.tensor([choose(logits, temperature, key, place) for place in range(tries)]).bincount(minlength=5)
    chance = (logits / temperature).softmax(-1)
    assert drawn[3] == 0
    assert ((drawn / tries - chance).abs() < 4.5 * (chance * (1 - chance) / tries).sqrt() + 1e-9).all()
    assert choose(logits, 0, key, 0) == 1


def test_rows_without_a_token_are_never_drawn() -> None:
    """A model's vocabulary may be padded beyond its tokenizer's."""
    stage = stage_of(0, 1, MODEL)
    drawn = continue_tokens(stage, PROMPT, 40, CONTEXT, temperature=5.0, num_choices=6)
    assert len(set(drawn)) > 2
    assert max(drawn) < 6
