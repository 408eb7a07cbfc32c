"""Statistics: those of whole tensors on every rank, from one collective, and nothing at other times."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megacore.config.load import load
from megacore.config.presets import preset_names
from megacore.config.resolve import resolve_model
from megacore.config.schema import OptimConfig
from megacore.layout import Layout
from megacore.mesh.group import CommLog
from megacore.mesh.mesh import ParallelMesh
from megacore.optim.clipping import make_clip
from megacore.optim.norm import GlobalNorm
from megacore.optim.statistics import PARTS, Watch, part_of
from megacore.spec import ModelSpec, ParamSpec
from tests.optim.cutting import LAYOUTS, SPECS, alone, cut, whole_tensor
from tests.pool import WorkerPool

EVERY, NUM_STEPS = 3, 6
OPTIM = OptimConfig(clip_grad=40.0)
"""Clips some of the steps."""
VALUE = OptimConfig(clip="value", clip_grad=0.5)
"""Clips on some of the ranks."""


def whole_gradient(step: int, place: int, spec: ParamSpec) -> Tensor:
    """One in three elements is zero; the gradients of every other step are small but for one parameter's."""
    whole = whole_tensor(place, spec, seed=step, scale=1.0 if step % 2 else 0.01)
    whole.view(-1)[::3] = 0.0
    if step % 2 == 0 and place == 0:
        whole.view(-1)[1] = 0.01 * step
    return whole


def watched_steps(rank: int, layout: Layout, optim: OptimConfig) -> tuple[list[dict[str, Any]], list[list[str]]]:
    """The statistics of the steps that are due, and the axes of the all-reduces of every step."""
    log = CommLog()
    own = cut(rank, layout, log)
    norm = own.norm
    clip, watch = make_clip(optim, norm, watched=True), Watch(norm, SPECS, own.mesh)
    weights = own.of(lambda place, spec: whole_tensor(place, spec, seed=100))
    records, axes = [], []
    for step in range(1, NUM_STEPS + 1):
        log.clear()
        grads = own.of(lambda place, spec, step=step: whole_gradient(step, place, spec))
        due = step % EVERY == 0
        if due:
            watch.before(grads, weights)
        clipped = clip(grads, torch.tensor(0.5, dtype=torch.float64))
        watch.clipped(clipped)
        for weight, grad in zip(weights, grads, strict=True):
            weight.sub_(grad, alpha=0.1)
        if due:
            records.append(watch.after(weights, clipped).record())
        axes.append([record.axis for record in log])
    return records, axes


def expected(optim: OptimConfig) -> list[dict[str, Any]]:
    """The same of whole tensors."""
    weights = [whole_tensor(place, spec, seed=100) for place, spec in enumerate(SPECS)]
    records, clipped = [], []
    for step in range(1, NUM_STEPS + 1):
        means = [whole_gradient(step, place, spec) * 0.5 for place, spec in enumerate(SPECS)]
        if optim.clip == "value":
            changes = [mean.clamp(-optim.clip_grad, optim.clip_grad) for mean in means]
        else:
            norm = torch.cat([mean.reshape(-1) for mean in means]).norm()
            changes = [mean * min(1.0, optim.clip_grad / (norm.item() + 1e-6)) for mean in means]
        clipped.append(not all(map(torch.equal, means, changes)))
        updates = [change * -0.1 for change in changes]
        if step % EVERY == 0:
            zeros = sum((mean == 0).sum().item() for mean in means)
            records.append(
                {
                    "parameter_norm": by_part(weights),
                    "gradient_norm": by_part(means),
                    "update_norm": by_part(updates),
                    "clipped_fraction": sum(clipped) / EVERY,
                    "zero_fraction": zeros / sum(spec.numel for spec in SPECS),
                }
            )
            clipped = []
        weights = [weight + update for weight, update in zip(weights, updates)]
    return records


