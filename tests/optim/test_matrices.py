"""Runs are tiled by rectangles of logical matrices, and statistics count each element of the model once."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from megacore.layout import Layout, Segment, Split
from megacore.layout.shards import Run
from megacore.mesh.group import CommLog
from megacore.optim.matrices import Matrices, view_of
from megacore.optim.rule import Share
from megacore.spec import ParamSpec
from megacore.spec.matrices import matrices_of, rectangles_of
from tests.optim.odd_cuts import BY_NAME, LAYOUTS, SPECS, grads_of, local_of, logical, share_of, whole_grad
from tests.pool import WorkerPool


@st.composite
def specs(draw: st.DrawFn) -> ParamSpec:
    num_dims = draw(st.integers(1, 2))
    shape = [draw(st.integers(1, 7)) for _ in range(num_dims)]
    dim = draw(st.sampled_from([None, *range(num_dims)]))
    if dim is None:
        return ParamSpec("some", tuple(shape))
    segments = [
        Segment(unit * draw(st.integers(1, 4)), unit, draw(st.booleans()))
        for unit in draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))
    ]
    shape[dim] = sum(segment.size for segment in segments)
    return ParamSpec("some", tuple(shape), Split(dim, "tp", tuple(segments)))


@given(spec=specs(), tp=st.sampled_from([1, 2, 3, 4, 6, 12]), cuts=st.lists(st.integers(0, 90), max_size=4))
def test_every_element_is_in_one_rectangle_of_its_run_and_owned_once(spec: ParamSpec, tp: int, cuts: list[int]) -> None:
    replicated = [segment.size // segment.unit for segment in (spec.split.segments if spec.split else ())]
    if any(tp % units for units in replicated if units < tp):
        return  # such a split is refused elsewhere
    whole = torch.arange(spec.numel).view(spec.shape)
    parts = dict(zip(matrices_of(spec), logical(spec, whole), strict=True))
    owned = torch.zeros(spec.numel, dtype=torch.long)
    for index in range(tp):
        flat = local_of(spec, whole, index, tp).reshape(-1)
        bounds = sorted({0, flat.numel(), *(min(place, flat.numel()) for place in cuts)})
        for start, stop in zip(bounds, bounds[1:]):
            tensor, seen = flat[start:stop].clone(), torch.zeros(stop - start, dtype=torch.long)
            for rectangle in rectangles_of(spec, Run("some", start, stop, 0), index, tp):
                matrix = parts[rectangle.matrix].reshape(rectangle.matrix.rows, rectangle.matrix.columns)
                expected = matrix.narrow(0, rectangle.row, rectangle.height)
                expected = expected.narrow(1, rectangle.column, rectangle.width)
                assert torch.equal(view_of(rectangle, tensor), expected), rectangle
                view_of(rectangle, seen).add_(1)
                if rectangle.owned:
                    owned[expected.reshape(-1)] += 1
            assert (seen == 1).all()
    assert (owned == 1).all()


def test_matrices_are_those_of_the_model() -> None:
    described = {
        name: [(m.rows, m.columns, m.unit, m.is_vector) for m in matrices_of(BY_NAME[name])]
        for name in (
            "embedding.tokens.weight",
            "layers.0.attention.qkv.weight",
            "layers.0.attention.qkv.bias",
            "layers.0.attention.out.weight",
            "layers.0.mlp.gate_up.weight",
            "final_norm.weight",
        )
    }
    assert described == {
        "embedding.tokens.weight": [(11, 12, 1, False)],
        "layers.0.attention.qkv.weight": [(12, 12, 3, False), (6, 12, 3, False), (6, 12, 3, False)],
        "layers.0.attention.qkv.bias": [(12, 1, 3, True), (6, 1, 3, True), (6, 1, 3, True)],
        "layers.0.attention.out.weight": [(12, 12, 3, False)],
        "layers.0.mlp.gate_up.weight": [(9, 12, 1, False), (9, 12, 1, False)],
        "final_norm.weight": [(12, 1, 1, True)],
    }


def test_a_parameter_of_three_dims_is_refused() -> None:
    with pytest.raises(AssertionError, match="neither a vector nor a matrix"):
        matrices_of(ParamSpec("experts", (2, 3, 4)))


Statistics = tuple[Tensor, ...]


def statistics_of_rank(rank: int, layout: Layout) -> tuple[list[str], Statistics, int]:
    """Names of the matrices, (margins, rows, sums, maxima), and how many collectives it took."""
    log = CommLog()
    share = share_of(rank, layout, log=log)
    matrices = Matrices(share)
    grads = [grad.square() for grad in grads_of(share, 1)]
    log.clear()
    sums = matrices.reduce(matrices.margins(grads), matrices.row_sums(grads), matrices.sums(iter(grads)))
    (maxima,) = matrices.reduce(matrices.margins(grads, "max"), op="max")
    assert {record.operation for record in log} <= {"all_reduce"}
    return [f"{m.name}/{m.segment}" for m in matrices.matrices], (*sums, maxima), len(log)


def direct(fold: Callable[[Tensor, int], Tensor]) -> tuple[Tensor, Tensor]:
    """(rows, columns) of all logical matrices, in order of names."""
    names = sorted(spec.name for spec in SPECS)
    wholes = [part for name in names for part in logical(BY_NAME[name], whole_grad(BY_NAME[name], 1).square())]
    parts = [part.reshape(part.shape[0], -1) for part in wholes]
    return torch.cat([fold(part, 1) for part in parts]), torch.cat([fold(part, 0) for part in parts])


@pytest.mark.parametrize("layout", LAYOUTS, ids=Layout.describe)
def test_statistics_are_those_of_the_whole_matrices_on_every_rank(pool: WorkerPool, layout: Layout) -> None:
    results = pool.run(statistics_of_rank, layout.world, layout)
    rows, columns = direct(lambda part, dim: part.sum(dim))
    high_rows, high_columns = direct(lambda part, dim: part.amax(dim))
    names, (margins, row_sums, sums, maxima), _ = results[0]
    torch.testing.assert_close(margins, torch.cat([rows, columns]), rtol=1e-13, atol=0)
    torch.testing.assert_close(row_sums, rows, rtol=1e-13, atol=0)
    assert torch.equal(maxima, torch.cat([high_rows, high_columns]))
    ordered = sorted(SPECS, key=lambda spec: spec.name)
    wholes = [part.sum() for spec in ordered for part in logical(spec, whole_grad(spec, 1).square())]
    torch.testing.assert_close(sums, torch.stack(wholes), rtol=1e-13, atol=0)
    assert len(names) == len(sums)
    num_groups = (layout.tp > 1) + (layout.dp_shard > 1)
    for other_names, other, num_collectives in results:
        assert other_names == names
        assert all(map(torch.equal, other, results[0][1]))  # to the bit: copies of weights must not drift apart
        assert num_collectives == 2 * num_groups  # one of sums and one of maxima


def test_views_of_margins_belong_to_their_matrices() -> None:
    matrices = Matrices(share_of(0, Layout()))
    rows, columns = matrices.rows_by_matrix(matrices.lengths), matrices.columns_by_matrix(matrices.lengths)
    for matrix, row, column, numel in zip(matrices.matrices, rows, columns, matrices.numels, strict=True):
        assert row.tolist() == [matrix.columns] * matrix.rows
        assert column.tolist() == [matrix.rows] * matrix.columns
        assert numel == matrix.numel
    for rectangles in matrices.rectangles:
        for rectangle in rectangles:
            assert (matrices.lengths[matrices.rows(rectangle)] == rectangle.matrix.columns).all()
            assert (matrices.lengths[matrices.columns(rectangle)] == rectangle.matrix.rows).all()


@pytest.mark.parametrize(("dtype", "expected"), [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)])
def test_statistics_are_in_float32_at_least(dtype: torch.dtype, expected: torch.dtype) -> None:
    matrices = Matrices(share_of(0, Layout(), dtype))
    assert {matrices.dtype, matrices.lengths.dtype, matrices.numels.dtype, matrices.zeros(3).dtype} == {expected}


def of_rank_without_runs(rank: int, layout: Layout) -> tuple[int, float]:
    """The second rank of the shards has nothing: all is the first one's."""
    share = share_of(rank, layout)
    alone = share_of(0, Layout())
    empty = Share((), (), (), (), (), alone.tp, alone.shards, alone.dtype, alone.device)
    share = replace(alone if rank == 0 else empty, shards=share.shards)
    matrices = Matrices(share)
    (sums,) = matrices.reduce(matrices.sums(grads_of(share, 1)))
    return len(share.runs), sums.sum().item()


def test_a_rank_may_have_nothing(pool: WorkerPool) -> None:
    (all_runs, first), (no_runs, second) = pool.run(of_rank_without_runs, 2, Layout(dp=2, dp_shard=2))
    assert (all_runs, no_runs) == (len(SPECS), 0)
    assert first == second
    assert first == pytest.approx(sum(whole_grad(spec, 1).sum().item() for spec in SPECS))
