"""Weights that travel between ZeRO's shards in FP8: the same bits as otherwise, in half the bytes."""

from collections import Counter
from pathlib import Path

import pytest
import torch

from megacore.config.schema import RunConfig
from megacore.mesh.group import CommLog
from megacore.train.imagine import Imagination
from tests.checkpoint.common import Curve, config_of, digests, read_rank, write_rank
from tests.engine.common import (
    Piece,
    assemble,
    batch_of,
    built_rank,
    microbatches_of,
    parts,
    run_config,
    step_of,
)
from tests.pool import WorkerPool

SHAPE = (
    "model.hidden_size=64",
    "model.ffn_hidden_size=128",
    "model.num_heads=4",
    "model.num_kv_heads=2",
    "model.head_dim=16",
    "model.vocab_size=67",
    "precision.dtype=bf16",
)
LAYOUTS = {
    "dp2 zero1": (2, "parallel.dp=2", "parallel.zero=1"),
    "dp2 zero2, biases": (2, "parallel.dp=2", "parallel.zero=2", "model.family=gpt2"),
    "dp2 zero3": (2, "parallel.dp=2", "parallel.zero=3"),
    "tp2 dp2 zero3": (4, "parallel.tp=2", "parallel.zero=3", "parallel.sequence_parallel=true"),
    "hybrid pp2 zero1": (4, "parallel.pp=2", "parallel.dp_shard=2", "parallel.zero=1", "parallel.schedule=zb-h1"),
    "dp4 of two groups zero3": (4, "parallel.dp_shard=2", "parallel.zero=3"),
    "dp3 zero3, frozen": (3, "parallel.zero=3", "train.global_batch_size=12", "optim.freeze=layers.1.mlp.down.*"),
    "split master zero2": (2, "parallel.zero=2", "precision.master=split"),
    "fp32 zero1": (2, "parallel.zero=1", "precision.dtype=fp32"),
}
QUICK = {
    ("dp2 zero1", "delayed"),
    ("dp2 zero2, biases", "current"),
    ("tp2 dp2 zero3", "delayed"),
    ("hybrid pp2 zero1", "current"),
    ("dp3 zero3, frozen", "current"),
}
CASES = [
    pytest.param(layout, recipe, marks=() if (layout, recipe) in QUICK else pytest.mark.slow)
    for layout in LAYOUTS
    for recipe in ("current", "delayed")
]


def config_with(world_size: int, *overrides: str, gather: bool = True) -> RunConfig:
    skips = ("precision.fp8_skip_last=1", f"precision.fp8_gather={str(gather).lower()}")
    return run_config(world_size, *SHAPE, *skips, *overrides)


def trained_rank(rank: int, world_size: int, config: RunConfig) -> tuple[Curve, list[float], list[Piece], bool]:
    """Three steps, with an evaluation between them, and the weights; whether matrices have memory."""
    built = built_rank(rank, world_size, config)
    microbatches = microbatches_of(batch_of(config, 9), config, built.mesh.dp.rank, built.mesh.dp.size)
    curve, losses = [], []
    for step in (1, 2, 3):
        losses.append(built.trainer.evaluate(microbatches)[0].item())
        curve.append(step_of(built, step, lr=3e-3))
    of_first = [param for name, param in built.storage.parameters.items() if name.endswith("attention.qkv.weight")]
    return curve, losses, parts(built, "params"), bool(of_first) and all(0 not in param.stride() for param in of_first)


@pytest.mark.parametrize(("layout", "recipe"), CASES)
def test_nothing_changes_but_the_messages(pool: WorkerPool, layout: str, recipe: str) -> None:
    """Losses, evaluations and weights to the bit, though the matrices are nowhere whole."""
    world_size, *overrides = LAYOUTS[layout]
    words = (*overrides, f"precision.fp8={recipe}")
    plain = config_with(world_size, *words, gather=False)
    expected = pool.run(trained_rank, world_size, world_size, plain)
    ours = pool.run(trained_rank, world_size, world_size, config_with(world_size, *words))
    assert [each[:2] for each in ours] == [each[:2] for each in expected]
    assert not ours[0][3], "the first rank's block in FP8 has no memory"
    weights, wanted = (assemble(plain, [each[2] for each in of_ranks]) for of_ranks in (ours, expected))
    assert all(torch.equal(weights[name], wanted[name]) for name in wanted)


def bytes_of_rank(rank: int, world_size: int, config: RunConfig) -> Counter[str]:
    log = CommLog()
    built = built_rank(rank, world_size, config, log)
    step_of(built, step=1, lr=1e-3)
    log.clear()
    step_of(built, step=2, lr=1e-3)
    found: Counter[str] = Counter()
    for each in log:
        if each.axis == "dp_shard":
            found[each.operation] += each.num_elements * each.dtype.itemsize
    return found


