"""Pictures of timelines: what is drawn, once, in colours that can be told apart; and the lines for a terminal."""

import html
import re
import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest

from megacore.cost.plot.boxes import boxes_of, marks_of, num_chunks, shares
from megacore.cost.plot.colours import HUES, IDLE, NAMES, ink_on, shade
from megacore.cost.plot.picture import save_picture
from megacore.cost.plot.terminal import terminal_picture
from megacore.cost.simulate import Durations, simulate
from megacore.cost.timeline import Timeline
from megacore.monitor.console import ANSI, colourful, visible_width
from megacore.schedule.generators.generate import generate
from megacore.schedule.instruction import COMPUTE, Op
from megacore.schedule.lower import lower
from megacore.schedule.schedule import Instructions, Schedule

SVG = "{http://www.w3.org/2000/svg}"
KINDS = [("gpipe", 1), ("1f1b", 1), ("interleaved", 2), ("zb-h1", 1), ("zb-v", 2), ("dualpipe-v", 2), ("forward", 1)]


def timeline(kind="1f1b", ranks=4, microbatches=8, chunks=0, **durations):
    return simulate(lower(generate(kind, ranks, microbatches, chunks)), Durations(**durations))


def drawn(path):
    """Name -> the outlines of all groups of that name; the texts, which stand as comments beside their outlines."""
    text = path.read_text(encoding="utf-8")
    groups = {}
    for group in ElementTree.fromstring(text).iter(f"{SVG}g"):
        outlines = [each.get("d", "") for each in group.iter(f"{SVG}path")]
        groups.setdefault((group.get("id") or "").split(".")[0].replace("-", " "), []).extend(outlines)
    return groups, re.findall(r"<!-- (.*?) -->", text)


def count_boxes(groups, name):
    return sum(outline.count("z") for outline in groups.get(name, []))


def counts(schedule):
    """(op, chunk) -> how many are to be drawn, counted one by one."""
    chunk = {stage: sorted(s for s, r in enumerate(schedule.home) if r == rank).index(stage)
             for stage, rank in enumerate(schedule.home)}  # fmt: skip
    found = {}
    for instruction in (each for rank in schedule.ranks for each in rank if each.op in COMPUTE):
        things = [(instruction.op, instruction.stage)]
        if instruction.op == Op.PAIR:
            things = [(Op.FORWARD, instruction.stage), (Op.BACKWARD, instruction.back_stage)]
        for op, stage in things:
            found[op, chunk[stage]] = found.get((op, chunk[stage]), 0) + 1
    return found


@pytest.mark.parametrize(("kind", "chunks"), KINDS)
def test_every_computation_is_drawn_once(tmp_path, kind, chunks):
    given = timeline(kind, 4, 10, chunks)
    save_picture(tmp_path / "a.svg", given)
    groups, _ = drawn(tmp_path / "a.svg")
    expected = {f"{NAMES[op]} {chunk}": count for (op, chunk), count in counts(given.schedule).items()}
    computing = [name for name in groups if re.fullmatch(r"(forward|backward|.* gradient) \d", name)]
    assert {name: count_boxes(groups, name) for name in computing} == expected
    assert count_boxes(groups, "optimizer") == (4 if given.schedule.trains else 0)


@pytest.mark.parametrize(("kind", "chunks"), KINDS)
def test_no_two_boxes_overlap(kind, chunks):
    boxes = boxes_of(timeline(kind, 4, 10, chunks))
    for half in (0.25, 0.75):  # a line through the upper and one through the lower half of every row
        crossed = boxes.where((boxes.top < half) & (boxes.bottom > half))
        for rank in range(4):
            own = crossed.where(crossed.rank == rank)
            order = np.argsort(own.start)
            assert (own.end[order][:-1] <= own.start[order][1:] + 1e-12).all()
            assert len(own) > 0


