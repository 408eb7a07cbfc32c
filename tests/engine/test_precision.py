"""Training in 16 bits: as good as in 32, the same in every layout but for rounding, skipped by all ranks or none."""

import pytest
import torch

from megacore.config.schema import RunConfig
from megacore.mesh.group import CommLog
from tests.engine.common import built_rank, run_config, step_of
from tests.pool import WorkerPool

STEPS = 40
LAYOUTS = {
    "tp2 sequence": (2, "parallel.tp=2", "parallel.sequence_parallel=true"),
    "pp2": (2, "parallel.pp=2", "parallel.schedule=zb-h1"),
    "dp2": (2,),
    "dp2 zero1": (2, "parallel.zero=1"),
    "dp2 zero2": (2, "parallel.zero=2"),
    "dp2 zero3": (2, "parallel.zero=3"),
    "tp2 dp2 zero3": (4, "parallel.tp=2", "parallel.zero=3"),
}
TRAIN = ("model.vocab_size=67", "optim.clip_grad=1", "precision.loss_scale_start=1024")


def losses_of_rank(rank: int, world_size: int, config: RunConfig, steps: int) -> list[float]:
    """The same batch again and again: what can be learned of made-up tokens."""
    built = built_rank(rank, world_size, config)
    return [step_of(built, step=1, lr=1e-3)[0] for _ in range(steps)]


def losses(pool: WorkerPool, world_size: int, *overrides: str, steps: int = STEPS) -> list[float]:
    config = run_config(world_size, *TRAIN, *overrides)
    results = pool.run(losses_of_rank, world_size, world_size, config, steps)
    assert all(result == results[0] for result in results), "all ranks know the same loss"
    return results[0]


@pytest.fixture(scope="module")
def in_32_bits(pool: WorkerPool) -> list[float]:
    return losses(pool, 1, "precision.dtype=fp32")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_sixteen_bits_learn_as_thirty_two(pool: WorkerPool, in_32_bits: list[float], dtype: str, layout: str) -> None:
    world_size, *overrides = LAYOUTS[layout]
    ours = losses(pool, world_size, f"precision.dtype={dtype}", *overrides)
    assert in_32_bits[-1] < 0.9 * in_32_bits[0]
    assert ours == pytest.approx(in_32_bits, rel=0.01)


def skips_of_rank(rank: int, world_size: int, config: RunConfig, culprit: int) -> list[tuple[float, float, bool]]:
    """(skipped, scale, whether weights moved) of each step; in the second, a gradient of one rank overflows."""
    built, seen = built_rank(rank, world_size, config), []
    storage, begin = built.storage, built.storage.begin

    def overflow() -> None:
        begin()
        storage.own_grads[0][0] = torch.inf

    for step in range(4):
        storage.arrive()
        before = storage.params.clone()
        storage.begin = overflow if step == 1 and rank == culprit else begin  # type: ignore[method-assign]
        step_of(built, step=1, lr=1e-3)
        result, scale = built.trainer.result, built.trainer.loss_scale.scale
        storage.arrive()
        seen.append((result.skipped.item(), scale.item(), not torch.equal(before, storage.params)))
    return seen


@pytest.mark.parametrize("layout", [*LAYOUTS, "tp2 pp2 dp2 zero1, offloaded"])
@pytest.mark.parametrize("place", ["first", "last"])
def test_an_overflow_on_one_rank_skips_the_step_on_all(pool: WorkerPool, place: str, layout: str) -> None:
    """Whether its neighbours along tp, pp or dp have seen it or not."""
    offloaded = (8, "parallel.tp=2", "parallel.pp=2", "parallel.zero=1", "optim.offload=cpu")
    world_size, *overrides = LAYOUTS.get(layout, offloaded)
    culprit = 0 if place == "first" else world_size - 1
    config = run_config(world_size, *TRAIN, "precision.dtype=fp16", *overrides)
    for seen in pool.run(skips_of_rank, world_size, world_size, config, culprit):
        assert seen == [(0, 1024, True), (1, 512, False), (0, 512, True), (0, 512, True)]