NORMS = 2 * 64
MATRICES = (4 + 2 * 2) * 16 * 64 + 64 * 64 + 3 * 64 * 128
"""Elements of a block."""


@pytest.mark.parametrize(("zero", "gathers"), [(1, 1), (3, 4)])
def test_messages_are_half_as_long(pool: WorkerPool, zero: int, gathers: int) -> None:
    """ZeRO-1 gathers once a step, here in one bucket; ZeRO-3 each block by itself, for two microbatches, forward and
    backward. Of three blocks one stays in bf16."""
    words = ("precision.fp8=current", f"parallel.zero={zero}")
    plain, ours = (pool.run(bytes_of_rank, 2, 2, config_with(2, *words, gather=each))[0] for each in (False, True))
    assert ours["reduce_scatter"] == plain["reduce_scatter"]
    assert ours["all_reduce"] == plain["all_reduce"] + 4 * 2 * 4, "the largest elements of eight matrices, once"
    if zero == 3:
        assert plain["all_gather"] - ours["all_gather"] == gathers * 2 * (MATRICES - NORMS)
    else:
        rest = 3 * NORMS + 64 + 2 * 67 * 64 + MATRICES  # with the last norm, the vocabulary twice, the last block
        assert ours["all_gather"] == plain["all_gather"] // 2 + 2 * rest
    assert ours["all_gather"] < 0.9 * plain["all_gather"]


@pytest.mark.parametrize("zero", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_a_dry_run_counts_the_same(pool: WorkerPool, zero: int) -> None:
    config = config_with(2, "precision.fp8=delayed", f"parallel.zero={zero}")
    traffic = Imagination(config, 2, "cpu").rank(0, walk=True).traffic
    sent = {operation: bytes_ for axis, operation, _, bytes_ in traffic if axis == "dp_shard"}
    real = pool.run(bytes_of_rank, 2, 2, config)[0]
    assert sent["all_gather"] == pytest.approx(real["all_gather"] / 2), "each rank sends its half"


def test_what_it_needs_is_said() -> None:
    def refused(*words: str) -> str:
        with pytest.raises(ValueError) as raised:
            config_with(2, *words)
        return str(raised.value)

    assert "fp8_gather=True is for a precision.fp8, not fp8=off" in refused("precision.fp8_skip_last=0")
    assert "needs one scale per weight" in refused("precision.fp8=block", "parallel.zero=1")
    assert "parallel.zero=0 has not; use zero=1 or more" in refused("precision.fp8=current")
    words = ("precision.fp8=current", "parallel.zero=3")
    assert "log.statistics_every=5 does; leave one of them out" in refused(*words, "log.statistics_every=5")
    assert "for our own products" in refused(*words, 'kernels.use=["linear=transformer-engine"]')


def test_a_weight_that_is_not_finite_is_not_hidden(pool: WorkerPool) -> None:
    """Whoever holds it, all see it: the step's norm is not finite, and what was seen is no history."""
    for recipe in ("current", "delayed"):
        words = (f"precision.fp8={recipe}", "parallel.zero=1")
        plain, ours = (pool.run(broken_rank, 2, 2, config_with(2, *words, gather=each)) for each in (False, True))
        assert ours == plain and all(norm == "nan" for norm, _ in ours)


@pytest.mark.slow
def test_a_run_goes_on_to_the_bit(pool: WorkerPool, tmp_path: Path) -> None:
    """Also one that gathered bf16 until then: checkpoints do not know of it."""
    words, layout = (*SHAPE, "precision.fp8=delayed"), {"tp": 2, "dp": 2, "zero": 3}
    gathering = config_of((*words, "precision.fp8_gather=true"), layout)
    source, own = str(tmp_path / "source"), str(tmp_path / "own")
    curve, problems = pool.run(write_rank, 4, 4, config_of(words, layout), source, 2, 2)[0]
    assert problems == ["", ""]
    ours, again, difference = pool.run(read_rank, 4, 4, gathering, [source], own, 2, 2)[0][0]
    assert ours == curve and difference == 0.0 and again == digests(source, 2)


def broken_rank(rank: int, world_size: int, config: RunConfig) -> tuple[str, list[list[float]]]:
    """The norm of a step with a broken weight; and of each layer in FP8, what that step has made history."""
    built = built_rank(rank, world_size, config)
    step_of(built, step=1, lr=1e-3)
    built.storage.arrive()
    own = {run.name: weight for run, weight in zip(built.storage.runs, built.storage.weights)}
    if rank == 1:  # who holds its end, and rank 0 its beginning
        own["layers.1.mlp.gate_up.weight"][0] = torch.nan
    built.storage.publish()
    norm = step_of(built, step=2)[1]
    assert built.trainer.fp8 is not None
    return str(norm), [history[0].tolist() for history in built.trainer.fp8.state().values()]
