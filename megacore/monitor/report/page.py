"""The whole page: one file without anything from elsewhere, that runs no script but its own."""

import base64
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from megacore import __version__
from megacore.monitor.report import parts
from megacore.monitor.report.markup import data, section, tag, text
from megacore.monitor.report.reading import Run, number, places, thinned

MOST_POINTS = 3000
"""Of a curve; more than a screen has columns."""
MOST_MARKS = 400
MOST_STATISTICS, FEWER_POINTS = 16, 500
"""Charts of statistics, and points of their curves."""
SECRETS, SHORTEST_SECRET = ("alert_webhook", "alert_command"), 8
HERE = Path(__file__).parent
MARKS = (
    *("save", "resume", "start", "stop", "finish", "skip", "spike", "rewind", "hang", "straggler", "corruption"),
    *("fault", "alert", "save_failed"),
)
CHARTS: tuple[tuple[str, str, str, tuple[tuple[str, str, str], ...]], ...] = (
    ("loss", "Loss", "nats per token", (("loss", "training", "blue"), ("val_loss", "validation", "orange"))),
    ("grad_norm", "Gradient norm", "", (("grad_norm", "global norm", "green"),)),
    ("lr", "Learning rate", "", (("lr", "learning rate", "purple"),)),
    ("tokens_per_s", "Throughput", "tokens/s", (("tokens_per_s", "all ranks", "teal"),)),
    ("step_time_s", "Step time", "s", (("step_time_s", "mean", "blue"),)),
    ("mfu", "Model FLOPs utilization", "", (("mfu", "MFU", "green"),)),
    ("tflops", "TFLOP/s per device", "", (("tflops_per_device", "TFLOP/s", "green"),)),
    ("memory_gb", "Peak memory", "GB", (("memory_gb", "rank that needed most", "red"),)),
    *(
        (name, title, unit, tuple((f"gpu.{name}.{part}", part, shade) for part, shade in spread))
        for spread in [(("mean", "blue"), ("min", "grey"), ("max", "orange"))]
        for name, title, unit in (
            ("utilization", "GPU utilization", ""),
            ("power_w", "GPU power", "W"),
            ("temperature_c", "GPU temperature", "°C"),
            ("sm_clock_mhz", "GPU clock", "MHz"),
        )
    ),
    ("energy", "Energy", "J/token", (("gpu.joules_per_token", "all ranks", "orange"),)),
)
"""Name, title, unit, and of each curve its figure in metrics.jsonl, its name and its shade."""


def page(run: Run, now: float | None = None) -> str:
    """HTML of a run."""
    style, script = ((HERE / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; img-src data:"
    sections = [
        curves(run),
        parts.time_spent(run),
        parts.timeline(run),
        parts.memory(run),
        parts.kinds(run),
        parts.events(run),
        parts.samples(run),
        parts.saved(run),
        parts.configuration(run),
        parts.environment(run),
        parts.console(run),
    ]
    sections = [hidden(each, run) for each in sections]
    made = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(now))
    name = run.folder.resolve().name or str(run.folder)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{text(name)} · megacore</title>\n<style>\n{style}</style>\n</head>\n<body>\n"
        + tag("header", parts.heading(run) + hidden(parts.problems(run), run))
        + tag("nav", "".join(links(sections)) + '<button id="theme" type="button" title="dark or light">◐</button>')
        + tag("main", "\n".join(filter(None, sections)))
        + tag("footer", text(f"made {made} by megacore {__version__} from {run.folder}"))
        + data("drawn", content(run))
        + f"\n<script>{script}</script>\n</body>\n</html>\n"
    )


def hidden(markup: str, run: Run) -> str:
    """Without what may be a secret: where alerts are sent to. Pages are passed on."""
    if run.config is None:
        return "\n".join(line for line in markup.split("\n") if not any(f"{name} = " in line for name in SECRETS))
    for secret in (getattr(run.config.log, name) for name in SECRETS):
        if len(secret) >= SHORTEST_SECRET:
            for shown in (secret, json.dumps(secret, ensure_ascii=False)[1:-1]):
                markup = markup.replace(text(shown), "(hidden)").replace(shown, "(hidden)")
    return markup