def reduced_of_rank(rank: int, world_size: int, config: RunConfig) -> tuple[list[tuple[str, int, int]], int, float]:
    """(operation, elements, bytes) of each collective between data-parallel ranks in a step; elements of a buffer."""
    log = CommLog()
    built = built_rank(rank, world_size, config, log)
    log.clear()
    _, norm = step_of(built, step=1)
    own = [record for record in log if record.axis in ("dp_cp", "dp_shard") and record.num_elements > 1000]
    return [(r.operation, r.num_elements, r.dtype.itemsize) for r in own], built.storage.layout.size, norm


@pytest.mark.parametrize(("reduce", "itemsize"), [("fp32", 4), ("bf16", 2), ("fp64", 8)])
@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_gradients_travel_in_the_format_asked_for(pool: WorkerPool, zero: int, reduce: str, itemsize: int) -> None:
    formats = ("precision.dtype=bf16", f"precision.grad_reduce_dtype={reduce}")
    config = run_config(2, *formats, f"parallel.zero={zero}")
    seen, size, norm = pool.run(reduced_of_rank, 2, 2, config)[0]
    sums = [(elements, width) for operation, elements, width in seen if operation != "all_gather"]
    gathers = [width for operation, _, width in seen if operation == "all_gather"]
    times = 2 if zero >= 2 else 1  # after every microbatch
    assert {width for _, width in sums} == {itemsize}
    assert sum(elements for elements, _ in sums) == times * size
    assert set(gathers) == ({2} if zero else set()), "parameters travel as they are"
    exact = reduced_of_rank(0, 1, run_config(1, *formats))[2]
    assert norm == pytest.approx(exact, rel=0.01)


MASTERS = {
    "alone": (1,),
    "tp2 dp2 zero1": (4, "parallel.tp=2", "parallel.zero=1"),
    "dp2 zero3": (2, "parallel.zero=3"),
    "pp2": (2, "parallel.pp=2"),
    "muon, dp2 zero2": (2, "parallel.zero=2", "optim.name=muon"),
}


@pytest.mark.parametrize("layout", MASTERS)
@pytest.mark.parametrize("master", ["split", "none"])
def test_other_master_weights_learn_as_well(pool: WorkerPool, master: str, layout: str) -> None:
    world_size, *overrides = MASTERS[layout]
    formats = ("precision.dtype=bf16", *overrides)
    expected = losses(pool, world_size, *formats, steps=20)
    ours = losses(pool, world_size, *formats, f"precision.master={master}", steps=20)
    assert ours == pytest.approx(expected, rel=0.002 if master == "split" else 0.02)


def copied_of_rank(rank: int, world_size: int, config: RunConfig) -> tuple[bool, list[torch.Tensor]]:
    """Whether the optimizer's kernel writes parameters, too; and all parameters after steps of which one is skipped."""
    built = built_rank(rank, world_size, config)
    storage, begin = built.storage, built.storage.begin

    def spoil() -> None:
        begin()
        storage.own_grads[0][0] = torch.inf

    for step in range(4):
        storage.begin = spoil if step in (0, 2) else begin  # type: ignore[method-assign]
        step_of(built, step, 1e-3)
    for own, weight in zip(storage.own_params, storage.weights):
        assert torch.equal(own, weight.to(own.dtype)), "parameters are the rounded weights"
    return built.trainer.rule.writes_copies, [view.clone() for view in storage.whole("params").views().values()]


@pytest.mark.parametrize("zero", [0, 1, 3])
@pytest.mark.parametrize("name", ["adamw", "lion"])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_a_kernel_may_round_weights_on_its_way(pool: WorkerPool, dtype: str, name: str, zero: int) -> None:
    """AdamW's does for bf16, in the same pass over memory; parameters are the same everywhere either way."""
    config = run_config(2, *TRAIN, f"precision.dtype={dtype}", f"optim.name={name}", f"parallel.zero={zero}")
    results = pool.run(copied_of_rank, 2, 2, config)
    assert {writes for writes, _ in results} == {dtype == "bf16" and name == "adamw"}
    assert all(torch.equal(a, b) for a, b in zip(results[0][1], results[1][1], strict=True))
