"""Live activations against the published formulas, and against counting."""

import pytest

from megacore.schedule import Instructions, Schedule
from megacore.schedule.generators.generate import generate
from megacore.schedule.live import peak_activations, peak_weight_inputs
from megacore.schedule.lower import lower


def read(*ranks: str, num_microbatches: int = 2) -> Schedule:
    return Schedule("test", num_microbatches, tuple(map(Instructions.parse, ranks)))


@pytest.mark.parametrize(
    ("rank", "activations", "weight_inputs"),
    [
        ("F0.0 B0.0 F0.1 B0.1", 1, 0),
        ("F0.0 F0.1 B0.0 B0.1", 2, 0),
        ("F0.0 I0.0 F0.1 I0.1 W0.0 W0.1", 1, 2),
        ("F0.0 FB0.1:0.0 B0.1", 2, 0),  # both halves of a pair are alive while it runs
        ("F0.0 F1.0 F0.1 I1.0 I0.0 F1.1 I1.1 W1.0 I0.1 W0.0 W1.1 W0.1", 1.5, 1.5),
        ("F0.0 F0.1", 0, 0),  # an evaluation keeps nothing
    ],
)
def test_small_lists_can_be_counted(rank: str, activations: float, weight_inputs: float) -> None:
    schedule = read(rank)
    assert peak_activations(schedule) == (activations,)
    assert peak_weight_inputs(schedule) == (weight_inputs,)


@pytest.mark.parametrize(("p", "m"), [(1, 3), (2, 2), (4, 3), (4, 8), (8, 16)])
def test_formulas_of_one_chunk(p: int, m: int) -> None:
    """Narayanan et al. 2021, section 2.2; Qi et al. 2024, table 1."""
    assert peak_activations(generate("gpipe", p, m)) == (m,) * p
    assert peak_activations(generate("1f1b", p, m)) == tuple(min(p - rank, m) for rank in range(p))
    if p > 1 and m >= 2 * p:
        assert max(peak_activations(generate("zb-h1", p, m))) == p
        assert max(peak_activations(generate("zb-h2", p, m))) == 2 * p - 1


@pytest.mark.parametrize(("p", "v", "m"), [(2, 2, 4), (4, 2, 8), (4, 3, 12), (8, 4, 16)])
def test_formulas_of_several_chunks(p: int, v: int, m: int) -> None:
    """Interleaved: p (1 + (p-1)/(pv)) on the first rank; ZB-V as 1F1B."""
    assert peak_activations(generate("interleaved", p, m, v))[0] == pytest.approx(p + (p - 1) / v)
    assert max(peak_activations(generate("zb-v", p, m))) == p


@pytest.mark.parametrize("kind", ["1f1b", "zb-h2", "dualpipe-v"])
def test_messages_change_nothing(kind: str) -> None:
    schedule = generate(kind, 3, 7)
    assert peak_activations(lower(schedule)) == peak_activations(schedule)
    assert peak_weight_inputs(lower(schedule)) == peak_weight_inputs(schedule)