def test_numbers_stand_in_boxes_that_have_room_for_them(tmp_path):
    save_picture(tmp_path / "few.svg", timeline(microbatches=8))
    tree = ElementTree.parse(tmp_path / "few.svg").getroot()
    width = float(tree.get("viewBox").split()[2])
    found = {}
    for group in tree.iter(f"{SVG}g"):
        name = (group.get("id") or "").split(".")[0]
        if name.startswith("microbatch"):
            uses = list(group.iter(f"{SVG}use"))
            assert all(0 < float(use.get("x")) < width for use in uses)
            found[name] = found.get(name, 0) + len(uses)
    assert found == {f"microbatch-{number}": 8 for number in range(8)}  # forward and backward on 4 ranks

    save_picture(tmp_path / "many.svg", timeline("1f1b", 4, 200))
    assert not any(name.startswith("microbatch") for name in drawn(tmp_path / "many.svg")[0])


def test_title_figures_and_legend(tmp_path):
    given = timeline("zb-v", 4, 8)
    save_picture(tmp_path / "a.svg", given)
    _, texts = drawn(tmp_path / "a.svg")
    assert "zb-v: 4 ranks × 2 chunks × 8 microbatches" in texts
    assert f"bubble {given.bubble_fraction:.1%}, makespan {given.makespan:.4g}" in texts
    assert {"input gradient", "weight gradient", "idle", "optimizer", "live at peak"} <= set(texts)
    assert "backward" not in texts  # only what is there
    save_picture(tmp_path / "b.svg", given, title="A & <B>")
    texts = [html.unescape(text) for text in drawn(tmp_path / "b.svg")[1]]
    assert "A & <B>" in texts
    assert any(text.startswith("zb-v: 4 ranks × 2 chunks × 8 microbatches   bubble ") for text in texts)


def test_predicted_above_measured_on_one_axis(tmp_path):
    predicted = timeline(forward=0.001, backward=0.002)
    slower = timeline(forward=0.0015, backward=0.0022, optimize=0.003)
    measured = Timeline(slower.schedule, *(tuple(each + 7.0 for each in side) for side in (slower.start, slower.end)))
    save_picture(tmp_path / "a.svg", predicted, measured)
    groups, texts = drawn(tmp_path / "a.svg")
    assert texts.index("predicted") < texts.index("measured")
    assert f"bubble {predicted.bubble_fraction:.1%}, makespan 33 ms" in texts
    assert f"bubble {measured.bubble_fraction:.1%}, makespan {measured.makespan * 1e3:.4g} ms" in texts
    assert texts.count("time (ms)") == 2
    assert texts.count("live at peak") == 1
    # One scale: a predicted and a measured forward are as wide as they took long.
    widths = []
    for outline in groups["forward 0"]:
        x = np.array([float(each) for each in re.findall(r"[ML] (\S+) ", outline)]).reshape(-1, 4)
        widths.append(np.ptp(x, axis=1).mean())
    assert widths[1] / widths[0] == pytest.approx(1.5, rel=0.01)


def test_measured_alone(tmp_path):
    save_picture(tmp_path / "a.svg", None, timeline(forward=20.0, backward=40.0))
    assert "time (s)" in drawn(tmp_path / "a.svg")[1]


def longest(tmp_path, title):
    """Rightmost point of any text of a picture, in points."""
    save_picture(tmp_path / "a.png", timeline(), title=title)
    import matplotlib.image

    pixels = matplotlib.image.imread(tmp_path / "a.png")[:70, :, :3]
    return int(np.flatnonzero((pixels < 0.9).any(axis=(0, 2))).max()) / pixels.shape[1]


def test_a_long_title_stays_on_the_page(tmp_path):
    assert longest(tmp_path, "short") < 0.2
    assert 0.8 < longest(tmp_path, "A long title, of many wide words " * 4) < 0.98


@pytest.mark.parametrize(("ranks", "microbatches", "forward"), [(1, 1, 1.0), (2, 3, 0.0), (70, 4, 1.0)])
def test_odd_timelines_are_drawn(tmp_path, ranks, microbatches, forward):
    given = timeline("1f1b", ranks, microbatches, forward=forward)
    save_picture(tmp_path / "a.svg", given)
    groups, _ = drawn(tmp_path / "a.svg")
    assert count_boxes(groups, "ground") == ranks
    assert len(terminal_picture(given, 80, None)) >= ranks + 3