def by_part(tensors: list[Tensor]) -> dict[str, float]:
    squares = dict.fromkeys(PARTS, 0.0)
    for tensor, spec in zip(tensors, SPECS, strict=True):
        squares[part_of(spec.name)] += tensor.square().sum().item()
    return {part: math.sqrt(square) for part, square in squares.items()}


def flat(record: dict[str, Any]) -> dict[str, float]:
    norms = {f"{name}.{part}": value for name in record if "norm" in name for part, value in record[name].items()}
    return norms | {name: value for name, value in record.items() if "norm" not in name}


@pytest.mark.parametrize("optim", [OPTIM, VALUE], ids=lambda optim: optim.clip)
@pytest.mark.parametrize("layout", [Layout(), *LAYOUTS], ids=Layout.describe)
def test_figures_are_those_of_whole_tensors_on_every_rank(pool: WorkerPool, layout: Layout, optim: OptimConfig) -> None:
    rights = expected(optim)
    assert {record["clipped_fraction"] for record in rights} == {1 / 3, 2 / 3}  # the example is worth it
    for records, axes in pool.run(watched_steps, layout.world, layout, optim):
        for record, right in zip(records, rights, strict=True):
            assert list(record) == list(right)
            assert list(record["gradient_norm"]) == list(PARTS)
            assert flat(record) == pytest.approx(flat(right), rel=1e-12)
        of_norm = axes[0]  # a step that is not due
        assert len(of_norm) <= 2
        extra = ["world"] if layout.world > 1 else []
        assert axes == [of_norm + extra * (step % EVERY == 0) for step in range(1, NUM_STEPS + 1)]


def test_a_skipped_step_has_no_update() -> None:
    own = alone()
    watch = Watch(own.norm, SPECS, own.mesh)
    grads, weights = own.of(whole_tensor, torch.float32), own.of(whole_tensor, torch.float32)
    grads[0][0] = torch.inf
    watch.before(grads, weights)
    clipped = make_clip(OPTIM, own.norm, watched=True)(grads, torch.ones((), dtype=torch.float64))
    watch.clipped(clipped)
    record = watch.after(weights, clipped).record()
    assert set(record["update_norm"].values()) == {0.0}
    assert (record["clipped_fraction"], record["zero_fraction"]) == (0.0, 0.0)
    assert record["gradient_norm"]["embedding"] == math.inf
    assert math.isfinite(record["gradient_norm"]["mlp"])


def test_weights_are_left_as_they_are() -> None:
    own = alone()
    watch = Watch(own.norm, SPECS, own.mesh)
    grads, weights = own.of(whole_tensor), own.of(whole_tensor)
    watch.before(grads, weights)
    clipped = make_clip(OptimConfig(clip="none"), own.norm, watched=True)(grads, torch.ones((), dtype=torch.float64))
    watch.clipped(clipped)
    watch.after(weights, clipped)
    for weight, right in zip(weights, own.of(whole_tensor), strict=True):
        assert weight.equal(right)
    assert not watch.weights  # the copy is let go of


def test_nothing_is_read_on_the_host() -> None:
    mesh = ParallelMesh.single("meta")
    norm = GlobalNorm([], SPECS, mesh, mesh.dp_shard)
    watch = Watch(norm, SPECS, mesh)
    watch.before([], [])
    clipped = make_clip(OPTIM, norm, watched=True)([], torch.ones((), device="meta"))
    watch.clipped(clipped)
    assert watch.after([], clipped).values.device.type == "meta"


@pytest.mark.parametrize("preset", preset_names())
def test_every_parameter_has_its_part(preset: str) -> None:
    model = resolve_model(replace(load(None, [], preset).model, vocab_size=100), seq_len=16)
    parts = {spec.name: part_of(spec.name) for spec in ModelSpec.of(model).params}
    assert set(parts.values()) == set(PARTS) - ({"head"} if model.tie_embeddings else set())
    for name, part in parts.items():
        assert part == "norms" if "norm" in name else part in name


def test_an_unknown_parameter_is_an_error() -> None:
    with pytest.raises(ValueError, match="layers.0.router.weight belongs to none of embedding"):
        part_of("layers.0.router.weight")
