"""The report of a run is one safe page, whatever the run's folder holds."""

import base64
import hashlib
import json
import os
import random
import shutil
import subprocess
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest

from megacore.config.load import load
from megacore.config.write import to_toml
from megacore.exits import run as run_command
from megacore.monitor.jsonl import JsonLines
from megacore.monitor.metrics import StepMetrics
from megacore.monitor.report.page import page
from megacore.monitor.report.reading import checkpoints, places, read_run, thinned
from tests.engine.common import BASE

NOW = 1_800_000_000.0
HOSTILE = (
    "</script><script>alert(1)</script><img src=x onerror=alert(2)>\" ' onload=alert(3) ]]>\u2028 \x00 \x1b[2J &lt;"
)
VOID = {"meta", "input", "img", "br", "link"}


class Page(HTMLParser):
    """Checks that elements are closed in order, and gathers what could run or load something."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.ids: list[str] = []
        self.scripts: list[tuple[str, str]] = []
        self.links: list[str] = []
        self.policy, self.words = "", ""
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        if tag not in VOID:
            self.open.append(tag)
        assert not [name for name in given if name.startswith("on")], f"{tag} has a handler"
        self.ids += [given["id"]] if "id" in given else []
        self.links += [value for name, value in attrs if name in ("src", "href", "action", "data", "srcset")]
        if tag == "script":
            self.scripts.append((given.get("type", ""), ""))
        if given.get("http-equiv") == "Content-Security-Policy":
            self.policy = given["content"]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] == ["script"]:
            kind, before = self.scripts[-1]
            self.scripts[-1] = (kind, before + data)
        elif self.open[-1:] != ["style"]:
            self.words += data

    @property
    def drawn(self) -> dict:
        (found,) = [json.loads(text) for kind, text in self.scripts if kind == "application/json"]
        return found


def check(html: str) -> Page:
    """One page, with one script of its own that alone may run, and nothing from elsewhere."""
    found = Page(html)
    assert len(set(found.ids)) == len(found.ids)
    assert all(link.startswith(("#", "data:image/svg+xml;base64,")) for link in found.links)
    assert {link[1:] for link in found.links if link.startswith("#")} <= set(found.ids)
    (own,) = [text for kind, text in found.scripts if not kind]
    digest = base64.b64encode(hashlib.sha256(own.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in found.policy and "default-src 'none'" in found.policy
    assert "@import" not in html and "http://" not in html.replace("http://www.w3.org/2000/svg", "")
    return found


def write(path: Path, *records: dict) -> None:
    lines = JsonLines(path)
    for record in records:
        lines.append(record)
    lines.close()


def metrics(steps: range, **more) -> list[dict]:
    return [
        StepMetrics(
            step, 9.0 / step, 1.0 + step % 7, 1e-3, 1000 * step, 1e4, 0.1, 50.0, 0.4, 2.5,
            val_loss=5.0 / step if step % 10 == 0 else None, gpu={"power_w": {"mean": 5e2, "min": 4e2, "max": 6e2}},
        ).record() | more
        for step in steps
    ]  # fmt: skip


def full_run(out: Path, **more) -> Path:
    """A run that was killed once, went back before a spike, and has finished; ``more`` goes into every event."""
    config = load(None, [*BASE, "parallel.pp=2", "train.steps=40", f"out={out}"])
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.toml").write_text(to_toml(config))
    (out / "log.txt").write_text("step 1\n" + HOSTILE)
    (out / "timeline.svg").write_text(f"<svg xmlns='http://www.w3.org/2000/svg'>{HOSTILE}</svg>")
    write(out / "metrics.jsonl", *metrics(range(1, 41)))
    start = {"event": "start", "layout": "pp2", "world_size": 2, "parameters": 1e6, "device": "CPU", "host": "node1"}
    start |= {"startup_s": {"mesh": 1.0, "model": 2.0}, "versions": {"torch": "2.13"}}
    save = {"event": "save", "bytes": 5e6, "seconds": 0.5}
    events = [
        {**start, "first_step": 1},
        {**save, "step": 10, "checkpoint": str(out / "checkpoints/step-00000010"), "removed": []},
        {"event": "hang", "rank": 3, "text": "rank 3 is silent"},
        {"event": "fault", "error": "RuntimeError: gone"},
        {**start, "first_step": 11},
        {"event": "resume", "step": 10, "again_until_step": 17, "checkpoint": "x", "changes": [], "rejected": []},
        {"event": "skip", "first_step": 12, "last_step": 13, "count": 2, "reason": "not finite"},
        {"event": "spike", "step": 20, "text": "the loss jumps"},
        {**save, "step": 20, "checkpoint": str(out / "checkpoints/step-00000020"), "removed": ["a/step-00000010"]},
        {"event": "sample", "step": 30, "prompt": "Once", "text": " upon a time"},
        {"event": "profile", "folder": "x", "kinds": {"gemm": {"ms": 3.0, "share": 0.75}, "loss": {"ms": 1.0}}},
        {"event": "alert", "step": 33, "alert": "loss > 3", "text": "loss > 3 (4 > 3)"},
        {"event": "finish", "tokens": 40000},
    ]
    write(out / "events.jsonl", *[{"time": NOW + 10 * place, **each, **more} for place, each in enumerate(events)])
    return out


def test_a_whole_run(tmp_path):
    run = read_run(full_run(tmp_path / "run"))
    assert (run.status, run.damaged, run.config_problem) == ("finished", (), "")
    found = check(page(run))
    for name in "curves time schedule memory work events samples checkpoints config environment log".split():
        assert name in found.ids
    for words in ("step40of 40", "Once upon a time", "rank 3 is silent", "parallel.pp", "2.13", "1.00M parameters"):
        assert words in found.words
    charts = {each["name"]: each for each in found.drawn["charts"]}
    assert {"loss", "grad_norm", "lr", "tokens_per_s", "step_time_s", "mfu", "memory_gb", "power_w"} == set(charts)
    training, validation = charts["loss"]["lines"]
    assert training["points"][3] == [4, 2.25]
    assert [point[0] for point in validation["points"]] == [10, 20, 30, 40]
    marks = {mark["kind"]: mark["step"] for mark in found.drawn["marks"]}
    # what has no step of its own belongs to where the run had come when it ended
    of_steps = {"save": 20, "hang": 17, "fault": 17, "start": 11, "resume": 10, "skip": 12, "spike": 20, "alert": 33}
    assert marks == {**of_steps, "finish": 40}
    assert [(each["step"], each["kept"]) for each in checkpoints(run)] == [(20, True), (10, False)]
    assert len(run.memory()) == 2
    assert run.goodput.num_starts == 2


def test_nothing_of_a_run_becomes_markup(tmp_path):
    out = full_run(tmp_path / "<b>run</b>", text=HOSTILE, prompt=HOSTILE, error=HOSTILE, kinds={HOSTILE: {"ms": 1}})
    with (out / "events.jsonl").open("a") as file:
        for name in ("start", "sample", "save", HOSTILE):
            given = {"time": NOW + 500, "event": name, "checkpoint": HOSTILE, "layout": HOSTILE, "world_size": HOSTILE}
            given |= {"step": 39, "versions": {HOSTILE: HOSTILE}, "startup_s": {HOSTILE: 1.0}, HOSTILE: HOSTILE}
            file.write(json.dumps(given) + "\n")
    (out / "config.toml").write_text((out / "config.toml").read_text() + f"\n# {HOSTILE}")
    html = page(read_run(out))
    found = check(html)
    assert "alert(1)" in found.words  # to be read
    assert "<img src=x" not in html and "<script>alert" not in html and "\x1b" not in html and "\x00" not in html
    assert "<b>run" not in html


def test_where_alerts_are_sent_to_is_no_part_of_the_page(tmp_path):
    url, line = "https://hooks.example.com/T0/secret?a=1&b=<2>", "send --key 'topsecret x'"
    out = full_run(tmp_path / "run", text=f"from {url}", error=f"{line} failed")
    secrets = [f"log.alert_webhook={url}", f"log.alert_command={line}"]
    config = to_toml(load(None, [*BASE, *secrets]))
    (out / "config.toml").write_text(config)
    (out / "log.txt").write_text(f"log.alert_webhook: {url} -> {line}")
    html = page(read_run(out))
    check(html)
    assert "secret" not in html
    assert html.count("(hidden)") > 10
    (out / "config.toml").write_text(config + "\n[unknown]\nx = 1\n")  # which this version cannot read
    html = page(read_run(out))
    check(html)
    assert "[unknown]" in html
    assert "alert_webhook = " not in html and "alert_command = " not in html


def test_runs_that_have_hardly_begun(tmp_path):
    for name, content in (("metrics.jsonl", ""), ("events.jsonl", ""), ("config.toml", "")):
        out = tmp_path / name
        out.mkdir()
        (out / name).write_text(content)
        found = check(page(read_run(out)))
        assert "No step has been written down yet" in found.words
        assert found.drawn["charts"] == []
    one = tmp_path / "one"
    write(one / "metrics.jsonl", *metrics(range(1, 2)))
    assert "step1" in check(page(read_run(one))).words


@pytest.mark.parametrize("folder", ["", "none", "file"])
def test_what_is_no_run_is_told(tmp_path, folder, capsys):
    (tmp_path / "file").write_text("")
    assert run_command("megacore.tools.report", [str(tmp_path / folder)]) == 2
    assert "is no folder of a run" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("last", "age_s", "status"),
    [
        ("finish", 1e6, "finished"),
        ("stop", 1e6, "stopped"),
        ("fault", 1e6, "failed"),
        ("save", 5.0, "running"),
        ("save", 1e6, "lost"),
        ("start", 5.0, "running"),
    ],
)
def test_how_a_run_stands(tmp_path, last, age_s, status):
    write(tmp_path / "metrics.jsonl", *metrics(range(1, 5)))
    ends = [{"event": "finish"}] if last == "start" else []  # of the start before
    write(tmp_path / "events.jsonl", *[{"time": NOW, **each} for each in [*ends, {"event": "start"}, {"event": last}]])
    for path in tmp_path.iterdir():
        os.utime(path, (NOW, NOW))
    run = read_run(tmp_path, NOW + age_s)
    assert run.status == status
    found = check(page(run, NOW))
    assert ("no end" in found.words) == (status == "lost")


def test_lines_that_are_none_of_ours_are_left_out(tmp_path):
    out = full_run(tmp_path / "run")
    for name in ("metrics.jsonl", "events.jsonl"):
        text = (out / name).read_text()
        bad = ["nonsense", "[1]", '{"step": "x"}', '{"event": 3, "time": 1}', "[" * 5000, '{"a": 1', "\ufffd"]
        (out / name).write_bytes("\n".join([*bad, text]).encode() + b'{"step": 41, "lo')
    run = read_run(out)
    assert run.last["step"] == 40
    assert [line.split(" ")[0] for line in run.damaged] == ["7", "7"]
    check(page(run))


def test_no_value_breaks_the_page(tmp_path):
    """Every field of every record is replaced by odd values, some at a time."""
    rng = random.Random(1)
    out = full_run(tmp_path / "run")
    odd = [None, "x", HOSTILE, -1, 3, 10**400, 1e308, True, [], {}, [[1]], {"a": {"b": None}}, float("nan")]
    kept = {name: (out / name).read_text().splitlines() for name in ("metrics.jsonl", "events.jsonl")}
    for _ in range(60):
        for name, lines in kept.items():
            spoiled = []
            for line in lines:
                record = json.loads(line)
                for key in record:
                    if rng.random() < 0.3:
                        record[key] = rng.choice(odd)
                spoiled.append(json.dumps(record))
            (out / name).write_text("\n".join(spoiled) + "\n")
        check(page(read_run(out)))


def test_long_runs_make_short_pages(tmp_path):
    write(tmp_path / "metrics.jsonl", *metrics(range(1, 20_001)))
    began = time.monotonic()
    html = page(read_run(tmp_path))
    assert time.monotonic() - began < 10
    assert len(html) < 2_000_000
    (line, _) = check(html).drawn["charts"][0]["lines"]
    assert line["all"] == 20_000
    assert len(line["points"]) <= 3000


def deep(depth: int) -> str:
    return '{"a":' * depth + "[" * depth + "]" * depth + "}" * depth


def test_depth_ends_nothing(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(f'{{"step": 1, "loss": {deep(450)}, "statistics": {deep(450)}}}\n')
    (tmp_path / "events.jsonl").write_text(
        f'{{"time": 1, "event": "profile", "x": {deep(450)}, "kinds": {deep(450)}}}\n'
    )
    run = read_run(tmp_path)
    assert len(run.metrics) == len(run.events) == 1
    check(page(run))


def test_statistics_are_drawn_and_many_parts_are_summed_up(tmp_path):
    def of(step: int) -> dict:
        load = {f"layers.{layer}": {f"expert{each}": 0.1 * each + layer for each in range(4)} for layer in range(3)}
        return {"gradient_norm": {"mlp": step, HOSTILE: 2.0}, "clipped_fraction": 0.5, "expert_load": load, "bad": "x"}

    write(tmp_path / "metrics.jsonl", *[each | {"statistics": of(each["step"])} for each in metrics(range(1, 4))])
    charts = [each for each in check(page(read_run(tmp_path))).drawn["charts"] if each["name"] == "statistics"]
    assert [each["title"] for each in charts] == ["Gradient norm", "Clipped fraction", "Expert load"]
    norm, fraction, load = charts
    assert [line["name"] for line in norm["lines"]] == ["mlp", HOSTILE]
    assert norm["lines"][0]["points"] == [[1, 1], [2, 2], [3, 3]]
    assert [line["name"] for line in fraction["lines"]] == ["clipped_fraction"]
    assert {line["name"]: line["points"][0][1] for line in load["lines"]} == {
        "least of 12": 0.0,
        "middle": pytest.approx(1.15),
        "most": pytest.approx(2.3),
    }


def test_events_are_told_as_people_read_them(tmp_path):
    words = check(page(read_run(full_run(tmp_path / "run")))).words
    assert "size 5.00 MB, took 0.50 s, checkpoint step-00000020, removed step-00000010" in words
    assert "parallel.pp21" in words, "key, value and default, as in a run file"


def test_thin_curves_keep_their_spikes():
    points = [(float(step), float(step % 3)) for step in range(10_000)]
    points[4321] = (4321.0, 99.0)
    points[7777] = (7777.0, -99.0)
    few = list(thinned(points, 500))
    assert len(few) <= 502
    assert {(4321.0, 99.0), (7777.0, -99.0)} < set(few) < set(points)
    assert few == sorted(few)
    assert list(thinned(points[:500], 500)) == points[:500]


def test_a_clock_that_is_ahead_makes_no_time_before_the_start(tmp_path):
    write(tmp_path / "metrics.jsonl", *metrics(range(1, 8)))
    write(tmp_path / "events.jsonl", {"time": NOW, "event": "start"}, {"time": NOW + 10, "event": "finish"})
    assert read_run(tmp_path, NOW - 1e6).goodput.wall_s == 10


def test_an_event_without_a_step_is_where_the_run_ended(tmp_path):
    write(tmp_path / "metrics.jsonl", *metrics(range(1, 8)))
    write(tmp_path / "events.jsonl", {"time": NOW, "event": "start"}, {"time": NOW, "event": "hang"})
    assert [step for _, step in places(read_run(tmp_path))] == [7, 7]


def test_the_command_writes_the_page(tmp_path, capsys):
    out = full_run(tmp_path / "run")
    assert run_command("megacore.tools.report", [str(out), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["status"], said["step"], said["report"]) == ("finished", 40, str(out / "report.html"))
    check((out / "report.html").read_text())
    assert run_command("megacore.tools.report", [str(out), "--out", str(tmp_path / "a.html")]) == 0
    check((tmp_path / "a.html").read_text())
    assert run_command("megacore.tools.report", [str(out), "--out", str(tmp_path)]) == 2
    assert run_command("megacore.tools.report", [str(out), "--out", str(tmp_path / "no" / "a.html")]) == 2


@pytest.mark.skipif(not shutil.which("node"), reason="there is no node to run the page's script")
@pytest.mark.parametrize("kind", ["full", "one", "none"])
def test_the_script_draws_every_curve(tmp_path, kind):
    out = full_run(tmp_path / "run")
    if kind != "full":
        (out / "metrics.jsonl").unlink()
        write(out / "metrics.jsonl", *metrics(range(1, 2 if kind == "one" else 1)))
    html = tmp_path / "report.html"
    html.write_text(page(read_run(out)))
    done = subprocess.run(
        ["node", str(Path(__file__).with_name("report_dom.js")), str(html)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["theme"] == "dark"
    assert found["charts"] == {"full": 8, "one": 8, "none": 0}[kind]
    if kind != "none":
        assert (found["bad"], found["bad_later"], found["marks_later"]) == (0, 0, 0)
        assert "training" in found["tip"] and "step" in found["tip"]
    if kind == "full":
        assert found["paths"] >= 9  # one of each curve, two where it is smoothed
        assert found["marks"] >= 8 * 8