def curve(name: str, shade: str, points: Sequence[tuple[float, float]], most: int) -> dict[str, Any]:
    """One line of a chart."""
    few = [[step, float(f"{value:.6g}")] for step, value in thinned(points, most)]
    return {"name": name, "shade": shade, "points": few, "all": len(points)}


def statistics(run: Run) -> list[dict[str, Any]]:
    """Charts of what ``log.statistics_every`` writes: a line for each part of the model; where these are too many, for
    the least, the middle and the most of them."""
    found: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for record in run.metrics:
        figures = record.get("statistics")
        for title, figure in figures.items() if isinstance(figures, dict) else ():
            lines = found.setdefault(str(title), {})
            for name, value in leaves("", figure):
                lines.setdefault(name or str(title), []).append((float(record["step"]), value))
    charts = []
    for title, lines in list(found.items())[:MOST_STATISTICS]:
        if len(lines) > len(parts.SHADES):
            by_step: dict[float, list[float]] = {}
            for points in lines.values():
                for step, value in points:
                    by_step.setdefault(step, []).append(value)
            of: dict[str, Callable[[list[float]], float]]
            of = {f"least of {len(lines)}": min, "middle": median, "most": max}
            lines = {name: [(step, float(pick(each))) for step, each in by_step.items()] for name, pick in of.items()}
        shown = [
            curve(parts.short(name), shade, points, FEWER_POINTS)
            for (name, points), shade in zip(lines.items(), parts.SHADES)
            if points
        ]
        if shown:
            charts.append(
                {
                    "name": "statistics",
                    "title": parts.short(title.replace("_", " ").capitalize()),
                    "unit": "",
                    "lines": shown,
                }
            )
    return charts


def leaves(name: str, figure: Any, depth: int = 3) -> Iterator[tuple[str, float]]:
    """Dotted name and value of every number that lies no deeper."""
    if isinstance(figure, dict):
        for key, each in figure.items() if depth else ():
            yield from leaves(f"{name}.{key}" if name else str(key), each, depth - 1)
    elif (value := number(figure)) is not None:
        yield name, value


def links(sections: list[str]) -> list[str]:
    """To every section that is there."""
    found = []
    for each in sections:
        if each:
            name = each.split('id="', 1)[1].split('"', 1)[0]
            title = each.split("<h2>", 1)[1].split("</h2>", 1)[0]
            found.append(f'<a href="#{name}">{title}</a>')
    return found


def curves(run: Run) -> str:
    """Places for the charts, which the page's script draws, with what they show."""
    if not run.metrics:
        return section("curves", "Curves", tag("p", "No step has been written down yet."))
    controls = (
        '<div class="controls"><label>smoothing <input id="smooth" type="range" min="0" max="100" value="30"></label>'
        '<label><input id="logarithmic" type="checkbox"> logarithmic loss</label>'
        '<label>over <select id="axis"><option value="step">steps</option><option value="tokens">tokens</option>'
        '</select></label><span id="marks"></span><small>drag to zoom, double-click for all</small></div>'
    )
    alone = "<noscript><p>Curves are drawn by the page's own script, which is switched off.</p></noscript>"
    return section("curves", "Curves", controls, alone, '<div id="charts"></div>')


def content(run: Run) -> dict[str, Any]:
    """What the script draws."""
    charts = []
    for name, title, unit, lines in CHARTS:
        shown = []
        for figure, label, shade in lines:
            points = run.series(figure)
            if points:
                shown.append(curve(label, shade, points, MOST_POINTS))
        if shown and not (name == "tflops" and run.series("mfu")):
            charts.append({"name": name, "title": title, "unit": unit, "lines": shown})
    charts += statistics(run)
    marks = []
    for event, step in places(run):
        kind, began = event["event"], number(event.get("first_step"))
        if kind in MARKS and step is not None and not (kind == "start" and began == 1):
            said = event.get("text") or event.get("error") or event.get("reason") or ""
            marks.append({"step": step, "kind": kind, "text": hidden(parts.short(said), run)})
    loud = [mark for mark in marks if mark["kind"] != "save"][-MOST_MARKS:]
    saves = [mark for mark in marks if mark["kind"] == "save"][-MOST_MARKS:]
    tokens = [[step, value] for step, value in thinned(run.series("tokens"), 500)]
    return {"charts": charts, "marks": saves + loud, "tokens": tokens}
