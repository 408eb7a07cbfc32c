"""A plan as one HTML page that holds everything in itself: figures, pictures, reasons, money, lines to paste."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

from megacore.cost.economics import Bill, Failures
from megacore.cost.estimate import GB, Estimate, terms
from megacore.cost.explain import Verdict

STYLE = """
:root { --ink: #1f2430; --grey: #5d6673; --line: #e1e5eb; --blue: #2457b8; --paper: #fff; --ground: #f5f7fa; }
* { box-sizing: border-box } html { scroll-behavior: smooth }
body { margin: 0; background: var(--ground); color: var(--ink); font: 15px/1.55 ui-sans-serif, system-ui, "Segoe UI",
  Helvetica, Arial, sans-serif }
header { background: linear-gradient(120deg, #16346f, #2457b8 55%, #3f7fd6); color: #fff; padding: 44px 0 92px }
header h1 { margin: 0 0 6px; font-size: 30px; letter-spacing: -.02em } header p { margin: 0; opacity: .88 }
header code { background: rgba(255, 255, 255, .14); color: #fff }
.wide { max-width: 1080px; margin: 0 auto; padding: 0 24px }
main { margin-top: -62px; padding-bottom: 48px }
section { background: var(--paper); border: 1px solid var(--line); border-radius: 14px; padding: 24px 28px;
  margin: 0 0 20px; box-shadow: 0 1px 3px rgba(31, 36, 48, .05); overflow-x: auto }
h2 { margin: 0 0 14px; font-size: 18px; letter-spacing: -.01em } h2 small { font-weight: 400; color: var(--grey);
  font-size: 13.5px; margin-left: 8px }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 14px; margin-bottom: 20px }
.card { background: var(--paper); border: 1px solid var(--line); border-radius: 14px; padding: 16px 18px;
  box-shadow: 0 4px 14px rgba(31, 36, 48, .07) }
.card b { display: block; font-size: 24px; letter-spacing: -.02em; font-variant-numeric: tabular-nums }
.card span { color: var(--grey); font-size: 13px }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: 14px }
th { text-align: right; color: var(--grey); font-weight: 500; padding: 6px 10px; border-bottom: 1px solid var(--line) }
td { text-align: right; padding: 7px 10px; border-bottom: 1px solid var(--line); vertical-align: top }
th:first-child, td:first-child, .left { text-align: left } tr:last-child td { border-bottom: 0 }
tr.best td { background: #eef4fe; font-weight: 600 }
code, pre { font: 13px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; background: #eef1f5;
  border-radius: 6px } code { padding: 1px 6px } pre { padding: 16px 18px; margin: 0; overflow-x: auto }
svg { max-width: 100%; height: auto; display: block }
.bar { display: flex; height: 26px; border-radius: 7px; overflow: hidden; margin: 4px 0 12px } .bar i { display: block }
.keys { display: flex; flex-wrap: wrap; gap: 6px 18px; font-size: 13px; color: var(--grey) }
.keys i { display: inline-block; width: 10px; height: 10px; border-radius: 3px; margin-right: 6px }
.no { color: #a8341a } .yes { color: #1f7a4c } footer { color: var(--grey); font-size: 13px; padding: 0 4px }
ul { margin: 8px 0 0; padding-left: 20px } figure { margin: 0 0 6px }
"""
LARGEST_PICTURE = 200_000
"""Characters of a picture that a page takes."""
TERM_HUES = (
    "#2457b8",
    "#8fb8f2",
    "#e8ebf0",
    "#e9a30c",
    "#a8341a",
    "#2f8f5b",
    "#7a4a78",
    "#1f7a8c",
    "#b3476b",
    "#6b7482",
)


@dataclass(frozen=True)
class Figure:
    """A picture (SVG text) with its heading and a line of what it shows."""

    title: str
    shows: str
    svg: str


@dataclass(frozen=True)
class Report:
    """What a page says. ``command`` is the line that makes it again."""

    title: str
    command: str
    best: Sequence[Estimate]
    verdicts: Sequence[Verdict]
    runner_up: str
    figures: Sequence[Figure]
    lines: str
    lasting: Failures
    price: float
    bill: Bill | None = None
    deadline: str = ""


def page(report: Report) -> str:
    """The whole page."""
    title, winner = escape(report.title), report.best[0]
    body = "".join(
        (
            _cards(winner, report),
            _section("Where a step goes", f"{winner.step.seconds:.3g} s", _bar(winner)),
            _section("The fastest layouts that fit", "one of each kind", _table(report.best)),
            _section("Why", "priced term by term", _reasons(report)),
            *(_section(each.title, each.shows, _figure(each)) for each in report.figures),
            _section("Time, money and failures", "", _economics(report)),
            _section("Run file", "paste these lines", f"<pre>{escape(report.lines)}</pre>"),
            _section("Notes", "", _list(winner.notes)) if winner.notes else "",
        )
    )
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head><body>'
        f'<header><div class="wide"><h1>{title}</h1><p>{escape(winner.name())}</p>'
        f"<p><code>{escape(report.command)}</code></p></div></header>"
        f"<main class=\"wide\">{body}<footer>Predicted from the model's shapes and the machine's figures; nothing here "
        "was measured. 1 GB is 10<sup>9</sup> bytes.</footer></main></body></html>\n"
    )


def _figure(figure: Figure) -> str:
    """The picture, if it is no larger than a page should be."""
    if len(figure.svg) <= LARGEST_PICTURE:
        return f"<figure>{figure.svg}</figure>"
    return f"<p>{len(figure.svg) / 1e6:.1f} MB, too large for this page; --plot FOLDER writes it as a file.</p>"


def _cards(winner: Estimate, report: Report) -> str:
    cards = [
        (f"{winner.tokens_per_s_per_gpu:,.0f}", "tokens/s per GPU"),
        ("unknown" if winner.mfu is None else f"{winner.mfu:.1%}", "model FLOPs utilization"),
        (f"{winner.step.seconds:.3g} s", f"step of {winner.tokens / 1e6:.2f}M tokens"),
        (f"{winner.step.bubble_fraction:.1%}", "pipeline bubble"),
        (f"{winner.worst.total / GB:.1f} GB", f"memory, of {winner.limit / GB:.1f} GB"),
    ]
    if report.bill:
        cards.append((f"{report.bill.days:,.1f} days", f"${report.bill.cost:,.0f} in all"))
    else:
        cards.append((f"{report.lasting.goodput:.1%}", "goodput under failures"))
    inner = "".join(
        f'<div class="card"><b>{escape(value)}</b><span>{escape(what)}</span></div>' for value, what in cards
    )
    return f'<div class="cards">{inner}</div>'


def _section(title: str, small: str, inner: str) -> str:
    note = f"<small>{escape(small)}</small>" if small else ""
    return f"<section><h2>{escape(title)}{note}</h2>{inner}</section>"


def _bar(found: Estimate) -> str:
    parts = [(name, seconds) for name, seconds in terms(found.step).items() if seconds > 0]
    whole = sum(seconds for _, seconds in parts) or 1.0
    hues = dict(zip((name for name, _ in parts), TERM_HUES))
    bars = "".join(
        f'<i style="width:{seconds / whole:.3%};background:{hues.get(name, "#6b7482")}" title="{escape(name)}"></i>'
        for name, seconds in parts
    )
    keys = "".join(
        f'<span><i style="background:{hues.get(name, "#6b7482")}"></i>{escape(name)} {seconds:.3g} s '
        f"({seconds / whole:.1%})</span>"
        for name, seconds in parts
    )
    return f'<div class="bar">{bars}</div><div class="keys">{keys}</div>'


def _table(best: Sequence[Estimate]) -> str:
    head = ("layout", "tokens/s/GPU", "MFU", "step", "bubble", "memory", "batch")
    rows = [
        (
            each.name(),
            f"{each.tokens_per_s_per_gpu:,.0f}",
            "" if each.mfu is None else f"{each.mfu:.1%}",
            f"{each.step.seconds:.3g} s",
            f"{each.step.bubble_fraction:.1%}",
            f"{each.worst.total / GB:.1f} GB",
            f"{each.config.train.global_batch_size:,}",
        )
        for each in best
    ]
    return _rows(head, rows, first="best")


def _rows(head: Sequence[str], rows: Sequence[Sequence[str]], first: str = "") -> str:
    cells = "".join(f"<th>{escape(name)}</th>" for name in head)
    lines = "".join(
        f"<tr{f' class={first}' if first and not number else ''}>"
        + "".join(f"<td>{escape(cell)}</td>" for cell in row)
        + "</tr>"
        for number, row in enumerate(rows)
    )
    return f"<table><thead><tr>{cells}</tr></thead><tbody>{lines}</tbody></table>"


def _reasons(report: Report) -> str:
    lead = f"<p>{escape(report.runner_up)}</p>" if report.runner_up else ""
    lines = "".join(
        f"<tr><td>{escape(each.name)}</td><td>{_pace(each)}</td>"
        f'<td class="left">{escape(each.estimate.name()) if each.slower is not None and each.estimate else ""}</td>'
        f'<td class="left">{escape(each.why)}</td></tr>'
        for each in report.verdicts
    )
    head = '<tr><th>what people take</th><th>against the winner</th><th class="left">its best layout</th>'
    return f'{lead}<table><thead>{head}<th class="left">why</th></tr></thead><tbody>{lines}</tbody></table>'


def _pace(verdict: Verdict) -> str:
    if verdict.slower is None:
        return '<span class="no">cannot run</span>'
    return '<span class="yes">winner</span>' if verdict.slower == 0 else f"{verdict.slower:+.1%} time"


def _economics(report: Report) -> str:
    return _list(tuple(economics_lines(report.lasting, report.bill, report.deadline)))


def economics_lines(lasting: Failures, bill: Bill | None, deadline: str) -> Iterator[str]:
    """What a plan says of money and failures, for a page and for a terminal."""
    if bill:
        yield (
            f"{bill.tokens:.3g} tokens: {bill.steps:,} steps, {bill.days:,.1f} days, {bill.gpu_hours:,.0f} GPU-hours, "
            f"${bill.cost:,.0f} at ${bill.price_per_gpu_hour:g} per GPU-hour, failures included"
        )
    if deadline:
        yield deadline
    yield (
        f"goodput {lasting.goodput:.1%}: a failure every {lasting.mtbf_s / 3600:,.1f} h; save every "
        f"{lasting.interval_steps:,} steps ({lasting.interval_s / 60:,.1f} min; a save stalls {lasting.save_s:.2g} s, "
        f"a restart takes {lasting.restart_s / 60:.3g} min)"
    )


def _list(lines: Sequence[str]) -> str:
    return f"<ul>{''.join(f'<li>{escape(line)}</li>' for line in lines)}</ul>"
