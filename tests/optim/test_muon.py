"""Muon against a plain reference on whole matrices, however these are cut, and what travels for it."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor

from megacore.config.optimizers import defaults
from megacore.layout import Layout
from megacore.layout.shards import Run
from megacore.mesh.group import CommLog, CommRecord
from megacore.optim.assemble import plan
from megacore.optim.deal import Task
from megacore.optim.orthogonal import COEFFICIENTS
from megacore.optim.rule import Share
from megacore.optim.rules import make_rule
from megacore.optim.rules.muon import Muon, part_of
from megacore.spec import ParamSpec
from megacore.spec.matrices import is_hidden_matrix, matrices_of
from tests.optim.odd_cuts import (
    BY_NAME,
    CPU,
    LAYOUTS,
    SPECS,
    Held,
    assembled,
    grads_of,
    held_by,
    local_of,
    logical,
    lr_scale,
    share_of,
    whole_grad,
    whole_weight,
)
from tests.pool import WorkerPool

STEPS = 50
TAKEN, SKIPPED = torch.ones(()), torch.zeros(())
HIDDEN = {spec.name for spec in SPECS if is_hidden_matrix(spec)}
MATRICES = [matrix for spec in SPECS if spec.name in HIDDEN for matrix in matrices_of(spec)]
DOWN = "layers.0.mlp.down.weight"
Settings = Mapping[str, float]
NUM_SMALL = 200
SMALL = {"round_mib": NUM_SMALL * 8 / 2**20}
"""Rounds of 200 numbers in float64: more than one on every layout here, and none of one large matrix alone."""


def rate(step: int) -> float:
    return 1e-3 * (1 + step % 7)


def polar(matrix: Tensor, settings: Settings) -> Tensor:
    """Newton-Schulz by what it means: its polynomial on the singular values."""
    a, b, c = COEFFICIENTS
    u, s, vh = torch.linalg.svd(matrix / (matrix.norm() + settings["norm_eps"]), full_matrices=False)
    for _ in range(int(settings["newton_schulz_steps"])):
        s = a * s + b * s**3 + c * s**5
    return u @ torch.diag(s) @ vh


def muon_step(memory: dict[str, Tensor], settings: Settings, grad: Tensor) -> Tensor:
    """What the learning rate is multiplied with, for one matrix (Jordan et al. 2024; Liu et al. 2025, equation 4)."""
    momentum = settings["momentum"]
    memory["B"] = momentum * memory.get("B", torch.zeros_like(grad)) + grad
    update = grad + momentum * memory["B"] if settings["nesterov"] else memory["B"]
    rows, columns = grad.shape
    jordan = max(1.0, rows / columns) ** 0.5
    return polar(update, settings) * (settings["update_rms"] * max(rows, columns) ** 0.5 or jordan)


def adamw_step(memory: dict[str, Tensor], settings: Settings, grad: Tensor, t: int) -> Tensor:
    beta1, beta2 = settings["beta1"], settings["beta2"]
    memory["m"] = beta1 * memory.get("m", torch.zeros_like(grad)) + (1 - beta1) * grad
    memory["v"] = beta2 * memory.get("v", torch.zeros_like(grad)) + (1 - beta2) * grad**2
    return memory["m"] / (1 - beta1**t) / ((memory["v"] / (1 - beta2**t)).sqrt() + settings["eps"])


@cache
def expected(more: tuple[tuple[str, float], ...] = (), steps: int = STEPS) -> Mapping[str, Tensor]:
    """Whole weights after all steps, by the reference."""
    settings = {**defaults("muon"), **dict(more)}
    weights = {spec.name: whole_weight(spec) for spec in SPECS}
    memories: dict[tuple[str, int], dict[str, Tensor]] = {}
    for t in range(1, steps + 1):
        for spec in SPECS:
            lr = rate(t) * lr_scale(spec)
            parts = zip(logical(spec, weights[spec.name]), logical(spec, whole_grad(spec, t)), strict=True)
            for segment, (weight, grad) in enumerate(parts):
                memory = memories.setdefault((spec.name, segment), {})
                is_muons = "layers" in spec.name and grad.dim() == 2
                change = muon_step(memory, settings, grad) if is_muons else adamw_step(memory, settings, grad, t)
                weight -= lr * (change + (0.1 if spec.decay else 0) * weight)
    return weights


def rule_of(share: Share, more: Settings | None = None) -> Muon:
    rule = make_rule("muon", share, {**defaults("muon"), **(more or {})})
    assert isinstance(rule, Muon)
    return rule


def trained_rank(rank: int, layout: Layout, more: Settings, steps: int = STEPS) -> tuple[Held, list[CommRecord], Muon]:
    """A rank's weights after all steps, and the collectives of the steps."""
    log = CommLog()
    share = share_of(rank, layout, log=log)
    rule = rule_of(share, more)
    log.clear()
    for step in range(1, steps + 1):
        rule.update(grads_of(share, step), rate(step), TAKEN)
    return held_by(share, share.weights), list(log), rule


