"""The parts of the page that are tables and bars."""

import base64
import time
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from types import MappingProxyType
from typing import Any

from megacore.config.schema import RunConfig
from megacore.config.write import flatten, toml_value
from megacore.monitor.console import human_bytes, human_count, human_time
from megacore.monitor.report.markup import bar, section, table, tag, text
from megacore.monitor.report.reading import Run, checkpoints, is_step, number, places

SHADES = ("blue", "orange", "green", "purple", "red", "teal", "grey", "pink")
LOUD = frozenset(
    {"spike", "rewind", "skip", "hang", "corruption", "straggler", "fault", "alert", "save_failed", "warning"}
)
QUIET = frozenset({"sample", "timeline", "profile", "alert_over"})
MOST_EVENTS, MOST_SAMPLES = 1000, 12
LONGEST = 400
ELSEWHERE = frozenset({"time", "event", "text", "step", "error", "startup_s", "versions", "kinds"})
"""Of an event: what stands in other columns and sections."""
LABELS = MappingProxyType({"bytes": "size", "seconds": "took"})
STATUS = MappingProxyType(
    {
        "finished": "finished",
        "stopped": "stopped, as was asked",
        "failed": "ended by a fault",
        "running": "running",
        "lost": "ended without a word",
    }
)


def heading(run: Run) -> str:
    """What was run and how it stands."""
    start, steps = run.start, run.config.train.steps if run.config else None
    about = []
    if run.config is not None and run.config.model.num_layers:
        m = run.config.model
        about.append(f"{m.family}, {m.num_layers} layers × {m.hidden_size}")
    if (parameters := number(start.get("parameters"))) is not None:
        about.append(f"{human_count(parameters)} parameters")
    if start.get("layout"):
        about.append(f"{start['layout']} on {start.get('world_size')} ranks")
    if run.config is not None:
        about.append(run.config.precision.dtype)
    badge = tag("span", text(STATUS[run.status]), class_=f"badge {run.status}")
    name = run.folder.resolve().name or str(run.folder)
    head = tag("h1", text(name) + " " + badge) + tag("p", text(" · ".join(about)), class_="about")
    step = number(run.last.get("step"))
    done = min(1.0, step / steps) if steps and step is not None else 0.0
    line = tag("div", tag("i", "", style=f"width:{done:.2%}"), class_="progress", title=f"{done:.1%} of all steps")
    return head + line + tag("div", "".join(tiles(run)), class_="tiles")


