"""Arithmetic of slices, and numbers in two halves."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from megacore.checkpoint.formats import DTYPES, NAMES
from megacore.checkpoint.manifest import ITEM_BYTES
from megacore.checkpoint.parts import Part, overlap
from megacore.checkpoint.write import slices_of
from megacore.kernels.halves import join, split

SHAPES = st.lists(st.integers(1, 7), max_size=3).map(tuple)


@st.composite
def regions(draw: st.DrawFn, shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    start = tuple(draw(st.integers(0, length - 1)) for length in shape)
    return start, tuple(draw(st.integers(1, length - first)) for first, length in zip(start, shape))


def painted(shape: tuple[int, ...], region: tuple[tuple[int, ...], tuple[int, ...]] | None) -> torch.Tensor:
    """Ones where a region is."""
    out = torch.zeros(shape)
    if region is not None:
        out[tuple(slice(first, first + count) for first, count in zip(*region))] = 1
    return out


@given(st.data())
def test_overlap_is_what_both_have(data: st.DataObject) -> None:
    shape = data.draw(SHAPES)
    one, other = data.draw(regions(shape)), data.draw(regions(shape))
    assert painted(shape, overlap(one, other)).equal(painted(shape, one) * painted(shape, other))


@given(st.data())
def test_slices_tile_a_part(data: st.DataObject) -> None:
    shape = data.draw(SHAPES)
    start, size = data.draw(regions(shape))
    values = torch.arange(float(torch.Size(size).numel())).view(size)
    halved = data.draw(st.booleans())
    upper, lower = split(values) if halved else (values, None)
    part = Part("a", shape, start, size, upper, lower)
    most = data.draw(st.integers(1, 200))
    whole, covered = torch.full(shape, -1.0), torch.zeros(shape)
    slices = list(part.in_slices(most))
    for each in slices:
        place = tuple(slice(first, first + count) for first, count in zip(each.start, each.size))
        whole[place] = each.values()
        covered[place] += 1
        assert each.num_bytes <= most or each.size[:1] in ((), (1,)), "a row is not cut"
    assert covered.equal(painted(shape, (start, size)))
    assert whole[tuple(slice(first, first + count) for first, count in zip(start, size))].equal(values)


@given(SHAPES, st.integers(1, 200))
def test_planned_slices_tile_a_tensor(shape: tuple[int, ...], most: int) -> None:
    covered = torch.zeros(shape)
    for each in slices_of("a", shape, torch.float32, most):
        covered += painted(shape, (each.start, each.size))
    assert covered.equal(torch.ones(shape))


@given(st.data())
def test_a_fill_changes_its_place_alone(data: st.DataObject) -> None:
    shape = data.draw(SHAPES)
    start, size = data.draw(regions(shape))
    before = torch.rand(size)
    inner = data.draw(regions(size))
    values = torch.rand(inner[1]).to(data.draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16])))
    upper, lower = split(before) if data.draw(st.booleans()) else (before.clone(), None)
    part = Part("a", shape, start, size, upper, lower)
    part.fill(tuple(own + at for own, at in zip(start, inner[0])), values)
    expected = before.clone()
    expected[tuple(slice(first, first + count) for first, count in zip(*inner))] = values.to(torch.float32)
    assert part.values().equal(expected)
    if lower is not None:
        assert join(upper, lower).equal(expected)


def test_formats_have_one_size() -> None:
    assert {name: dtype.itemsize for name, dtype in DTYPES.items()} == dict(ITEM_BYTES)
    assert len(NAMES) == len(DTYPES)
