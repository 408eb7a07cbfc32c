"""Clipping: by norm, by value and AdaGC against plain formulas on whole tensors, wherever these are cut."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from megacore.config.schema import OptimConfig
from megacore.layout import Layout
from megacore.layout.shards import Run
from megacore.mesh.mesh import ParallelMesh
from megacore.optim.clipping import AdaGC, Clip, make_clip
from megacore.optim.norm import GlobalNorm
from megacore.spec import ParamSpec
from tests.optim.cutting import LAYOUTS, SPECS, alone, cut, whole_tensor
from tests.pool import WorkerPool

NUM_STEPS = 12
SKIPPED = 2
"""Within the warm-up of AdaGC below, which it must not count for."""
TO_MEAN = 0.75
KINDS = {
    "norm": OptimConfig(clip="norm", clip_grad=1.0),
    "loose": OptimConfig(clip="norm", clip_grad=1e9),
    "value": OptimConfig(clip="value", clip_grad=0.5),
    "adagc": OptimConfig(clip="adagc", clip_grad=1.0, adagc_warmup_steps=4, adagc_beta=0.9, adagc_ratio=1.1),
    "none": OptimConfig(clip="none"),
}


def whole_gradient(step: int, place: int, spec: ParamSpec) -> Tensor:
    """Grows and falls, with spikes of single parameters; one bad number in the step to be skipped."""
    spike = 50.0 if (step + place) % 5 == 0 else 1.0
    whole = whole_tensor(place, spec, seed=step, scale=0.01 * spike * (1 + step % 3))
    if step == SKIPPED and place == 4:
        whole.view(-1)[-1] = torch.nan
    return whole


def whole_gradients(step: int) -> list[Tensor]:
    return [whole_gradient(step, place, spec) for place, spec in enumerate(SPECS)]


def expected(optim: OptimConfig) -> list[list[Tensor]]:
    """The clipped gradients of each step: the papers' formulas, written down once more for lists of whole tensors."""
    usual = [torch.inf] * len(SPECS)
    results, num_taken = [], 0
    for step in range(NUM_STEPS):
        grads = [grad * TO_MEAN for grad in whole_gradients(step)]
        norms = [grad.norm().item() for grad in grads]
        norm = sum(each**2 for each in norms) ** 0.5
        if step == SKIPPED:
            results.append([torch.zeros_like(grad) for grad in grads])
            continue
        of_all = min(1.0, optim.clip_grad / (norm + 1e-6))
        if optim.clip == "norm":
            grads = [grad * of_all for grad in grads]
        elif optim.clip == "value":
            grads = [grad.clamp(-optim.clip_grad, optim.clip_grad) for grad in grads]
        elif optim.clip == "adagc":
            for place, own in enumerate(norms):
                if num_taken < optim.adagc_warmup_steps:
                    grads[place] *= of_all
                    usual[place] = min(usual[place], own * of_all)
                else:
                    factor = min(1.0, optim.adagc_ratio * usual[place] / own)
                    grads[place] *= factor
                    usual[place] = optim.adagc_beta * usual[place] + (1 - optim.adagc_beta) * own * factor
        results.append(grads)
        num_taken += 1
    return results


def clipped_of_rank(rank: int, layout: Layout, optim: OptimConfig) -> tuple[list[float], list[float], float]:
    """Norm and taken of every step, and the largest relative error of this rank's runs."""
    own = cut(rank, layout)
    clip = make_clip(optim, own.norm)
    norms, taken, error = [], [], 0.0
    for step, wholes in enumerate(expected(optim)):
        grads = own.of(lambda place, spec, step=step: whole_gradient(step, place, spec))
        result = clip(grads, torch.tensor(TO_MEAN, dtype=torch.float64))
        for grad, right in zip(grads, own.of(lambda place, spec, wholes=wholes: wholes[place]), strict=True):
            assert grad.isfinite().all()
            error = max(error, ((grad - right).norm() / right.norm().clamp(min=1e-9)).item())
        norms.append(result.norm.item())
        taken.append(result.taken.item())
        assert result.taken.dtype == torch.float32
    return norms, taken, error


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", [Layout(), *LAYOUTS], ids=Layout.describe)
def test_every_kind_on_every_layout(pool: WorkerPool, layout: Layout, kind: str) -> None:
    results = pool.run(clipped_of_rank, layout.world, layout, KINDS[kind])
    for norms, taken, error in results:
        assert error < 1e-12
        assert taken == [float(step != SKIPPED) for step in range(NUM_STEPS)]
        whole = torch.cat([grad.reshape(-1) for grad in whole_gradients(0)]).norm().item() * TO_MEAN
        assert norms[0] == pytest.approx(whole, rel=1e-12)
    assert len({repr(norms) for norms, _, _ in results}) == 1


def test_the_spikes_of_the_example_are_clipped() -> None:
    """Else the comparisons above would say little."""
    for kind in ("norm", "value", "adagc"):
        steps = list(zip(expected(KINDS[kind]), expected(KINDS["none"])))
        changed = [step for step, pair in enumerate(steps) if not all(map(torch.equal, *pair))]
        assert len(changed) > NUM_STEPS // 2, kind


