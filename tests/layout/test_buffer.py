"""Slots and buckets of a flat buffer."""

import math

from hypothesis import given
from hypothesis import strategies as st

from megacore.layout import BufferLayout
from megacore.layout.buffer import ALIGNMENT, groups_of_size
from megacore.layout.shards import piece_of, runs_of

shapes = st.lists(st.lists(st.integers(0, 40), max_size=3), max_size=12)


def layout_of(shapes: list[list[int]]) -> BufferLayout:
    return BufferLayout.of((f"p{i}", shape) for i, shape in enumerate(shapes))


@given(shapes)
def test_slots_are_aligned_in_order_and_apart(shapes: list[list[int]]) -> None:
    layout = layout_of(shapes)
    assert [(slot.name, list(slot.shape)) for slot in layout.slots] == [(f"p{i}", s) for i, s in enumerate(shapes)]
    end = 0
    for slot in layout.slots:
        product = 1
        for length in slot.shape:
            product *= length
        assert slot.numel == product
        assert slot.offset % ALIGNMENT == 0
        assert end <= slot.offset < end + ALIGNMENT  # no gap larger than alignment asks for
        end = slot.offset + slot.numel
    assert end <= layout.size < end + ALIGNMENT
    assert layout.size % ALIGNMENT == 0


@given(shapes, st.integers(1, 5000), st.integers(1, 5))
def test_buckets_hold_whole_groups_and_cut_evenly(shapes: list[list[int]], num_elements: int, num_shards: int) -> None:
    named = [(f"p{i}", shape) for i, shape in enumerate(shapes)]
    groups = groups_of_size(named, num_elements)
    assert [pair for group in groups for pair in group] == named
    sizes = [sum(math.prod(shape) for _, shape in group) for group in groups]
    assert all(size >= num_elements for size in sizes[1:]), "only the group with the first layers may be small"
    for group, size in zip(groups[1:], sizes[1:]):
        assert size - math.prod(group[0][1]) < num_elements, "without its first parameter it would not have been full"
    layout = BufferLayout.in_buckets(groups, num_shards)
    assert [slot.name for slot in layout.slots] == [name for name, _ in named]
    borders = [0, *(end for _, end in layout.buckets)]
    assert [start for start, _ in layout.buckets] == borders[:-1]
    assert borders[-1] == layout.size
    for start, end in layout.buckets:
        assert (end - start) % (num_shards * ALIGNMENT) == 0
    for slot in layout.slots:
        assert any(start <= slot.offset and slot.offset + slot.numel <= end for start, end in layout.buckets) or not (
            slot.numel
        )


@given(shapes, st.integers(1, 400), st.integers(1, 5))
def test_runs_cover_every_element_once(shapes: list[list[int]], num_elements: int, num_shards: int) -> None:
    named = [(f"p{i}", shape) for i, shape in enumerate(shapes)]
    layout = BufferLayout.in_buckets(groups_of_size(named, num_elements), num_shards)
    seen: dict[str, list[int]] = {name: [] for name, _ in named}
    for shard in range(num_shards):
        place = {slot.name: slot.offset for slot in layout.slots}
        pieces = [piece_of(bucket, shard, num_shards) for bucket in layout.buckets]
        buffer_of_shard = [element for start, end in pieces for element in range(start, end)]
        assert len(buffer_of_shard) == layout.size // num_shards
        for run in runs_of(layout, shard, num_shards):
            assert run.numel > 0
            seen[run.name] += range(run.start, run.stop)
            inside = buffer_of_shard[run.offset : run.offset + run.numel]
            assert inside == list(range(place[run.name] + run.start, place[run.name] + run.stop))
    for slot in layout.slots:
        assert sorted(seen[slot.name]) == list(range(slot.numel))


def test_a_layout_written_out() -> None:
    layout = layout_of([[3], [8, 16], [64]])
    assert [slot.offset for slot in layout.slots] == [0, 64, 192]
    assert layout.size == 256
