"""The split of layers into stages, against every split that there is."""

from fractions import Fraction
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megacore.layout import balanced, stages_of_layers

costs = st.integers(0, 40).map(lambda quarters: quarters / 4)


def counts_of(*args: object, **more: object) -> list[int]:
    return [len(layers) for layers in stages_of_layers(*args, **more)]  # type: ignore[arg-type]


def every_split(num_layers: int, num_stages: int) -> list[tuple[int, ...]]:
    """All counts in which each stage holds the embedding, a layer or the head."""
    if num_stages == 1:
        return [(num_layers,)]
    least = (0, *[1] * (num_stages - 2), 0)
    counts = product(*(range(low, num_layers + 1) for low in least))
    return [each for each in counts if sum(each) == num_layers]


@given(st.integers(1, 6), st.integers(1, 6), costs, costs)
def test_the_balanced_split_is_the_best_of_all(num_layers: int, num_stages: int, embedding: float, head: float) -> None:
    num_stages = min(num_stages, num_layers + 2)

    def badness(counts: tuple[int, ...]) -> tuple[Fraction, Fraction, tuple[int, ...]]:
        loads = [Fraction(count) for count in counts]
        loads[0] += Fraction(embedding)
        loads[-1] += Fraction(head)
        return max(loads), sum(load**2 for load in loads), tuple(-count for count in counts)  # type: ignore[return-value]

    best = min(every_split(num_layers, num_stages), key=badness)
    assert counts_of(num_layers, num_stages, embedding=embedding, head=head) == list(best)


@given(st.integers(1, 200), st.integers(1, 64))
def test_free_ends_give_the_even_split(num_layers: int, num_stages: int) -> None:
    num_stages = min(num_stages, num_layers)
    shares = [balanced(num_layers, num_stages, stage)[1] for stage in range(num_stages)]
    assert counts_of(num_layers, num_stages) == shares


@given(st.integers(1, 50), st.integers(1, 52), costs, costs)
def test_stages_follow_each_other_and_hold_every_layer(
    num_layers: int, num_stages: int, embedding: float, head: float
) -> None:
    stages = stages_of_layers(num_layers, min(num_stages, num_layers + 2), (), embedding, head)
    assert [layer for layers in stages for layer in layers] == list(range(num_layers))
    assert all(stages[1:-1])


def test_a_heavy_head_takes_layers_from_its_stage() -> None:
    assert counts_of(32, 4, head=3.2) == [9, 9, 9, 5]
    assert counts_of(4, 4, head=4.0) == [2, 1, 1, 0]


def test_as_many_stages_as_units() -> None:
    assert counts_of(3, 5) == [0, 1, 1, 1, 0]
    with pytest.raises(ValueError, match="6 stages.*model.num_layers=3.*at most 5"):
        stages_of_layers(3, 6)


def test_given_counts_are_taken() -> None:
    assert stages_of_layers(5, 3, (0, 4, 1)) == (range(0), range(4), range(4, 5))
    assert stages_of_layers(5, 1, (5,)) == (range(5),)


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ((4, 1), r"stage_layers=\[4, 1\] has 2 counts that sum to 5; it must have 3 .* sum to model.num_layers=5"),
        ((4, 1, 1), "has 3 counts that sum to 6"),
        ((4, 0, 1), "leaves a stage empty"),
        ((7, -1, -1), "leaves a stage empty"),
        ((-1, 5, 1), "leaves a stage empty"),
    ],
)
def test_counts_that_do_not_fit_are_refused(counts: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        stages_of_layers(5, 3, counts)
