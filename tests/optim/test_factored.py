"""Adafactor, CAME, SM3 and Adam-mini against plain references on whole matrices, however parameters are cut."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor

from megacore.config.optimizers import defaults, kept, state
from megacore.layout import Layout
from megacore.mesh.group import CommLog
from megacore.optim.formats import StateFormat
from megacore.optim.rule import Rule, Share
from megacore.optim.rules import make_rule
from megacore.spec import ParamSpec
from megacore.spec.matrices import matrices_of
from tests.optim.factored_references import REFERENCES
from tests.optim.odd_cuts import (
    BY_NAME,
    LAYOUTS,
    SPECS,
    UNSEEN,
    Held,
    assembled,
    grads_of,
    held_by,
    logical,
    lr_scale,
    share_of,
    whole_grad,
    whole_weight,
)
from tests.pool import WorkerPool

NAMES = tuple(REFERENCES)
PASSES = {"adafactor": 2, "came": 3, "sm3": 1, "adam-mini": 1}
STEPS = 50
HEAD = 3
TAKEN, SKIPPED = torch.ones(()), torch.zeros(())
Settings = Mapping[str, float]


def rate(step: int) -> float:
    return 1e-3 * (1 + step % 7)


def blocks_of(spec: ParamSpec, segment: int, part: Tensor) -> Tensor:
    """A number for each of Adam-mini's blocks, at all elements of the block."""
    if spec.name.endswith(".bias"):
        return torch.arange(part.numel())
    if part.dim() == 1:
        return torch.zeros_like(part)
    is_query_or_key = "qkv" in spec.name and segment in (0, 1)
    rows = torch.arange(part.shape[0]) // (HEAD if is_query_or_key else 1)
    return rows[:, None].expand(part.shape)


@cache
def expected(name: str, more: tuple[tuple[str, float], ...] = ()) -> Mapping[str, Tensor]:
    """Whole weights after all steps, by the reference."""
    settings = {**defaults(name), **dict(more)}
    weights = {spec.name: whole_weight(spec) for spec in SPECS}
    memories: dict[tuple[str, int], dict[str, Tensor]] = {}
    for t in range(1, STEPS + 1):
        for spec in SPECS:
            lr = rate(t) * lr_scale(spec)
            parts = zip(logical(spec, weights[spec.name]), logical(spec, whole_grad(spec, t)), strict=True)
            for segment, (weight, grad) in enumerate(parts):
                memory = memories.setdefault((spec.name, segment), {})
                change = REFERENCES[name](memory, settings, t, weight, grad, blocks_of(spec, segment, weight))
                weight -= lr * (change + (0.1 if spec.decay else 0) * weight)
    return weights


def rule_of(name: str, share: Share, more: Settings | None = None) -> Rule:
    return make_rule(name, share, {**defaults(name), **(more or {})})


def trained_rank(rank: int, layout: Layout, name: str, more: Settings) -> tuple[Held, Counter[tuple[str, str]]]:
    """A rank's weights after all steps, and how many collectives of each kind there were."""
    log = CommLog()
    share = share_of(rank, layout, log=log)
    rule = rule_of(name, share, more)
    log.clear()
    for step in range(1, STEPS + 1):
        rule.update(grads_of(share, step), rate(step), TAKEN)
    return held_by(share, share.weights), log.totals()


def assert_same(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> None:
    """To 1e-10, of each number or of 1e-4 of its tensor's RMS where that is more."""
    assert ours.keys() == theirs.keys()
    for name, b in theirs.items():
        floor = 1e-4 * b.square().mean().sqrt()
        worst = ((ours[name] - b).abs() / b.abs().clamp(min=floor)).max()
        assert worst < 1e-10, f"{name}: {worst}"


@pytest.mark.parametrize("layout", LAYOUTS, ids=Layout.describe)
@pytest.mark.parametrize("name", NAMES)
def test_a_rule_is_its_paper_on_every_layout(pool: WorkerPool, name: str, layout: Layout) -> None:
    results = pool.run(trained_rank, layout.world, layout, name, {})
    assert_same(assembled([held for held, _ in results], layout.tp), expected(name))
    groups = {axis for axis, size in (("tp", layout.tp), ("dp_shard", layout.dp_shard)) if size > 1}
    for _, totals in results:
        assert totals == {(axis, "all_reduce"): PASSES[name] * STEPS for axis in groups}


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("adafactor", {"scale_parameter": 0.0, "clip_threshold": 0.5, "decay_rate": 0.5}),
        ("came", {"clip_threshold": 0.3, "beta1": 0.5, "beta3": 0.99}),
        ("sm3", {"momentum": 0.0}),
        ("adam-mini", {"beta1": 0.0, "beta2": 0.999, "eps": 1e-3}),
    ],
)
def test_settings_are_those_of_the_paper(name: str, more: Settings) -> None:
    held, _ = trained_rank(0, Layout(), name, more)
    assert_same(assembled([held], 1), expected(name, tuple(more.items())))


