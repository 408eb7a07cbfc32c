"""Pieces of a dim: together they are the dim, once."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megacore.layout import Piece, Segment, Split, balanced


@given(st.integers(0, 200), st.integers(1, 17))
def test_shares_are_even_and_leave_nothing_out(total: int, num: int) -> None:
    shares = [balanced(total, num, index) for index in range(num)]
    assert [start for start, _ in shares] == [sum(size for _, size in shares[:i]) for i in range(num)]
    sizes = [size for _, size in shares]
    assert sum(sizes) == total
    assert sizes == sorted(sizes, reverse=True)
    assert max(sizes) - min(sizes) <= 1


@st.composite
def splits(draw: st.DrawFn) -> tuple[Split, int]:
    """A split of up to three segments, and a number of members that each can be dealt or copied to."""
    num = draw(st.integers(1, 8))
    divisors = [n for n in range(1, num + 1) if num % n == 0]
    segments = []
    for _ in range(draw(st.integers(1, 3))):
        unit, replicate = draw(st.integers(1, 4)), draw(st.booleans())
        units = draw(st.sampled_from(divisors) if replicate else st.integers(0, 20))
        segments.append(Segment(units * unit, unit, replicate))
    return Split(0, "tp", tuple(segments)), num


@given(splits())
def test_pieces_tile_the_dim_counting_each_copy_as_its_share(case: tuple[Split, int]) -> None:
    split, num = case
    members = [split.pieces(index, num) for index in range(num)]
    holders: list[list[Piece]] = [[] for _ in range(split.size)]
    for pieces in members:
        for piece in pieces:
            for row in range(piece.start, piece.start + piece.size):
                holders[row].append(piece)
    for pieces in holders:
        assert len(pieces) == pieces[0].copies
        assert [piece.copy for piece in pieces] == list(range(len(pieces)))  # neighbours, numbered in order
    owned = sum(piece.size for pieces in members for piece in pieces if piece.copy == 0)
    assert owned == split.size


@given(splits())
def test_local_pieces_lie_one_behind_the_other(case: tuple[Split, int]) -> None:
    split, num = case
    for index in range(num):
        pieces = split.pieces(index, num)
        assert [piece.local for piece in pieces] == [sum(p.size for p in pieces[:i]) for i in range(len(pieces))]
        assert split.local_size(index, num) == sum(piece.size for piece in pieces)
        assert all(piece.size for piece in pieces)


@given(splits())
def test_units_are_never_cut(case: tuple[Split, int]) -> None:
    split, num = case
    begins = [sum(s.size for s in split.segments[:i]) for i in range(len(split.segments))]
    for index in range(num):
        for piece in split.pieces(index, num):
            begin, segment = next((b, s) for b, s in zip(begins, split.segments) if b <= piece.start < b + s.size)
            assert (piece.start - begin) % segment.unit == 0
            assert piece.size % segment.unit == 0


def test_a_ragged_vocabulary() -> None:
    vocabulary = Split(0, "tp", (Segment(1003),))
    assert [vocabulary.pieces(index, 4)[0] for index in range(4)] == [
        Piece(0, 251, 0),
        Piece(251, 251, 0),
        Piece(502, 251, 0),
        Piece(753, 250, 0),
    ]
    assert Split(0, "tp", (Segment(3),)).pieces(3, 4) == ()


def test_fused_qkv_with_fewer_kv_heads_than_ranks() -> None:
    d = 8
    qkv = Split(0, "tp", (Segment(8 * d, d), Segment(2 * d, d, replicate=True), Segment(2 * d, d, replicate=True)))
    assert qkv.pieces(1, 4) == (
        Piece(2 * d, 2 * d, 0),
        Piece(8 * d, d, 2 * d, copy=1, copies=2),
        Piece(10 * d, d, 3 * d, copy=1, copies=2),
    )
    assert qkv.pieces(2, 4)[1:] == (
        Piece(9 * d, d, 2 * d, copy=0, copies=2),
        Piece(11 * d, d, 3 * d, copy=0, copies=2),
    )


def test_heads_that_can_be_neither_split_nor_copied_are_refused() -> None:
    with pytest.raises(ValueError, match="3 units can be neither split nor copied evenly over 4 ranks"):
        Split(0, "tp", (Segment(3, replicate=True),)).pieces(0, 4)
