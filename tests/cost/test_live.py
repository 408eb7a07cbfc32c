"""What ranks keep by a kind's formula against what its list does."""

import numpy as np
import pytest

from megacore.cost.live import Live, live_of_kind, of_schedule, table_of_kind
from megacore.schedule.generators.generate import generate
from megacore.schedule.live import peak_activations, peak_weight_inputs
from megacore.schedule.text import to_text

SHAPES = ((1, 1, 1), (1, 5, 1), (2, 3, 1), (4, 9, 1), (4, 33, 1), (8, 64, 1), (2, 7, 2), (4, 3, 3), (4, 41, 2))
KINDS = ("gpipe", "1f1b", "interleaved", "zb-h1", "zb-h2", "zb-v", "dualpipe-v")
CASES = [(kind, *shape) for kind in KINDS for shape in SHAPES if kind not in ("zb-v", "dualpipe-v") or shape[2] == 2]


def worst(of_rank: Live, kept: np.ndarray, late: np.ndarray) -> int:
    return of_rank.peak(kept, late)


@pytest.mark.parametrize(("kind", "p", "m", "v"), CASES)
def test_formulas_count_what_lists_do(kind: str, p: int, m: int, v: int) -> None:
    """For any sizes of stages: random ones, and each kind of count alone."""
    schedule = generate(kind, p, m, v)
    random = np.random.default_rng(0)
    sizes = [(np.ones(v, int), np.zeros(v, int)), (np.zeros(v, int), np.ones(v, int))]
    sizes += [(random.integers(1, 100, v), random.integers(0, 100, v)) for _ in range(5)]
    for formula, listed in zip(live_of_kind(kind, p, m, v), of_schedule(schedule), strict=True):
        assert formula.stages == listed.stages
        assert [formula.peak(*pair) for pair in sizes] == [listed.peak(*pair) for pair in sizes]
    activations = [live.peak(*sizes[0]) / v for live in live_of_kind(kind, p, m, v)]
    assert activations == pytest.approx(peak_activations(schedule))
    assert [live.peak(*sizes[1]) / v for live in live_of_kind(kind, p, m, v)] == pytest.approx(
        peak_weight_inputs(schedule)
    )


def test_a_list_of_ones_own_is_read(tmp_path) -> None:
    path = tmp_path / "mine.txt"
    path.write_text(to_text(generate("zb-h1", 3, 5)), encoding="utf-8")
    mine, known = live_of_kind(str(path), 3, 5, 1), live_of_kind("zb-h1", 3, 5, 1)
    one = np.ones(1, int)
    assert [live.peak(one, one) for live in mine] == [live.peak(one, one) for live in known]


@pytest.mark.parametrize(("kind", "v"), [("1f1b", 1), ("interleaved", 3), ("zb-h2", 2), ("zb-v", 2), ("gpipe", 2)])
def test_more_microbatches_show_nothing_new(kind: str, v: int) -> None:
    """One table serves many numbers of them, with other sizes on every rank and for what comes on top."""
    p, random = 4, np.random.default_rng(1)
    kept, late = random.integers(1, 100, (p, v)), random.integers(0, 100, (p, v))
    beginning = random.integers(50, 100, p)
    end = beginning - random.integers(0, 50, p)  # what was put off is counted at the end
    for m in (3, 61, 64):
        table = table_of_kind(kind, p, m, v)
        listed = of_schedule(generate(kind, p, m, v))
        expected = [one.peak(kept[r], late[r], beginning[r], end[r]) for r, one in enumerate(listed)]
        assert table.peaks(kept, late, beginning, end).tolist() == expected
        rank, chunk = table.last
        assert listed[rank].stages[chunk] == p * v - 1
        assert table.most_at_last == listed[rank].kept[:, chunk].max()