def test_clipping_by_norm_is_that_of_torch() -> None:
    own = alone()
    grads = own.of(whole_tensor, torch.float32)
    params = [torch.nn.Parameter(torch.zeros_like(grad)) for grad in grads]
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad.clone()
    norm = torch.nn.utils.clip_grad_norm_(params, 3.0)
    result = make_clip(OptimConfig(clip_grad=3.0), own.norm)(grads, torch.ones((), dtype=torch.float64))
    assert result.norm.item() == pytest.approx(norm.item(), rel=1e-6)
    for param, grad in zip(params, grads, strict=True):
        torch.testing.assert_close(grad, param.grad)


def single(num: int, *names: str) -> tuple[GlobalNorm, list[Run]]:
    """The norm of some parameters of ``num`` elements, of which each is one run."""
    mesh = ParallelMesh.single()
    runs = [Run(name, 0, num, place * num) for place, name in enumerate(names)]
    return GlobalNorm(runs, [ParamSpec(name, (num,)) for name in names], mesh, mesh.dp_shard), runs


def clip_once(clip: Clip, *values: float) -> list[float]:
    """What becomes of gradients with one element each."""
    grads = [torch.tensor([value], dtype=torch.float64) for value in values]
    clip(grads, torch.ones((), dtype=torch.float64))
    return [grad.item() for grad in grads]


def test_adagc_lets_a_parameter_live_whose_gradient_was_zero() -> None:
    norm, _ = single(1, "a", "b")
    clip = make_clip(replace(KINDS["adagc"], clip_grad=100.0), norm)
    for _ in range(6):
        assert clip_once(clip, 2.0, 0.0) == [2.0, 0.0]
    assert clip_once(clip, 2.0, 5.0) == [2.0, 5.0]  # nothing usual is known of it: clipped with all
    assert clip_once(clip, 2.0, 10.0) == [2.0, pytest.approx(1.1 * 5.0)]
    assert clip_once(clip, 0.0, 5.0) == [0.0, 5.0]
    assert clip_once(clip, 20.0, 5.0) == [pytest.approx(1.1 * 2.0), 5.0]


def test_adagc_goes_on_from_its_state() -> None:
    norm, _ = single(1, "a")
    first, second = (make_clip(KINDS["adagc"], norm) for _ in range(2))
    for _ in range(5):
        clip_once(first, 0.5)
    assert {name: tuple(value.shape) for name, value in first.state().items()} == {"usual_norms": (1,), "clock": ()}
    for name, value in second.state().items():
        value.copy_(first.state()[name])
    assert clip_once(second, 7.0) == clip_once(first, 7.0) == [pytest.approx(0.55)]


@pytest.mark.parametrize("kind", ["norm", "value", "adagc"])
def test_a_bound_of_0_is_no_bound(kind: str) -> None:
    norm, _ = single(1, "a")
    assert clip_once(make_clip(OptimConfig(clip=kind, clip_grad=0.0), norm), 1e6) == [1e6]


@pytest.mark.parametrize(
    ("kind", "small", "large"), [("norm", 0.9, 1.1), ("value", 0.5, 0.6), ("adagc", 0.9, 1.1), ("none", 1.0, 1e9)]
)
def test_who_watches_learns_whether_something_was_clipped(kind: str, small: float, large: float) -> None:
    norm, _ = single(1, "a")
    changed = []
    for value in (small, -large, torch.inf):
        clip = make_clip(KINDS[kind], norm, watched=True)
        result = clip([torch.tensor([value], dtype=torch.float64)], torch.ones((), dtype=torch.float64))
        assert result.changed is not None
        changed.append(result.changed.item())
    assert changed == [False, kind != "none", False]
    unwatched = make_clip(KINDS[kind], norm)([torch.ones(1)], torch.ones((), dtype=torch.float64))
    assert unwatched.changed is None


@pytest.mark.parametrize("kind", KINDS)
def test_a_rank_without_runs_takes_part(kind: str) -> None:
    norm, _ = single(1)
    result = make_clip(KINDS[kind], norm, watched=True)([], torch.ones((), dtype=torch.float64))
    assert (result.norm.item(), result.taken.item(), result.changed.item()) == (0.0, 1.0, False)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_read_on_the_host(kind: str) -> None:
    """Tensors of the meta device have no values: whoever reads one fails."""
    mesh = ParallelMesh.single("meta")
    specs = [ParamSpec("a", (4,)), ParamSpec("b", (2,))]
    norm = GlobalNorm([Run("a", 0, 4, 0), Run("b", 0, 2, 4)], specs, mesh, mesh.dp_shard)
    clip = make_clip(KINDS[kind], norm, watched=True)
    result = clip([torch.ones(4, device="meta"), torch.ones(2, device="meta")], torch.ones((), device="meta"))
    assert result.taken.device.type == "meta"


def test_factors_of_16_bit_gradients_are_not_rounded() -> None:
    norm, _ = single(1, "a")
    grads = [torch.full((1,), 32768.0, dtype=torch.float16)]
    make_clip(OptimConfig(clip_grad=0.0), norm)(grads, torch.tensor(2.0**-26, dtype=torch.float64))
    assert grads[0].item() == 2.0**-11  # the factor itself would be 0 in fp16


def test_adagc_has_one_number_per_parameter_of_the_model() -> None:
    clip = make_clip(KINDS["adagc"], alone().norm)
    assert isinstance(clip, AdaGC)
    assert clip.state()["usual_norms"].shape == (len(SPECS),)
