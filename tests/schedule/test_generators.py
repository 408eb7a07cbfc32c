"""Generated lists: they run to their ends, compute everything in order, idle and keep what the papers say."""

import inspect
import itertools
from collections import Counter
from dataclasses import dataclass, field
from fractions import Fraction

import pytest

from megacore.schedule import Instruction, Op, Schedule
from megacore.schedule.generators.generate import KINDS, default_chunks, forward_only, generate

LOOPED = ("gpipe", "1f1b", "interleaved", "zb-h1", "zb-h2")
FOLDED = ("zb-v", "dualpipe-v")
CASES = [(kind, chunks) for kind in LOOPED for chunks in (1, 2, 3, 8)] + [(kind, 2) for kind in FOLDED]


@dataclass(frozen=True)
class Costs:
    """Times of the verbs of one chunk."""

    forward: int = 1
    input_grad: int = 1
    weight_grad: int = 1
    saved: int = 0
    """What a pair saves by overlap."""

    @property
    def backward(self) -> int:
        return self.input_grad + self.weight_grad

    @property
    def pair(self) -> int:
        return self.forward + self.backward - self.saved

    def of(self, op: Op) -> int:
        return (self.forward, self.backward, self.input_grad, self.weight_grad, self.pair)[op]


EQUAL = Costs()


@dataclass
class Rank:
    instructions: list[Instruction]
    at: int = 0
    first: int | None = None
    now: int = 0
    busy: int = 0
    live: int = 0
    peak: int = 0
    added: dict[int, list[int]] = field(default_factory=dict)
    """Of each stage, the microbatches whose weight gradients were added, in order."""

    @property
    def idle(self) -> int:
        return self.now - (self.first or 0) - self.busy


def halves(instruction: Instruction) -> tuple[tuple[int, int] | None, tuple[int, int] | None]:
    """(stage, microbatch) that goes forward, and that comes back."""
    own = (instruction.stage, instruction.microbatch)
    if instruction.op is Op.PAIR:
        return own, (instruction.back_stage, instruction.back_microbatch)
    if instruction.op is Op.FORWARD:
        return own, None
    return None, own if instruction.op in (Op.BACKWARD, Op.INPUT_GRAD) else None


def run(schedule: Schedule, costs: Costs = EQUAL) -> list[Rank]:
    """Every rank goes on as long as it can, again and again. Fails where an input is missing or made twice."""
    ranks = [Rank(list(instructions)) for instructions in schedule.ranks]
    done: dict[tuple[str, int, int], int] = {}
    moved = True
    while moved:
        moved = False
        for rank in ranks:
            while rank.at < len(rank.instructions) and step(rank, done, schedule.num_stages, costs):
                moved = True
    stuck = [str(rank.instructions[rank.at]) for rank in ranks if rank.at < len(rank.instructions)]
    assert not stuck, stuck
    return ranks


def step(rank: Rank, done: dict[tuple[str, int, int], int], num_stages: int, costs: Costs) -> bool:
    instruction = rank.instructions[rank.at]
    forward, back = halves(instruction)
    needs, makes = [], []
    if forward:
        stage, microbatch = forward
        makes.append(("activation", stage, microbatch))
        if stage:
            needs.append(("activation", stage - 1, microbatch))
    if back:
        stage, microbatch = back
        makes.append(("gradient", stage, microbatch))
        needs.append(("activation", stage, microbatch))
        if stage < num_stages - 1:
            needs.append(("gradient", stage + 1, microbatch))
    if instruction.op is Op.WEIGHT_GRAD:
        needs.append(("gradient", instruction.stage, instruction.microbatch))
    if any(need not in done for need in needs):
        return False
    start = max([rank.now, *(done[need] for need in needs)])
    cost = costs.of(instruction.op)
    rank.first = start if rank.first is None else rank.first
    rank.now = start + cost
    rank.busy += cost
    rank.at += 1
    for each in makes:
        assert each not in done, each
        done[each] = rank.now
    rank.live += forward is not None
    rank.peak = max(rank.peak, rank.live)
    rank.live -= back is not None
    if instruction.op is Op.WEIGHT_GRAD:
        rank.added.setdefault(instruction.stage, []).append(instruction.microbatch)
    elif back and instruction.op is not Op.INPUT_GRAD:
        rank.added.setdefault(back[0], []).append(back[1])
    return True


def stages_of(kind: str, rank: int, p: int, chunks: int) -> list[int]:
    return [rank, 2 * p - 1 - rank] if kind in FOLDED else [rank + chunk * p for chunk in range(chunks)]