def bits(rule: Rule) -> list[Tensor]:
    """Everything that a step may change."""
    tensors = [*rule.share.weights, rule.clock, *(tensor for part in rule.state().values() for tensor in part)]
    return [tensor.clone().view(torch.uint8) if tensor.dim() else tensor.clone() for tensor in tensors]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("name", NAMES)
def test_a_skipped_step_changes_not_a_bit(name: str, steps: int, dtype: torch.dtype) -> None:
    share = share_of(0, Layout(), dtype)
    rule = rule_of(name, share)
    for step in range(1, steps + 1):
        rule.update(grads_of(share, step), 1e-2, TAKEN)
    for tensor in (*share.weights, *rule.state().get("first", ())):
        tensor[0] = -0.0  # adding 0 would flip its sign
    before = bits(rule)
    rule.update([torch.zeros_like(weight) for weight in share.weights], 1e-2, SKIPPED)
    assert all(map(torch.equal, bits(rule), before))
    rule.update(grads_of(share, 4), 1e-2, TAKEN)
    assert not all(map(torch.equal, bits(rule), before))
    assert all(tensor.isfinite().all() for part in rule.state().values() for tensor in part)
    assert all(weight.isfinite().all() for weight in share.weights)


@pytest.mark.parametrize("name", NAMES)
def test_a_rule_goes_on_from_its_state(name: str) -> None:
    first = rule_of(name, share_of(0, Layout()))
    for step in range(1, 6):
        first.update(grads_of(first.share, step), rate(step), TAKEN)
    second = rule_of(name, share_of(0, Layout()))
    second.clock.copy_(first.clock)
    for ours, theirs in zip(second.share.weights, first.share.weights, strict=True):
        ours.copy_(theirs)
    for part, tensors in second.state().items():
        for ours, theirs in zip(tensors, first.state()[part], strict=True):
            ours.copy_(theirs)
    for rule in (first, second):
        rule.update(grads_of(rule.share, 6), rate(6), TAKEN)
    assert all(map(torch.equal, bits(first), bits(second)))


@pytest.mark.parametrize("name", NAMES)
def test_a_rule_keeps_what_it_says(name: str) -> None:
    """Its numbers are those of the model's elements, rows and columns: what memory is priced by."""
    share = share_of(0, Layout(), torch.bfloat16)
    rule = rule_of(name, share)
    matrices = [matrix for spec in SPECS for matrix in matrices_of(spec)]
    num = {
        "moment": sum(spec.numel for spec in SPECS),
        "row": sum(matrix.rows for matrix in matrices),
        "column": sum(matrix.columns for matrix in matrices),
    }
    kinds = kept(state(name), defaults(name))
    assert {part: sum(map(torch.numel, tensors)) for part, tensors in rule.state().items()} == {
        part: num[kind] for part, kind in kinds.items()
    }
    for part, tensors in rule.state().items():
        per_element = kinds[part] == "moment"
        assert len(tensors) == (len(share.runs) if per_element else len(matrices))
        assert {tensor.dtype for tensor in tensors} == {torch.bfloat16 if per_element else torch.float32}


@pytest.mark.parametrize("kind", ["bf16", "int8"])
@pytest.mark.parametrize("name", ["came", "sm3", "adam-mini"])
def test_moments_may_be_small(name: str, kind: str) -> None:
    """Steps of a rule with moments in fewer bits are about those of the rule."""
    moved = []
    for form in (StateFormat(), StateFormat(kind)):
        share = replace(share_of(0, Layout(), torch.float32), format=form)
        before = torch.cat(share.weights)
        rule = rule_of(name, share)
        for step in range(1, 6):
            rule.update(grads_of(share, step), 1e-3, TAKEN)
        moved.append(torch.cat(share.weights) - before)
    full, small = moved
    assert not torch.equal(full, small)
    assert torch.cosine_similarity(full, small, dim=0) > 0.98


def test_adafactor_and_sm3_leave_alone_what_has_no_gradient() -> None:
    for name in ("adafactor", "sm3"):
        held, _ = trained_rank(0, Layout(), name, {})
        tokens = assembled([held], 1)["embedding.tokens.weight"]
        assert torch.equal(tokens[UNSEEN], whole_weight(BY_NAME["embedding.tokens.weight"])[UNSEEN])
        assert not torch.equal(tokens[UNSEEN + 1], whole_weight(BY_NAME["embedding.tokens.weight"])[UNSEEN + 1])


@pytest.mark.parametrize("name", NAMES)
def test_small_steps_of_bf16_weights_are_not_lost_where_rounding_is_by_chance(name: str) -> None:
    """Rounded to nearest, steps far below a weight's last bit never show."""
    moved = []
    for stochastic in (False, True):
        form = StateFormat(stochastic=stochastic)
        share = replace(share_of(0, Layout(), torch.bfloat16), format=form, weight_decay=(0.0,) * len(SPECS))
        rule = rule_of(name, share)
        before = torch.cat(share.weights)
        for step in range(1, 6):
            rule.update(grads_of(share, step), 1e-5 if name == "came" else 1e-4, TAKEN)  # whose first steps are long
        large = before.abs() > 0.5
        moved.append((torch.cat(share.weights) != before)[large].any().item())
    assert moved == [False, True]