def weights_of_rank(rank: int, layout: Layout, more: Settings, steps: int) -> Held:
    return trained_rank(rank, layout, more, steps)[0]


def assert_same(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> None:
    """To 1e-10, of each number or of 1e-4 of its tensor's RMS where that is more."""
    assert ours.keys() == theirs.keys()
    for name, b in theirs.items():
        floor = 1e-4 * b.square().mean().sqrt()
        worst = ((ours[name] - b).abs() / b.abs().clamp(min=floor)).max()
        assert worst < 1e-10, f"{name}: {worst}"


@pytest.mark.parametrize("layout", LAYOUTS, ids=Layout.describe)
@pytest.mark.parametrize("more", [{}, SMALL], ids=["one round", "many rounds"])
def test_it_is_the_papers_on_every_layout(pool: WorkerPool, layout: Layout, more: Settings) -> None:
    results = pool.run(weights_of_rank, layout.world, layout, more, STEPS)
    assert_same(assembled(results, layout.tp), expected())


@pytest.mark.parametrize(
    "more",
    [{"nesterov": 0.0}, {"update_rms": 0.0}, {"momentum": 0.5, "newton_schulz_steps": 3.0, "norm_eps": 0.1}],
    ids=lambda more: ",".join(more),
)
def test_settings_are_those_of_the_papers(more: Settings) -> None:
    assert_same(assembled([weights_of_rank(0, Layout(), more, STEPS)], 1), expected(tuple(more.items())))


def test_what_is_not_a_hidden_matrix_is_adamws() -> None:
    """To the bit."""
    share, other = share_of(0, Layout()), share_of(0, Layout())
    rule, adamw = rule_of(share), make_rule("adamw", other, defaults("adamw"))
    for step in range(1, 6):
        rule.update(grads_of(share, step), rate(step), TAKEN)
        adamw.update(grads_of(other, step), rate(step), TAKEN)
    same = {spec.name for spec, a, b in zip(share.specs, share.weights, other.weights) if torch.equal(a, b)}
    assert same == set(BY_NAME) - HIDDEN
    assert {"embedding.tokens.weight", "embedding.positions.weight", "head.weight", "final_norm.weight"} <= same
    assert {name.split(".", 2)[2] for name in HIDDEN} == {
        "attention.qkv.weight",
        "attention.out.weight",
        "mlp.gate_up.weight",
        "mlp.down.weight",
    }


@pytest.mark.parametrize(("rms", "adjust"), [(0.2, "match_rms_adamw"), (0.0, "original")])
def test_in_16_bits_it_is_torchs_but_for_rounding(rms: float, adjust: str) -> None:
    whole = replace(only(share_of(0, Layout(), torch.float32), {DOWN}), lr_scale=(1.0,), weight_decay=(0.1,))
    ours = rule_of(whole, {"compute_bits": 16.0, "update_rms": rms})
    theirs = torch.nn.Parameter(whole.weights[0].view(BY_NAME[DOWN].shape).clone())
    before = whole.weights[0].clone()
    torchs = torch.optim.Muon([theirs], lr=1e-2, weight_decay=0.1, momentum=0.95, adjust_lr_fn=adjust)
    for step in range(1, 11):
        grad = torch.randn(theirs.shape, generator=torch.Generator().manual_seed(step))
        theirs.grad = grad
        torchs.step()
        ours.update([grad.reshape(-1).clone()], 1e-2, TAKEN)
    moved, torchs_moved = whole.weights[0] - before, theirs.detach().view(-1) - before
    # bfloat16 has a relative precision of 2^-8, and the iteration enlarges what is small 485 times
    assert (moved - torchs_moved).norm() < 0.05 * torchs_moved.norm()


def totals_of_rank(rank: int, layout: Layout, more: Settings) -> tuple[list[CommRecord], int]:
    """The collectives of a step, and the number of rounds."""
    _, records, rule = trained_rank(rank, layout, more, 1)
    return records, len(rule.whole.rounds)


@pytest.mark.parametrize("layout", LAYOUTS, ids=Layout.describe)
@pytest.mark.parametrize("more", [{}, SMALL], ids=["one round", "many rounds"])
def test_what_travels_follows_a_formula(pool: WorkerPool, layout: Layout, more: Settings) -> None:
    """An all-to-all there and one back, per round and group; each element once there, and back to all its holders."""
    results = pool.run(totals_of_rank, layout.world, layout, more)
    (num_rounds,) = {num for _, num in results}
    assert (num_rounds > 1) == bool(more)
    copies = max(1, layout.tp // 2)  # of the two kv heads
    elements = sum(matrix.numel for matrix in MATRICES)
    held = sum(matrix.numel * (copies if "qkv" in matrix.name and matrix.segment else 1) for matrix in MATRICES)
    axes = [axis for axis, size in (("tp", layout.tp), ("dp_shard", layout.dp_shard)) if size > 1]
    for records, _ in results:
        assert Counter((record.axis, record.operation) for record in records) == {
            (axis, "all_to_all"): 2 * num_rounds for axis in axes
        }
        assert all(record.dtype == torch.float64 for record in records)
        assert not more or all(record.num_elements <= NUM_SMALL for record in records)
    for axis in axes:
        sent = sum(record.num_elements for records, _ in results for record in records if record.axis == axis)
        assert sent == elements + held


def plan_of_rank(rank: int, layout: Layout) -> list[tuple[Task, ...]]:
    share = share_of(rank, layout)
    return plan(part_of(share, hidden_runs(share)), NUM_SMALL, lambda matrix: matrix.numel)


def hidden_runs(share: Share) -> list[int]:
    return [number for number, run in enumerate(share.runs) if run.name in HIDDEN]


def test_each_matrix_is_worked_on_by_one_rank_and_all_know_which(pool: WorkerPool) -> None:
    plans = pool.run(plan_of_rank, 4, Layout(tp=2, dp=2, dp_shard=2))
    assert all(other == plans[0] for other in plans)
    tasks = [task for each in plans[0] for task in each]
    assert sorted(task.matrix for task in tasks) == sorted(MATRICES)
    assert len({task.worker for task in tasks}) == 4


def only(share: Share, names: set[str]) -> Share:
    return part_of(share, [number for number, run in enumerate(share.runs) if run.name in names])


def weights_of_few(rank: int, layout: Layout, names: set[str]) -> Held:
    share = only(share_of(rank, layout), names)
    rule = rule_of(share)
    for step in range(1, 4):
        rule.update(grads_of(share, step), rate(step), TAKEN)
    return held_by(share, share.weights)


@pytest.mark.parametrize("layout", [Layout(tp=4), Layout(tp=2, dp=2, dp_shard=2)], ids=Layout.describe)
@pytest.mark.parametrize("names", [{DOWN}, {"layers.0.mlp.gate_up.weight", "final_norm.weight"}, {"final_norm.weight"}])
def test_matrices_may_be_fewer_than_ranks(pool: WorkerPool, layout: Layout, names: set[str]) -> None:
    for held in pool.run(weights_of_few, layout.world, layout, names):
        assert {run.name for _, run, _ in held} <= names
        for tp, run, weight in held:
            whole = expected(steps=3)[run.name]
            local = local_of(BY_NAME[run.name], whole, tp, layout.tp).reshape(-1)
            torch.testing.assert_close(weight, local[run.start : run.stop], rtol=1e-10, atol=1e-12)


def weights_where_one_has_nothing(rank: int, layout: Layout) -> Held:
    """The second rank of the shards has nothing: all is the first one's."""
    shards = share_of(rank, layout).shards
    share = replace(part_of(share_of(0, Layout()), [] if rank else range(len(SPECS))), shards=shards)
    rule = rule_of(share)
    for step in range(1, 4):
        rule.update(grads_of(share, step), rate(step), TAKEN)
    return held_by(share, share.weights)


def test_a_rank_may_have_nothing_to_hold_and_work_to_do(pool: WorkerPool) -> None:
    held, nothing = pool.run(weights_where_one_has_nothing, 2, Layout(dp=2, dp_shard=2))
    assert not nothing
    assert_same(assembled([held], 1), expected(steps=3))


UNSPLIT = ParamSpec("layers.0.unsplit.weight", (5, 7), is_matmul=True)


def weights_of_unsplit(rank: int, layout: Layout) -> tuple[tuple[Run, ...], Tensor]:
    """A matrix of which all tp ranks have a copy, cut over the shards between two elements of a row."""
    groups = share_of(rank, layout)
    run = (Run(UNSPLIT.name, 0, 17, 0), Run(UNSPLIT.name, 17, 35, 0))[groups.shards.rank]
    whole = torch.arange(35, dtype=torch.float64)
    share = Share(
        (run,), (UNSPLIT,), (whole[run.start : run.stop],), (0.1,), (1.0,), groups.tp, groups.shards, whole.dtype, CPU
    )
    rule_of(share).update([whole.square()[run.start : run.stop]], 0.1, TAKEN)
    return share.runs, share.weights[0]


def test_copies_of_what_tp_does_not_split_stay_equal(pool: WorkerPool) -> None:
    results = pool.run(weights_of_unsplit, 4, Layout(tp=2, dp=2, dp_shard=2))
    whole = torch.arange(35, dtype=torch.float64).view(5, 7)
    wanted = whole - 0.1 * (muon_step({}, defaults("muon"), whole.square()) + 0.1 * whole)
    for (run,), weight in results:
        torch.testing.assert_close(weight, wanted.view(-1)[run.start : run.stop], rtol=1e-12, atol=1e-12)
    for (first, one), (second, other) in zip(results, results[1:]):
        assert first != second or torch.equal(one, other)


def bits(rule: Muon) -> list[Tensor]:
    """Everything that a step may change."""
    tensors = [*rule.share.weights, *(tensor for part in rule.state().values() for tensor in part)]
    return [rule.clock.clone(), *(tensor.clone().view(torch.uint8) for tensor in tensors)]


def bits_of_rank(rank: int, layout: Layout, dtype: torch.dtype, steps: int) -> tuple[bool, bool, bool]:
    """Whether a skipped step left all as it was, the next one did not, and all is finite."""
    share = share_of(rank, layout, dtype)
    rule = rule_of(share)
    for step in range(1, steps + 1):
        rule.update(grads_of(share, step), 1e-2, TAKEN)
    for tensor in (*share.weights, *(tensor for tensor in rule.state()["momentum"] if tensor.numel())):
        tensor[0] = -0.0  # adding 0 would flip its sign
    before = bits(rule)
    rule.update([torch.zeros_like(weight) for weight in share.weights], 1e-2, SKIPPED)
    stayed = all(map(torch.equal, bits(rule), before))
    rule.update(grads_of(share, 4), 1e-2, TAKEN)
    finite = all(weight.isfinite().all() for weight in share.weights)
    return stayed, not all(map(torch.equal, bits(rule), before)), finite


@pytest.mark.parametrize("layout", [Layout(), Layout(tp=2)], ids=Layout.describe)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("steps", [0, 3])
def test_a_skipped_step_changes_not_a_bit(pool: WorkerPool, layout: Layout, dtype: torch.dtype, steps: int) -> None:
    assert pool.run(bits_of_rank, layout.world, layout, dtype, steps) == [(True, True, True)] * layout.world


@pytest.mark.parametrize(("layout", "bits"), [(layout, bits) for layout in LAYOUTS[1:] for bits in (16, 32)], ids=str)
def test_single_and_half_precision_do_not_depend_on_the_layout_either(
    pool: WorkerPool, layout: Layout, bits: int
) -> None:
    """To the bit: a matrix is assembled before anything is summed."""
    more = {"compute_bits": float(bits)}
    alone = assembled([single_of_rank(0, Layout(), more)], 1)
    whole = assembled(pool.run(single_of_rank, layout.world, layout, more), layout.tp)
    assert all(torch.equal(whole[name], alone[name]) for name in alone)


def single_of_rank(rank: int, layout: Layout, more: Settings) -> Held:
    torch.set_num_threads(1)
    share = share_of(rank, layout, torch.float32)
    rule = rule_of(share, more)
    for step in range(1, 6):
        rule.update(grads_of(share, step), rate(step), TAKEN)
    return held_by(share, share.weights)


def test_it_goes_on_from_its_state() -> None:
    first, second = (rule_of(share_of(0, Layout())) for _ in range(2))
    for step in range(1, 6):
        first.update(grads_of(first.share, step), rate(step), TAKEN)
    second.clock.copy_(first.clock)
    for ours, theirs in zip(second.share.weights, first.share.weights, strict=True):
        ours.copy_(theirs)
    for part, tensors in second.state().items():
        assert len(tensors) == len(SPECS)
        for ours, theirs in zip(tensors, first.state()[part], strict=True):
            ours.copy_(theirs)
    for rule in (first, second):
        rule.update(grads_of(rule.share, 6), rate(6), TAKEN)
    assert all(map(torch.equal, bits(first), bits(second)))


def test_an_update_has_the_size_of_adamws() -> None:
    """About 0.2 (Liu et al. 2025, section 2.2), whatever the shape: of full rank, its singular values are about 1."""
    for rows, columns in ((64, 64), (96, 32), (32, 96)):
        grad = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows), dtype=torch.float64)
        update = muon_step({}, defaults("muon"), grad)
        assert 0.15 < update.square().mean().sqrt() < 0.25


@pytest.mark.parametrize("given", [8.0, 64.0])
def test_bits_that_are_not_offered_are_refused(given: float) -> None:
    with pytest.raises(ValueError, match=r"compute_bits=\d+.*16 \(bfloat16\), 32, or 0"):
        rule_of(share_of(0, Layout()), {"compute_bits": given})
