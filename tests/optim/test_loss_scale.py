"""Loss scaling: the scale that looks for itself against torch's, and an overflow on one rank that all agree on."""

import random

import pytest
import torch

from megacore.config.load import load
from megacore.config.schema import OptimConfig, PrecisionConfig
from megacore.config.validate import validate
from megacore.layout import Layout
from megacore.mesh.collectives import all_reduce
from megacore.optim.clipping import make_clip
from megacore.optim.loss_scale import LARGEST, LossScale
from tests.optim.cutting import CPU, LAYOUTS, SPECS, cut, whole_tensor
from tests.pool import WorkerPool

DYNAMIC = PrecisionConfig(dtype="fp16", loss_scale="dynamic", loss_scale_every=3)


def after(scale: LossScale, *overflows: int) -> list[float]:
    """The scale after each step."""
    scales = []
    for found_inf in overflows:
        scale.update(torch.tensor(float(found_inf)))
        scales.append(scale.scale.item())
    return scales


def test_the_dynamic_scale_is_that_of_torch() -> None:
    rng = random.Random(0)
    ours = LossScale(DYNAMIC, CPU)
    scale, tracker = torch.full((1,), 65536.0), torch.zeros(1, dtype=torch.int32)
    for _ in range(100):
        found_inf = float(rng.random() < 0.3)
        after(ours, int(found_inf))
        torch._amp_update_scale_(scale, tracker, torch.tensor([found_inf]), 2.0, 0.5, 3)
        assert ours.scale.item() == scale.item()
        assert 1.0 < scale.item() < LARGEST  # torch has no limits, so none may be reached
    assert ours.scale.dtype == torch.float32


def test_the_defaults_are_the_usual_ones() -> None:
    scale = LossScale(PrecisionConfig(loss_scale="dynamic"), CPU)
    assert after(scale, *[0] * 1999)[-1] == 2.0**16
    assert after(scale, 0) == [2.0**17]
    assert after(scale, 1) == [2.0**16]


def test_the_dynamic_scale_has_limits() -> None:
    scale = LossScale(DYNAMIC, CPU)
    assert after(scale, *[1] * 20)[-4:] == [1.0] * 4
    assert after(scale, *[0] * 100)[-1] == LARGEST


@pytest.mark.parametrize(("setting", "value"), [("off", 1.0), ("1000", 1000.0)])
def test_a_static_scale_stays(setting: str, value: float) -> None:
    scale = LossScale(PrecisionConfig(loss_scale=setting, loss_scale_every=1), CPU)
    assert after(scale, 1, 0, 0, 1) == [value] * 4
    assert not scale.state()


def test_the_dynamic_scale_goes_on_from_its_state() -> None:
    first, second = LossScale(DYNAMIC, CPU), LossScale(DYNAMIC, CPU)
    after(first, 1, 0, 0)
    for name, value in second.state().items():
        value.copy_(first.state()[name])
    assert after(second, 0, 0) == after(first, 0, 0) == [65536.0, 65536.0]


def test_nothing_is_read_on_the_host() -> None:
    scale = LossScale(DYNAMIC, torch.device("meta"))
    scale.update(torch.zeros((), device="meta"))
    assert scale.scale.device.type == "meta"


def half_steps_of_rank(rank: int, layout: Layout, faulty: int) -> list[tuple[float, float, float, bool]]:
    """(taken, scale after, norm, whether any gradient is left) of four steps.

    Gradients are formed in fp16 from a scaled loss. Those of rank ``faulty`` are too large for the first scales.
    """
    own = cut(rank, layout)
    loss_scale = LossScale(DYNAMIC, CPU)
    clip = make_clip(OptimConfig(clip="none"), own.norm)
    wholes = own.of(whole_tensor, torch.float32)
    steps = []
    for _ in range(4):
        size = 2.0 if rank == faulty else 1e-3
        halves = [(grad.sign() * size * loss_scale.scale).to(torch.float16) for grad in wholes]
        grads = [all_reduce(half.to(torch.float32), own.mesh.dp_replicate) for half in halves]
        clipped = clip(grads, 1 / loss_scale.scale.to(torch.float64))
        loss_scale.update(1 - clipped.taken)
        left = any(grad.any().item() for grad in grads)
        steps.append((clipped.taken.item(), loss_scale.scale.item(), clipped.norm.item(), left))
    return steps


@pytest.mark.parametrize("layout", LAYOUTS, ids=Layout.describe)
def test_an_overflow_on_one_rank_skips_the_step_on_all(pool: WorkerPool, layout: Layout) -> None:
    # 2 * 2^16 and 2 * 2^15 exceed 65504, the largest number of fp16
    results = pool.run(half_steps_of_rank, layout.world, layout, 1)
    for steps in results:
        assert [(taken, scale) for taken, scale, _, _ in steps] == [(0, 2**15), (0, 2**14), (1, 2**14), (1, 2**14)]
        assert [left for _, _, _, left in steps] == [False, False, True, True]
    number = sum(spec.numel for spec in SPECS)
    assert 2.0 < results[0][-1][2] < 4.0 * number**0.5  # the scale is out of it again


@pytest.mark.parametrize("setting", ["dynamc", "0", "-1", "inf", "nan", ""])
def test_a_scale_that_is_none_is_refused(setting: str) -> None:
    problems = validate(load(None, [f"precision.loss_scale={setting}"], "demo"), None)
    assert [line.split("=")[0] for line in problems] == ["precision.loss_scale"]
    assert "auto, dynamic, off or a number above 0" in problems[0]


def test_the_first_scale_is_no_smaller_than_the_least() -> None:
    overrides = ["precision.dtype=fp16", "precision.loss_scale_start=2", "precision.loss_scale_min=4"]
    (problem,) = validate(load(None, overrides, "demo"), None)
    assert problem.startswith("precision.loss_scale_start=2.0 is below")