@pytest.mark.parametrize(("kind", "chunks"), CASES)
def test_every_number_of_ranks_and_microbatches_works(kind: str, chunks: int) -> None:
    for p, m in itertools.product((1, 2, 3, 5), (1, 2, 5, 6, 11)):
        schedule = generate(kind, p, m, chunks)
        assert (schedule.kind, schedule.num_ranks, schedule.num_microbatches) == (kind, p, m)
        for r, rank in enumerate(run(schedule)):
            stages = stages_of(kind, r, p, chunks)
            forwards = Counter(forward for each in rank.instructions if (forward := halves(each)[0]))
            assert forwards == Counter(itertools.product(stages, range(m))), (p, m)
            # In ascending order, each once: so all kinds add up to the same bits.
            assert rank.added == {stage: list(range(m)) for stage in stages}, (p, m)
            assert rank.live == 0


@pytest.mark.parametrize(("p", "m"), [(1, 3), (2, 4), (3, 9), (4, 8), (8, 16)])
@pytest.mark.parametrize("costs", [EQUAL, Costs(2, 3, 2), Costs(4, 4, 3)])
def test_idle_times_are_those_of_the_papers(p: int, m: int, costs: Costs) -> None:
    """Narayanan et al. 2021, sections 2.2.1 and 2.2.2 (times are of one of v chunks); Qi et al. 2024, Table 1."""
    f, b, w = costs.forward, costs.input_grad, costs.weight_grad

    def idle(kind: str, chunks: int) -> tuple[int, int]:
        ranks = run(generate(kind, p, m, chunks), costs)
        assert len({rank.busy for rank in ranks}) == 1
        return max(rank.now for rank in ranks) - ranks[0].busy, max(rank.idle for rank in ranks)

    for kind, chunks in [("gpipe", 1), ("gpipe", 3), ("1f1b", 1), ("interleaved", 2), ("interleaved", 3)]:
        assert idle(kind, chunks)[0] == (p - 1) * (f + b + w), (kind, chunks)
    for chunks in (1, 2, 3):
        assert idle("zb-h1", chunks)[1] == (p - 1) * (f + b - w), chunks
    if m >= 2 * p:
        assert idle("zb-h2", 1)[1] == max(0, (p - 1) * (f + b - 2 * w))


@pytest.mark.parametrize("p", [1, 2, 3, 4, 8])
def test_zero_bubble_is_zero_where_all_verbs_take_the_same(p: int) -> None:
    """Qi et al. 2024, Table 1 and section 6. ZB-H2 with chunks is ours: zero up to four ranks."""
    for m in (2 * p, 3 * p + 1, 5 * p):
        for kind in ("zb-h2", "zb-v"):
            assert [rank.idle for rank in run(generate(kind, p, m))] == [0] * p, (kind, m)
    for chunks in (2, 3):
        assert max(rank.idle for rank in run(generate("zb-h2", p, 2 * p, chunks))) == max(0, p - 4)


@pytest.mark.parametrize("p", [1, 2, 3, 4, 8])
def test_dualpipe_v_idles_as_its_authors_say(p: int) -> None:
    """(PP/2 - 1)(F&B + B - 3W) with PP = 2p stages, table in the README of DeepSeek's DualPipe: of the makespan, what
    rank 0 does not work. With pairs that overlap, or unequal halves, it is at most that."""
    for m, costs in itertools.product(
        (2 * p, 3 * p + 1), (EQUAL, Costs(2, 2, 1), Costs(3, 3, 2), Costs(4, 4, 4, saved=3), Costs(3, 4, 2))
    ):
        ranks = run(generate("dualpipe-v", p, m), costs)
        formula = (p - 1) * (costs.pair + costs.backward - 3 * costs.weight_grad)
        makespan = max(rank.now for rank in ranks)
        assert ranks[0].idle == max(rank.idle for rank in ranks) == makespan - ranks[0].busy
        if costs.saved or costs.forward != costs.input_grad:
            assert ranks[0].idle <= formula, (m, costs)
        else:
            assert ranks[0].idle == formula, (m, costs)


@pytest.mark.parametrize("p", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("rounds", [1, 2, 4])
def test_live_activations_are_those_of_the_papers(p: int, rounds: int) -> None:
    """In microbatches of a whole rank. Narayanan et al. 2021, section 2.2; Qi et al. 2024, Table 1 and section 6."""
    m = p * rounds

    def peaks(kind: str, chunks: int = 0) -> list[Fraction]:
        return [Fraction(rank.peak, chunks or default_chunks(kind)) for rank in run(generate(kind, p, m, chunks))]

    assert peaks("gpipe") == peaks("gpipe", 3) == [m] * p
    assert peaks("1f1b") == peaks("zb-h1") == [min(p - r, m) for r in range(p)]
    assert peaks("zb-h2") == [min(2 * (p - r) - 1, m) for r in range(p)]
    for chunks in (2, 3, 8):
        assert peaks("interleaved", chunks)[0] == min(p + Fraction(p - 1, chunks), m)
        assert peaks("interleaved", chunks) == peaks("zb-h1", chunks) == peaks("zb-h2", chunks)
    if rounds > 1:
        assert peaks("zb-v") == [p] * p
        assert peaks("dualpipe-v") == [p + Fraction(1, 2)] * p


def example(generator: object) -> list[str]:
    """The lists drawn in a generator's docstring."""
    lines = [line.strip() for line in (inspect.getdoc(generator) or "").splitlines()]
    drawn = dict(line.split(":", 1) for line in lines if line[:2] in ("0:", "1:"))
    return [" ".join(drawn[rank].split()) for rank in sorted(drawn)]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "forward"])
