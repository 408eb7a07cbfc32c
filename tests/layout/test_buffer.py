"""Slots and buckets of a flat buffer."""

from hypothesis import given
from hypothesis import strategies as st

from megacore.layout import BufferLayout
from megacore.layout.buffer import ALIGNMENT, buckets

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


@given(shapes, st.integers(1, 5000))
def test_buckets_cut_the_buffer_at_slots_from_the_end(shapes: list[list[int]], num_elements: int) -> None:
    layout = layout_of(shapes)
    runs = buckets(layout.slots, num_elements)
    borders = {slot.offset for slot in layout.slots} | {layout.size}
    assert [end for _, end in runs] == [layout.size, *(start for start, _ in runs[:-1])][: len(runs)]
    assert (runs[-1][0] == 0) if runs else layout.size == 0
    for start, end in runs:
        assert start < end
        assert start in borders
        second = min(border for border in borders if border > start)
        assert end - second < num_elements  # without its first slot it would not have been full
    for start, end in runs[:-1]:  # the one with the first layers may be small
        assert end - start >= num_elements


def test_a_layout_written_out() -> None:
    layout = layout_of([[3], [8, 16], [64]])
    assert [slot.offset for slot in layout.slots] == [0, 64, 192]
    assert layout.size == 256
    assert buckets(layout.slots, 60) == ((192, 256), (64, 192), (0, 64))
    assert buckets(layout.slots, 100) == ((64, 256), (0, 64))
    assert buckets(layout.slots, 10**9) == ((0, 256),)
    assert buckets(layout.slots[1:], 60) == ((192, 256), (64, 192))
    assert buckets(layout.slots[:2], 10**9) == ((0, 192),)