def test_names_in_an_svg_are_its_own(tmp_path):
    save_picture(tmp_path / "a.svg", timeline("zb-v"), timeline("zb-v"))
    ids = [each.get("id") for each in ElementTree.parse(tmp_path / "a.svg").iter() if each.get("id")]
    assert len(ids) == len(set(ids)) > 20
    assert not [each for each in ids if " " in each]


def test_same_picture_same_bytes(tmp_path):
    for name in "ab":
        save_picture(tmp_path / f"{name}.svg", timeline())
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


def test_png(tmp_path):
    save_picture(tmp_path / "new" / "a.png", timeline())
    assert (tmp_path / "new" / "a.png").read_bytes().startswith(b"\x89PNG")


def test_thirty_two_ranks_stay_small(tmp_path):
    save_picture(tmp_path / "a.svg", timeline("dualpipe-v", 32, 128))
    assert (tmp_path / "a.svg").stat().st_size < 3e6


def test_boxes_thinner_than_a_line_become_shares(tmp_path):
    save_picture(tmp_path / "a.svg", timeline("1f1b", 4, 600))
    groups, texts = drawn(tmp_path / "a.svg")
    assert any("heights are shares of time" in text for text in texts)
    assert "forward 0" not in groups
    assert len(groups["forward shares"]) == len(groups["backward shares"]) == 4


def test_shares_add_up():
    given = timeline("dualpipe-v", 4, 12)
    edges = np.linspace(0.0, given.makespan, 14)
    boxes = boxes_of(given)
    for rank in range(4):
        own = boxes.where(boxes.rank == rank)
        by_op = sum(shares(own.where(own.op == op), edges) for op in HUES)
        assert by_op.mean() * given.makespan == pytest.approx(given.busy(rank))
        assert by_op.max() <= 1 + 1e-12
    assert not shares(boxes.where(boxes.rank < 0), edges).any()


def test_times_count_from_the_first_computation():
    schedule = Schedule("file", 1, (Instructions.parse("F0.0 B0.0 R0 O"),))
    start, end = np.array([5.0, 6.0, 8.0, 9.0]), np.array([6.0, 8.0, 9.0, 9.5])
    given = Timeline(schedule, (start,), (end,))
    assert boxes_of(given).start.tolist() == [0.0, 1.0]
    marks = marks_of(given)
    assert [Op(code) for code in marks.op.tolist()] == [Op.REDUCE, Op.OPTIMIZE]
    assert marks.end.tolist() == [4.0, 4.5]
    assert num_chunks(schedule) == 1


def test_refused(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"'a\.pdf' .* \.svg or \.png"):
        save_picture(tmp_path / "a.pdf", timeline())
    with pytest.raises(ValueError, match="no timeline"):
        save_picture(tmp_path / "a.svg", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ValueError, match=r'pip install "megacore\[plots\]"'):
        save_picture(tmp_path / "a.svg", timeline())
    assert not list(tmp_path.iterdir())


# Of linear sRGB, at full severity: Machado, Oliveira and Fernandes 2009, table 1.
EYES = {
    "usual": np.eye(3),
    "no red cones": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "no green cones": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
    "no blue cones": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
}


def linear(colour):
    value = np.array([int(colour[place : place + 2], 16) for place in (1, 3, 5)]) / 255
    return np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)


def oklab(rgb):
    cones = np.cbrt(np.array([[0.41222147, 0.53633254, 0.05144599], [0.2119035, 0.68069955, 0.10739696],
                              [0.08830246, 0.28171884, 0.6299787]]) @ np.clip(rgb, 0, 1))  # fmt: skip
    return np.array([[0.21045426, 0.79361779, -0.00407205], [1.9779985, -2.42859221, 0.45059371],
                     [0.02590404, 0.78277177, -0.80867577]]) @ cones  # fmt: skip