def test_docstrings_draw_what_is_generated(kind: str) -> None:
    p, m = (1, 2) if kind in FOLDED else (2, 2 if kind == "gpipe" else 3)
    drawn = example(KINDS[kind].generator)
    assert len(drawn) == p
    assert [str(rank) for rank in generate(kind, p, m).ranks] == drawn


def test_interleaving_goes_round_by_round() -> None:
    """Narayanan et al. 2021, Figure 4, for two ranks."""
    assert [str(rank) for rank in generate("interleaved", 2, 4, 2).ranks] == [
        "F0.0 F0.1 F2.0 F2.1 F0.2 B2.0 F0.3 B2.1 F2.2 B0.0 F2.3 B0.1 B2.2 B2.3 B0.2 B0.3",
        "F1.0 F1.1 F3.0 B3.0 F3.1 B3.1 F1.2 B1.0 F1.3 B1.1 F3.2 B3.2 F3.3 B3.3 B1.2 B1.3",
    ]


def test_a_pair_that_loses_a_half_is_the_other() -> None:
    """Lists for few microbatches are those for many without the rest."""
    few, many = ([str(rank) for rank in generate("dualpipe-v", 2, m).ranks] for m in (3, 4))
    expected = [
        " ".join({"FB0.3:3.1": "B3.1", "FB3.3:0.1": "B0.1", "FB1.3:2.1": "B2.1", "FB2.3:1.1": "B1.1"}.get(word, word)
                 for word in rank.split() if ":" in word or not word.endswith(".3"))
        for rank in many
    ]  # fmt: skip
    assert few == expected
    assert any(".3:" in rank for rank in many)


def test_one_chunk_interleaved_is_1f1b_and_the_other_way_round() -> None:
    assert generate("interleaved", 4, 6).ranks == generate("1f1b", 4, 6).ranks
    assert generate("interleaved", 4, 6, 3).ranks == generate("1f1b", 4, 6, 3).ranks
    assert generate("1f1b", 4, 6, 3).num_stages == 12


@pytest.mark.parametrize("chunks", [1, 2, 3])
@pytest.mark.parametrize("p", [1, 2, 4])
def test_evaluations_keep_ranks_busy(p: int, chunks: int) -> None:
    schedule = generate("forward", p, 3 * p, chunks)
    assert not schedule.trains
    assert schedule.home == tuple(stage % p for stage in range(p * chunks))
    assert [rank.idle for rank in run(schedule)] == [0] * p


def test_evaluations_follow_any_placement() -> None:
    for home in [(0,), (0, 1, 2, 2, 1, 0), (1, 0), (0, 0, 1, 1), (0, 1, 0, 0, 2)]:
        for m in (1, 2, 5):
            schedule = forward_only(home, m)
            assert schedule.home == home
            assert sum(rank.at for rank in run(schedule)) == len(home) * m
    folded = generate("zb-v", 4, 8)
    ranks = run(forward_only(folded.home, 8))
    # From the first forward of stage 0 to the last of stage 7 nothing can be shorter: p - 1 down, p - 1 back up.
    assert max(rank.now for rank in ranks) == 2 * 8 + 2 * (4 - 1)


def test_kinds_know_their_chunks() -> None:
    assert {kind: default_chunks(kind) for kind in KINDS} == {kind: 1 + (kind in FOLDED) for kind in KINDS}
    assert generate("zb-v", 3, 6).home == (0, 1, 2, 2, 1, 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("zb-x", 2, 2), "parallel.schedule=zb-x is unknown; choose one of gpipe, 1f1b, interleaved, zb-h1"),
        (("zb-v", 2, 2, 1), "parallel.chunks=1 does not fit parallel.schedule=zb-v.*set parallel.chunks=2"),
        (("dualpipe-v", 2, 2, 3), "parallel.chunks=3 does not fit parallel.schedule=dualpipe-v.*set parallel.chunks=2"),
        (("1f1b", 0, 2), "parallel.pp=0 must be at least 1"),
        (("1f1b", 2, 0), "num_microbatches=0 must be at least 1"),
        (("1f1b", 2, 2, -1), "parallel.chunks=-1 must be at least 1"),
    ],
)
def test_what_cannot_be_is_refused(arguments: tuple[str, int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate(*arguments)
