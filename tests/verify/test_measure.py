"""What all ranks' findings say together."""

import math

import pytest
import torch

from megacore.config.load import load
from megacore.config.resolve import resolve
from megacore.spec import ModelSpec
from megacore.verify.measure import BOUND, WHAT, Bound, Comparison, Finding, Yardstick
from tests.engine.common import BASE

SPEC = ModelSpec.of(resolve(load(None, list(BASE)), 1).model)


def found(rank: int, num: int, worst: float = 0.0, squares: float = 0.0) -> list[Finding]:
    """A rank of tp that holds what it should."""
    return [
        Finding(what, param.name, piece.start, piece.size, "same", worst, squares)
        for what in WHAT
        for param in SPEC.params
        for piece in param.pieces(rank, num)
    ]


def test_pieces_make_up_every_parameter() -> None:
    whole = Comparison.of(SPEC, found(0, 2) + found(1, 2))
    assert not whole.problems and set(whole.worst.values()) == {0.0}
    half = Comparison.of(SPEC, found(0, 2))
    assert "head.weight: the pieces that ranks hold do not make up the gradient" in half.problems
    assert not any("final_norm" in line for line in half.problems), "all ranks hold all of it"
    nothing = Comparison.of(SPEC, [])
    assert len(nothing.problems) == 2 * len(SPEC.params) and set(nothing.worst.values()) == {math.inf}


def test_copies_that_differ_are_told_once_per_parameter() -> None:
    drifted = [one._replace(digest="other") if one.name == "final_norm.weight" else one for one in found(1, 2)]
    told = Comparison.of(SPEC, found(0, 2) + drifted).problems
    assert told == tuple(
        f"final_norm.weight: ranks hold copies of the {what} that differ in their bits" for what in WHAT
    )


def test_distances_count_each_piece_once() -> None:
    both = Comparison.of(SPEC, found(0, 2, squares=2.0) + found(1, 2, squares=2.0))
    assert both.distance["gradient", "head.weight"] == pytest.approx(2.0)
    assert both.distance["gradient", "final_norm.weight"] == pytest.approx(math.sqrt(2))


def yardstick(loss: float = 4.0) -> Yardstick:
    ones = {param.name: torch.ones(param.shape, dtype=torch.float64) for param in SPEC.params}
    return Yardstick(loss, 2.0, dict.fromkeys(WHAT, 1e-4), dict.fromkeys(WHAT, ones))


def test_in_float64_the_worst_element_counts() -> None:
    bound = Bound(yardstick())
    assert set(bound.excess(Comparison.of(SPEC, found(0, 1, worst=3 * BOUND))).values()) == {3.0}
    assert set(bound.excess(Comparison.of(SPEC, found(0, 1, worst=math.nan))).values()) == {math.inf}
    assert not list(bound.scalar_problems(4.0, 2.0 * (1 + 0.9 * BOUND)))
    assert "loss" in next(bound.scalar_problems(4.0 * (1 + 2 * BOUND), 2.0))
    assert len(list(bound.scalar_problems(math.nan, math.inf))) == 2


def test_as_run_twice_ones_own_error_is_allowed() -> None:
    own = Comparison.of(SPEC, found(0, 1, squares=1.0))
    bound = Bound(yardstick(), eps=1e-6, own=own, own_loss=4.1, own_grad_norm=2.0)
    assert set(bound.excess(Comparison.of(SPEC, found(0, 1, squares=4.0))).values()) == {1.0}
    assert not list(bound.scalar_problems(3.81, 2.0))
    assert len(list(bound.scalar_problems(3.79, 2.001))) == 2
    by_luck = Bound(yardstick(), eps=1e-6, own=Comparison.of(SPEC, found(0, 1)))
    excess = by_luck.excess(Comparison.of(SPEC, found(0, 1, squares=(4e-6) ** 2 * 24)))
    assert excess["gradient", "final_norm.weight"] == pytest.approx(1.0)