@pytest.mark.parametrize("eyes", EYES)
def test_colours_can_be_told_apart_by_all_eyes(eyes):
    colours = [IDLE, *(shade(op, chunk, 2) for op in HUES for chunk in range(2))]
    seen = [oklab(np.array(EYES[eyes]) @ linear(colour)) for colour in colours]
    assert min(float(np.linalg.norm(one - other)) for one, other in combinations(seen, 2)) > 0.1


def test_numbers_can_be_read_on_every_colour():
    """Contrast as WCAG 2 has it, which asks 3:1 of large print."""
    weights = np.array([0.2126, 0.7152, 0.0722])
    for op in HUES:
        for chunk in range(8):
            colour = shade(op, chunk, 8)
            low, high = sorted(float(weights @ linear(each)) + 0.05 for each in (colour, ink_on(colour)))
            assert high / low > 3.2, (op, chunk)


def test_terminal_lines():
    assert terminal_picture(timeline("1f1b", 2, 3), 50, None) == [
        "1f1b: 2 ranks × 1 chunk × 3 microbatches, bubble",
        "25.0%, makespan 12",
        "rank",
        "   0 F0-F1-······B0----F2-B1----···B2----",
        "   1 ···F0-B0----F1-B1----F2-B2----······",
        "F forward  B backward  · idle",
        "a column is 0.3333 of time",
    ]


def test_terminal_pairs_and_chunks():
    lines = terminal_picture(timeline("dualpipe-v", 2, 6), 120, None)
    assert "lower case: odd chunks" in lines[-1]
    assert re.search(r"F\db\d--", lines[2]) and re.search(r"f\dB\d--", lines[2])
    assert "W" in lines[2] and "w" in lines[2]


@pytest.mark.parametrize("width", [40, 60, 100, 160])
@pytest.mark.parametrize(("kind", "chunks"), KINDS)
@pytest.mark.parametrize("microbatches", [5, 90])
def test_terminal_fits_and_colours_change_no_widths(kind, chunks, microbatches, width):
    given = timeline(kind, 3, microbatches, chunks)
    plain, painted = terminal_picture(given, width, None), terminal_picture(given, width, colourful)
    rows = [[line for line in lines if re.match(r"   \d ", ANSI.sub("", line))] for lines in (plain, painted)]
    assert len(rows[0]) == len(rows[1]) == 3
    assert max(map(visible_width, plain + painted)) <= width
    assert [visible_width(line) for line in rows[0]] == [visible_width(line) for line in rows[1]]
    assert not any(ANSI.search(line) for line in plain)
    for line, bright in zip(*rows, strict=True):  # idle is idle in both
        assert [char == "·" for char in line] == [char == "·" for char in ANSI.sub("", bright)]


def test_terminal_mixes_in_proportion():
    given = timeline("1f1b", 4, 100, forward=1.0, backward=2.0)
    lines = terminal_picture(given, 72, None)
    assert "showing in turn what ran in it" in " ".join(lines)
    for rank, line in enumerate(lines[2:6]):
        cells = line[5:].split("  ")[0]
        for letter, share in (("F", 100 / given.makespan), ("B", 200 / given.makespan)):
            assert cells.count(letter) == pytest.approx(share * len(cells), abs=2)
        idle = 1 - given.busy(rank) / given.makespan
        assert cells.count("·") == pytest.approx(idle * len(cells), abs=2)


def test_terminal_shows_idle_shares_and_live_activations():
    given = timeline("1f1b", 4, 8)
    lines = terminal_picture(given, 100, None)
    assert lines[1].split() == ["rank", "idle", "live"]
    assert [line.split()[-2:] for line in lines[2:6]] == [
        [f"{given.bubble_fraction:.1%}", str(4 - r)] for r in range(4)
    ]


def test_overlapping_clocks_do_not_widen_a_line():
    given = timeline("1f1b", 4, 8)
    late = replace(given, end=tuple(end + 0.4 for end in given.end))
    rows = [line for line in terminal_picture(late, 55, None) if line.startswith("   ")]
    assert len({len(line) for line in rows}) == 1
    assert max(map(len, rows)) <= 55
