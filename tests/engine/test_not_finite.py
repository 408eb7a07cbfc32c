"""A gradient that is no number, on any one rank and in any format: no weight sees it, and all skip that very step."""

import random

import pytest
import torch

from megacore.config.schema import RunConfig
from tests.engine.common import built_rank, run_config, step_of
from tests.engine.test_precision import LAYOUTS, TRAIN
from tests.pool import WorkerPool

TIMES, PERIOD = 105, 3
DTYPES = ("fp32", "bf16")
BAD = (float("nan"), float("inf"), float("-inf"))


def skips_of_rank(
    rank: int, world_size: int, config: RunConfig, times: int, seed: int
) -> list[tuple[bool, bool, bool]]:
    """(skipped, whether weights moved, whether all are finite) of each step; a bad number comes in one of PERIOD.

    Which rank it is of, where in its gradients, and at which of the steps, is drawn from `seed` alike on all ranks.
    """
    built, seen = built_rank(rank, world_size, config), []
    storage, begin, drawn = built.storage, built.storage.begin, random.Random(seed)
    for _ in range(times):
        when, culprit = drawn.randrange(PERIOD), drawn.randrange(world_size)
        value, place = drawn.choice(BAD), drawn.random()

        def spoil(value: float = value, place: float = place) -> None:
            begin()
            grads = drawn_from(storage.own_grads, place)
            grads[int(place * (len(grads) - 1))] = value

        for step in range(PERIOD):
            storage.arrive()
            before = storage.params.clone()
            storage.begin = spoil if step == when and rank == culprit else begin  # type: ignore[method-assign]
            step_of(built, step=1, lr=1e-3)
            storage.arrive()
            seen.append(
                (
                    built.trainer.result.skipped.item() > 0,
                    not torch.equal(before, storage.params),
                    bool(storage.params.isfinite().all()),
                )
            )
    return seen


def drawn_from(grads: list[torch.Tensor], place: float) -> torch.Tensor:
    """One of the tensors that are not empty, flat."""
    full = [grad.view(-1) for grad in grads if grad.numel()]
    return full[int(place * 997) % len(full)]


def steps_that_must_be_skipped(world_size: int, times: int, seed: int) -> list[bool]:
    drawn, expected = random.Random(seed), []
    for _ in range(times):
        when, _culprit = drawn.randrange(PERIOD), drawn.randrange(world_size)
        drawn.choice(BAD), drawn.random()
        expected += [step == when for step in range(PERIOD)]
    return expected


@pytest.mark.parametrize(
    "layout", ["pp2", "dp2 zero3", *(pytest.param(each, marks=pytest.mark.slow) for each in LAYOUTS)]
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_none_reaches_the_weights(pool: WorkerPool, layout: str, dtype: str, request: pytest.FixtureRequest) -> None:
    times = TIMES // len(LAYOUTS) if request.node.get_closest_marker("slow") else 2
    world_size, *overrides = LAYOUTS[layout]
    config = run_config(world_size, *TRAIN, f"precision.dtype={dtype}", *overrides)
    expected = steps_that_must_be_skipped(world_size, times, seed=times)
    for seen in pool.run(skips_of_rank, world_size, world_size, config, times, times):
        assert seen == [(skip, not skip, True) for skip in expected]
