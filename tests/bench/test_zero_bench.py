"""`megacore bench zero` compares programs that compute the same thing."""

import itertools
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, distributed
from torch.distributed.tensor import DTensor
from torch.nn import functional

from megacore.bench.baselines.accumulating import forward_backward
from megacore.bench.baselines.fsdp import shard, sharded_step
from megacore.bench.baselines.plain_llama import PlainLlama, Step, training_step
from megacore.bench.baselines.zero_redundancy import replicate, replicated_step
from megacore.bench.harness import case_named
from megacore.bench.train import OURS, configure
from megacore.bench.zero import CASES, lay_out
from megacore.config.schema import ModelConfig, OptimConfig
from megacore.tools import bench
from tests.pool import WorkerPool

MODEL = ModelConfig(
    num_layers=2, hidden_size=32, ffn_hidden_size=48, num_heads=4, num_kv_heads=2, head_dim=8, vocab_size=64
)
OPTIM = OptimConfig(lr=1e-3)
SEQ_LEN = 16
STEPS = 3
WAYS = pytest.mark.parametrize("way", ["ddp", "zero redundancy", "freed", "stays", "sums wait"])
MICROBATCHES = pytest.mark.parametrize("num_microbatches", [1, 2])


def batch() -> tuple[Tensor, Tensor]:
    text = torch.randint(MODEL.vocab_size, (8, SEQ_LEN + 1), generator=torch.Generator().manual_seed(0))
    return text[:, :-1].contiguous(), text[:, 1:].contiguous()


def share_of(rank: int) -> tuple[Tensor, Tensor]:
    tokens, labels = (x.chunk(2)[rank] for x in batch())
    return tokens, labels


def whole_model() -> PlainLlama:
    torch.manual_seed(0)
    return PlainLlama(MODEL, SEQ_LEN)


def gradients_of(rank: int, way: str, num_microbatches: int) -> dict[str, Tensor]:
    """Whole ones, averaged over the ranks."""
    model = whole_model()
    if way in ("ddp", "zero redundancy"):
        wrapped, sums = replicate(model, num_microbatches)
        forward_backward(wrapped, *share_of(rank), num_microbatches, sums)
    else:
        mesh = distributed.device_mesh.init_device_mesh("cpu", (2,))
        sums = shard(model, mesh, free_after_forward=way != "stays", sum_each=way != "sums wait")
        forward_backward(model, *share_of(rank), num_microbatches, sums)
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {
        name: x.full_tensor() if isinstance(x, DTensor) else x.clone() for name, x in found.items() if x is not None
    }


def step_of(way: str, num_microbatches: int) -> Step:
    if way in ("ddp", "zero redundancy"):
        return replicated_step(whole_model(), OPTIM, num_microbatches, shared=way == "zero redundancy")
    mesh = distributed.device_mesh.init_device_mesh("cpu", (2,))
    return sharded_step(whole_model(), OPTIM, num_microbatches, mesh, way != "stays", way != "sums wait")


def losses_of(rank: int, way: str, num_microbatches: int) -> list[float]:
    step = step_of(way, num_microbatches)
    return [step(*share_of(rank)).item() for _ in range(STEPS)]


@WAYS
@MICROBATCHES
def test_baselines_have_the_gradients_of_one_process(pool: WorkerPool, way: str, num_microbatches: int) -> None:
    model, (tokens, labels) = whole_model(), batch()
    functional.cross_entropy(model(tokens).flatten(0, 1), labels.flatten()).backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    for found in pool.run(gradients_of, 2, way, num_microbatches):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)


@WAYS
@MICROBATCHES
def test_baselines_train_as_one_process(pool: WorkerPool, way: str, num_microbatches: int) -> None:
    step, (tokens, labels) = training_step(whole_model(), OPTIM), batch()
    expected = [step(tokens, labels).item() for _ in range(STEPS)]
    assert all(later < earlier for earlier, later in itertools.pairwise(expected))
    ranks = pool.run(losses_of, 2, way, num_microbatches)
    assert [sum(losses) / 2 for losses in zip(*ranks, strict=True)] == pytest.approx(expected, rel=1e-5)


TINY = (
    "model.num_layers=2",
    "model.hidden_size=32",
    "model.ffn_hidden_size=48",
    "model.num_heads=4",
    "model.num_kv_heads=2",
    "model.vocab_size=64",
    "train.seq_len=16",
    "train.global_batch_size=8",
)


@pytest.mark.parametrize("case", [case.name for case in CASES])
def test_a_case_runs_and_is_kept(case: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Sides whose losses differed in the first steps would end it."""
    arguments = ["zero", *TINY, "--case", case, "--rounds", "2", "--json", "--output", str(tmp_path)]
    assert bench.main(arguments) == 0
    shown = json.loads(capfd.readouterr().out)
    (comparison,) = shown["comparisons"]
    expected = case_named(case, CASES)
    assert comparison["name"] == case and comparison["settings"]["microbatches"] == expected.num_microbatches
    assert [side["side"] for side in comparison["sides"]] == [OURS, *expected.rivals]
    assert all(side["rounds"] == 2 and side["best_s"] > 0 for side in comparison["sides"])
    assert comparison["ratios"].keys() == set(expected.rivals)
    assert json.loads((tmp_path / "zero.json").read_text()) == shown


def test_an_unknown_case_is_refused() -> None:
    with pytest.raises(ValueError, match="there is no case 'zero4-dp2'; the cases are zero1-dp2, zero1-dp4"):
        bench.main(["zero", "--case", "zero4-dp2"])


def test_batches_that_do_not_fall_into_microbatches_are_refused() -> None:
    config = configure([*TINY, "train.global_batch_size=12"])
    with pytest.raises(ValueError, match="train.global_batch_size=12 must be a multiple of 8 here"):
        lay_out(config, case_named("zero1-dp2-x4", CASES))