def tiles(run: Run) -> Iterator[str]:
    """The figures that are asked for first."""
    last, steps = run.last, run.config.train.steps if run.config else None
    if last:
        yield tile("step", f"{last['step']:,}", f"of {steps:,}" if steps else "")
    losses = run.series("loss")
    if losses:
        near = [value for _, value in losses[-max(1, len(losses) // 20) :]]
        yield tile("training loss", f"{sum(near) / len(near):.4f}", f"from {losses[0][1]:.2f}")
    if validated := run.series("val_loss"):
        step, best = min(validated, key=lambda point: point[1])
        yield tile("validation loss", f"{validated[-1][1]:.4f}", f"best {best:.4f} at step {step:.0f}")
    if (tokens := number(last.get("tokens"))) is not None:
        yield tile("tokens", human_count(tokens))
    if rates := sorted(value for _, value in run.series("tokens_per_s")):
        yield tile("throughput", f"{human_count(rates[len(rates) // 2])} tok/s", "median")
    if shares := sorted(value for _, value in run.series("mfu")):
        yield tile("MFU", f"{shares[len(shares) // 2]:.1%}", "median")
    if peaks := [value for _, value in run.series("memory_gb")]:
        yield tile("peak memory", f"{max(peaks):.2f} GB", "of the rank that needed most")
    if energy := [value for _, value in run.series("gpu.joules_per_token")]:
        yield tile("energy", f"{sum(energy) / len(energy):.3g} J/token")
    if run.goodput is not None:
        yield tile("goodput", f"{run.goodput.share:.1%}", f"of {human_time(run.goodput.wall_s)}")
    pace = number(last.get("step_time_s"))
    if run.status == "running" and steps and pace is not None:
        yield tile("left", human_time(max(0, steps - last["step"]) * pace), "at the newest pace")


def tile(name: str, figure: str, more: str = "") -> str:
    """One figure."""
    return tag("div", tag("span", text(name)) + tag("strong", text(figure)) + tag("small", text(more)), class_="tile")


def problems(run: Run) -> str:
    """What could not be read, and what a reader should see first."""
    lines = list(run.damaged)
    if run.config is None:
        lines.append(f"the configuration cannot be read by this version: {run.config_problem}")
    if run.status == "lost":
        lines.append(f"nothing has been written for {human_time(run.age_s)}, and no end: the run was killed, or hangs")
    for fault in run.named("fault")[-1:]:
        if run.status == "failed":
            lines.append(f"the run was ended by {short(fault.get('error'))}")
    return tag("ul", "".join(tag("li", text(line)) for line in lines), class_="problems") if lines else ""


def time_spent(run: Run) -> str:
    """Goodput, and start-up phase by phase."""
    if run.goodput is None:
        return ""
    g = run.goodput
    parts = [
        ("steps that count", g.training_s, human_time(g.training_s)),
        (f"start-up ({g.num_starts}×)", g.startup_s, human_time(g.startup_s)),
        ("evaluation, saves and what was lost", g.rest_s, human_time(g.rest_s)),
    ]
    found = bar(shares(parts), ("green", "blue", "grey"))
    phases = run.start.get("startup_s")
    if isinstance(phases, dict):
        known = [(str(name), number(seconds) or 0.0) for name, seconds in phases.items()]
        rows = shares([(name, seconds, human_time(seconds)) for name, seconds in known])
        found += tag("h3", "Newest start-up") + bar(rows, SHADES) if rows else ""
    return section("time", "Where the time went", found)


def shares(parts: Sequence[tuple[str, float, str]]) -> list[tuple[str, float, str]]:
    """The same with shares in place of amounts; empty where there is nothing."""
    total = sum(max(0.0, amount) for _, amount, _ in parts)
    return [(name, max(0.0, amount) / total, figure) for name, amount, figure in parts] if total > 0 else []


def timeline(run: Run) -> str:
    """The picture of a timed step, as an image: nothing within it can run."""
    if not run.timeline:
        return ""
    source = "data:image/svg+xml;base64," + base64.b64encode(run.timeline).decode()
    image = tag("img", "", src=source, alt="when each rank did what", class_="picture").replace("</img>", "")
    found = run.named("timeline")
    note = ""
    if found and (bubble := number(found[-1].get("bubble"))) is not None:
        note = f"Step {found[-1].get('step')}: {bubble:.1%} of the ranks' time was idle."
    return section("schedule", "Schedule", image, note=note)


def memory(run: Run) -> str:
    """What each pipeline rank should need, component by component."""
    ranks = run.memory()
    if not ranks:
        return ""
    names = [each.name for each in fields(ranks[0]) if each.name not in ("host", "context", "fragmentation")]
    most = max(rank.allocated for rank in ranks) or 1
    rows = []
    for number_, rank in enumerate(ranks):
        parts = [(name, getattr(rank, name) / most, human_bytes(getattr(rank, name))) for name in names]
        free = 1 - sum(share for _, share, _ in parts)
        pieces = "".join(
            tag("i", "", style=f"flex:{share:.6f} 1 0;background:var(--{shade})", title=f"{name}: {figure}")
            for (name, share, figure), shade in zip(parts, SHADES, strict=False)
            if share > 0
        )
        rest = tag("i", "", style=f"flex:{max(0.0, free):.6f} 1 0") if free > 0 else ""
        cells = (text(number_), tag("div", pieces + rest, class_="bar thin"), text(human_bytes(rank.allocated)))
        rows.append((*cells, *(text(figure) for _, _, figure in parts)))
    keys = "".join(
        tag("li", tag("b", "", style=f"background:var(--{shade})") + text(name))
        for name, shade in zip(names, SHADES, strict=False)
    )
    peaks = [value for _, value in run.series("memory_gb")]
    measured = f" Measured at most {max(peaks):.2f} GB" if peaks else ""
    cpu = run.config is not None and run.start.get("device") in ("cpu", "CPU")
    of = ", of a process with all its libraries." if cpu and peaks else "." if peaks else ""
    note = f"Tensors on each pipeline rank, as the planner counts them.{measured}{of}"
    body = tag("ul", keys, class_="keys") + table(("rank", "", "all", *names), rows, class_="scroll memory even")
    return section("memory", "Memory", body, note=note)


def kinds(run: Run) -> str:
    """What profiled steps were busy with."""
    found = run.named("profile")
    if not found or not isinstance(found[-1].get("kinds"), dict):
        return ""
    parts = []
    for name, figures in found[-1]["kinds"].items():
        ms = number(figures.get("ms")) if isinstance(figures, dict) else None
        if ms is not None:
            parts.append((str(name), ms, f"{ms:.2f} ms"))
    rows = shares(parts)
    return section("work", "What a step is busy with", bar(rows, SHADES * 4) if rows else "")


def short(value: Any) -> str:
    """At most so much of a text that a table can show."""
    shown = str(value)
    return shown if len(shown) <= LONGEST else shown[: LONGEST - 1] + "…"


def fact(name: str, value: Any, depth: int = 3) -> str:
    """A detail of an event, as people read it."""
    known = number(value)
    if known is not None and known >= 0:
        if name == "bytes":
            return human_bytes(known)
        if name == "seconds" or name.endswith("_s"):
            return human_time(known)
        if name == "goodput":
            return f"{known:.1%}"
    if isinstance(value, (list, dict)):
        if not depth:
            return "…"
        if isinstance(value, list):
            return ", ".join(fact(name, each, depth - 1) for each in value)
        return ", ".join(f"{key} {fact(str(key), each, depth - 1)}" for key, each in value.items())
    if name in ("checkpoint", "removed"):
        return Path(str(value)).name
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if is_step(value) and name not in ("step", "first_step", "last_step") else str(value)


def events(run: Run) -> str:
    """What happened, newest first."""
    found = [(event, step) for event, step in places(run) if event["event"] not in ("sample",)]
    rows = []
    for event, step in found[::-1][:MOST_EVENTS]:
        name = event["event"]
        loudness = "loud" if name in LOUD else "quiet" if name in QUIET else ""
        facts = {key: value for key, value in event.items() if key not in ELSEWHERE}
        said = event.get("text") or event.get("error") or ""
        more = ", ".join(
            f"{LABELS.get(key, key.removesuffix('_s').replace('_', ' '))} {short(fact(key, value))}"
            for key, value in facts.items()
            if value not in (None, "", [], {})
        )
        what = (text(short(said)) + " " if said else "") + tag("small", text(short(more)))
        when, kind = tag("time", text(clock(event["time"]))), tag("span", text(name), class_=f"kind {loudness}")
        rows.append((when, text("" if step is None else step), kind, what))
    note = f"The newest {MOST_EVENTS} of {len(found)}." if len(found) > MOST_EVENTS else ""
    body = table(("time", "step", "event", ""), rows, class_="scroll tall events") if rows else ""
    return section("events", "Events", body, note=note)


def clock(seconds: Any) -> str:
    """UTC, as people and machines read it."""
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(float(seconds)))
    except (OverflowError, OSError, ValueError):
        return "?"


def samples(run: Run) -> str:
    """Texts that the model wrote, newest first."""
    found = run.named("sample")[::-1][:MOST_SAMPLES]
    cards = "".join(
        tag(
            "figure",
            tag("figcaption", text(f"step {each.get('step')}"))
            + tag("pre", tag("mark", text(each.get("prompt", ""))) + text(each.get("text", ""))),
        )
        for each in found
    )
    return section("samples", "Samples", tag("div", cards, class_="samples") if cards else "")


def saved(run: Run) -> str:
    """Every checkpoint that was written."""
    rows = []
    for each in checkpoints(run):
        size, seconds, when = (number(each.get(name)) for name in ("bytes", "seconds", "time"))
        state = tag("span", "kept", class_="kind") if each["kept"] else tag("span", "removed", class_="kind quiet")
        rows.append(
            (
                text(each["step"]),
                state,
                text("" if size is None else human_bytes(size)),
                text("" if seconds is None else human_time(seconds)),
                text("" if when is None else clock(when)),
                tag("code", text(each.get("checkpoint", ""))),
            )
        )
    body = table(("step", "", "size", "took", "time", "folder"), rows, class_="scroll tall even") if rows else ""
    return section("checkpoints", "Checkpoints", body)


def configuration(run: Run) -> str:
    """What differs from the defaults, and the whole file."""
    body = ""
    if run.config is not None:
        usual = flatten(RunConfig())
        rows = [
            (
                tag("code", text(key)),
                tag("code", text(toml_value(value))),
                tag("code", text(short(toml_value(usual[key]))), class_="dim"),
            )
            for key, value in flatten(run.config).items()
            if value != usual[key]
        ]
        body = table(("key", "value", "default"), rows, class_="scroll config")
    if run.config_text:
        body += tag("details", tag("summary", "config.toml") + tag("pre", text(run.config_text)))
    return section("config", "Configuration", body, note="What differs from the defaults." if run.config else "")


def environment(run: Run) -> str:
    """Where it ran, start by start."""
    rows = []
    for start in run.named("start")[::-1][:50]:
        versions = start.get("versions")
        known = ", ".join(f"{key} {value}" for key, value in versions.items()) if isinstance(versions, dict) else ""
        of = [start.get(name, "") for name in ("host", "device", "world_size", "layout", "first_step", "config_hash")]
        rows.append((text(clock(start["time"])), *(text(short(each)) for each in of), text(known)))
    header = ("start", "host", "device", "ranks", "layout", "first step", "config", "versions")
    return section("environment", "Environment", table(header, rows) if rows else "")


def console(run: Run) -> str:
    """The end of the log."""
    if not run.log:
        return ""
    return section("log", "Log", tag("details", tag("summary", "the end of log.txt") + tag("pre", text(run.log))))
