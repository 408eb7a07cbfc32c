"""Matrices are dealt out evenly, each once, in rounds that fit."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from megacore.optim.deal import Piece, Place, Task, deal, in_rounds
from megacore.spec.matrices import Matrix, Rectangle

PLACES = [Place(shard, tp) for shard in range(3) for tp in range(2)]


def matrix_of(number: int, rows: int, columns: int) -> Matrix:
    return Matrix(f"layers.{number}.weight", 0, rows, columns, 1, False)


def piece_of(matrix: Matrix, place: Place, row: int = 0) -> Piece:
    """A row of the matrix."""
    return Piece(place, 0, Rectangle(matrix, row, 0, 1, matrix.columns, 0, matrix.columns, True))


@st.composite
def cut_matrices(draw: st.DrawFn) -> dict[Matrix, list[Piece]]:
    sizes = draw(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), max_size=30))
    found = {}
    for number, (rows, columns) in enumerate(sizes):
        matrix = matrix_of(number, rows, columns)
        found[matrix] = [piece_of(matrix, draw(st.sampled_from(PLACES)), row) for row in range(rows)]
    return found


@given(pieces=cut_matrices())
def test_no_rank_has_much_more_to_do_than_another(pieces: dict[Matrix, list[Piece]]) -> None:
    tasks = list(deal(pieces, PLACES, lambda matrix: matrix.numel))
    assert {task.matrix: list(task.pieces) for task in tasks} == pieces
    costs = [task.matrix.numel for task in tasks]
    assert costs == sorted(costs, reverse=True)
    loads = Counter(dict.fromkeys(PLACES, 0))
    for task in tasks:
        loads[task.worker] += task.matrix.numel
    mean = sum(costs) / len(PLACES)
    # the last task of the busiest rank went there when no other had less to do
    assert max(loads.values()) <= mean + max(costs, default=0) * (1 - 1 / len(PLACES))
    # no plan does without the costliest, or without two of the costliest that are more than ranks
    best = max(mean, max(costs, default=0), sum(costs[len(PLACES) - 1 : len(PLACES) + 1]) if len(costs) > 6 else 0)
    assert max(loads.values()) <= 4 / 3 * best or max(loads.values()) <= mean + min(costs)


def test_of_idle_ranks_the_one_that_holds_most_works() -> None:
    matrix = matrix_of(0, 3, 4)
    pieces = {matrix: [piece_of(matrix, PLACES[1], 0), piece_of(matrix, PLACES[4], 1), piece_of(matrix, PLACES[4], 2)]}
    (task,) = deal(pieces, PLACES, lambda _: 1)
    assert task.worker == PLACES[4]


@given(pieces=cut_matrices(), limit=st.integers(1, 100))
def test_rounds_are_all_tasks_in_order_and_fit(pieces: dict[Matrix, list[Piece]], limit: int) -> None:
    tasks = list(deal(pieces, PLACES, lambda matrix: matrix.numel))
    rounds = list(in_rounds(tasks, limit))
    assert [task for each in rounds for task in each] == tasks
    for each in rounds:
        assert each
        alone = [buffers((task,)) for task in each]
        for buffer, size in buffers(each).items():
            assert size <= limit or size == max(own[buffer] for own in alone)
    for each, following in zip(rounds, rounds[1:]):
        own, more = buffers(each), buffers((following[0],))
        assert any(own[buffer] and own[buffer] + more[buffer] > limit for buffer in more)  # no round ends early


def buffers(tasks: tuple[Task, ...]) -> Counter[tuple[str, int, int]]:
    """Elements that each rank sends at first, has between the hops, and receives at last, on the way there."""
    sizes: Counter[tuple[str, int, int]] = Counter()
    for task in tasks:
        for piece in task.pieces:
            sizes["first", *piece.place] += piece.numel
            sizes["between", task.worker.shard, piece.place.tp] += piece.numel
            sizes["between back", piece.place.shard, task.worker.tp] += piece.numel
            sizes["last", *task.worker] += piece.numel
    return sizes
