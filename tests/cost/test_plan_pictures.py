"""Pictures and the page of a plan: read back as XML and HTML."""

from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from megacore.cost.economics import bill, failures
from megacore.cost.machine import find_machine
from megacore.cost.outcome import judge
from megacore.cost.page import Report, page
from megacore.cost.pictures import schedule_picture
from megacore.cost.planning import read_wish, run_lines
from megacore.cost.plot.heat_map import Cell, heat_map
from megacore.cost.plot.memory_bars import memory_bars
from megacore.cost.plot.mesh_map import mesh_map
from megacore.cost.plot.scaling import Point, scaling_curve
from megacore.layout.layout import Layout

SVG = "{http://www.w3.org/2000/svg}"
VOID = {"meta", "br", "img", "hr", "rect"}


@pytest.fixture(scope="module")
def outcome():
    keys = ["parallel.pp=4", "parallel.cp=1", "parallel.schedule=1f1b", "train.global_batch_size=32"]
    return judge(read_wish(None, "llama2-13b", keys, 32, find_machine("h100")), 3)


def parse(svg):
    root = ElementTree.fromstring(svg)
    assert root.tag == f"{SVG}svg"
    return root


def texts(root):
    return [element.text for element in root.iter(f"{SVG}text")]


def test_memory_bars_add_up(outcome):
    winner = outcome.best[0]
    root = parse(memory_bars(winner, 80e9))
    bars = [rect for rect in root.iter(f"{SVG}rect") if rect.find(f"{SVG}title") is not None]
    first = [rect for rect in bars if rect.find(f"{SVG}title").text.startswith("rank 0,")]
    scale = (860 - 64 - 74) / (1.04 * 80e9)
    assert sum(float(rect.get("width")) for rect in first) == pytest.approx(winner.memory[0].total * scale, abs=0.1)
    assert {f"rank {number}" for number in range(4)} <= set(texts(root))
    assert "limit 72.0 GB" in texts(root)


def test_heat_map_hatches_what_does_not_fit():
    cells = {
        (1, 1): Cell(0, 0, why="does not fit"),
        (2, 1): Cell(2.0, 100.0, "tp2"),
        (2, 2): Cell(1.0, 200.0, "tp2 x pp2"),
    }
    root = parse(heat_map(cells))
    hatched = [rect for rect in root.iter(f"{SVG}rect") if rect.get("fill") == "url(#does-not-fit)"]
    assert len(hatched) == 3  # (1, 1), the missing (1, 2), and the legend's
    framed = [rect for rect in root.iter(f"{SVG}rect") if rect.get("stroke")]
    assert [rect.find(f"{SVG}title").text for rect in framed] == ["tp2 x pp2"]


@pytest.mark.parametrize("world", [16, 1024])
def test_mesh_map_says_where_ranks_sit(world):
    layout = Layout(tp=4, pp=2, dp=world // 8, dp_shard=world // 8)
    root = parse(mesh_map(layout, 8))
    tips = [title.text for title in root.iter(f"{SVG}title")]
    at = layout.coordinate(world - 1)
    last = next(tip for tip in tips if tip.startswith(f"rank {world - 1}:"))
    assert last == f"rank {world - 1}: " + ", ".join(
        f"{a} {at[a]}" for a in ("tp", "cp", "pp", "dp", "ep", "etp", "edp")
    )
    assert len([tip for tip in tips if tip.startswith("rank ")]) == min(world, 31 * 8)


def test_scaling_curve_is_relative_to_the_best():
    root = parse(scaling_curve([Point(8, 100.0, "a"), Point(64, 80.0, "b")], 64))
    assert {"100%", "80%", "8", "64"} <= set(texts(root))
    assert parse(scaling_curve([], 8)) is not None


class Balance(HTMLParser):
    """Every tag that opens closes, and nothing is fetched from elsewhere."""

    def __init__(self):
        super().__init__()
        self.open, self.text, self.fetched = [], [], []

    def handle_starttag(self, tag, attrs):
        self.open += [] if tag in VOID else [tag]
        self.fetched += [value for name, value in attrs if name in ("src", "href") and not value.startswith("#")]

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_page_is_whole_and_says_everything(outcome):
    winner = outcome.best[0]
    lasting = failures(winner)
    report = Report(
        title="a <model>", command="megacore plan", best=outcome.best, verdicts=outcome.verdicts,
        runner_up=outcome.runner_up, figures=(), lines=run_lines(winner), lasting=lasting, price=2.0,
        bill=bill(winner, 1e12, 2.0, lasting),
    )  # fmt: skip
    text = page(report)
    seen = Balance()
    seen.feed(text)
    assert seen.open == []
    assert seen.fetched == []
    words = " ".join(seen.text)
    for said in (winner.name(), "a <model>", run_lines(winner), "1e+12 tokens", f"{winner.worst.total / 1e9:.1f} GB"):
        assert said in words, said
    assert [each.name for each in outcome.verdicts if each.name not in words] == []


def test_the_schedule_is_drawn(outcome):
    pytest.importorskip("matplotlib")
    assert schedule_picture(outcome.best[0].step).startswith("<svg")
