"""A plan as lines of text."""

from collections.abc import Callable, Sequence

from megacore.cost.economics import Bill, Failures
from megacore.cost.estimate import GB, Estimate, terms
from megacore.cost.machine import Machine
from megacore.cost.outcome import Outcome
from megacore.cost.page import economics_lines
from megacore.cost.planning import run_lines

Paint = Callable[..., str]
MACHINE_HEAD = ("name", "memory_gb", "bf16_tflops", "memory_gb_per_s", "gpus_per_node", "price_per_gpu_hour")
HEAD = ("", "layout", "tok/s/GPU", "MFU", "step", "bubble", "comm", "memory", "batch")


def table(rows: Sequence[Sequence[str]], left: int = 1, paint: Paint | None = None) -> list[str]:
    """Aligned columns, the first ``left`` of them to the left; the first row is the head."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = [
        "  ".join(
            cell.ljust(width) if number < left else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(row, widths))
        ).rstrip()
        for row in rows
    ]
    return [paint(lines[0], "dim") if paint else lines[0], *lines[1:]]


def screen(
    outcome: Outcome, lasting: Failures, paid: Bill | None, deadline: str, paint: Paint, width: int
) -> list[str]:
    """A search's answer: the best, why, what it costs, and the lines of a run file."""
    wish, winner, counts = outcome.wish, outcome.best[0], outcome.counts
    lines = [
        *title(wish.machine, winner, paint),
        paint(
            f"{counts.get('meshes', 0):,} meshes are legal, {counts.get('priced', 0):,} layouts were priced, "
            f"{counts.get('weighed', 0):,} weighed",
            "dim",
        ),
        "",
        *ranking(outcome.best, paint),
        "",
        paint("where a step goes", "bold"),
        *bars(winner, paint, width),
        "",
        paint("memory of the rank that needs most", "bold"),
        *memory_bar(winner, paint, width),
        "",
        paint("why", "bold"),
        *([f"  {outcome.runner_up}"] if outcome.runner_up else []),
    ]
    for verdict in outcome.verdicts:
        lines += [f"  {verdict.name}", *wrapped(verdict.why, width, "      ", paint)]
    lines += ["", paint("time, money and failures", "bold")]
    for line in economics_lines(lasting, paid, deadline):
        lines += wrapped(line, width, "  ")
    lines += ["", paint("for the run file", "bold"), *(f"  {line}".rstrip() for line in run_lines(winner).splitlines())]
    return [*lines, *notes(winner, paint, width)]


def screen_of_one(
    found: Estimate, machine: Machine, lasting: Failures, paid: Bill | None, paint: Paint, width: int
) -> list[str]:
    """One layout's price."""
    lines = [*title(machine, found, paint), "", *ranking([found], paint), "", paint("where a step goes", "bold")]
    lines += [*bars(found, paint, width), "", paint("memory of the rank that needs most", "bold")]
    lines += [*memory_bar(found, paint, width), "", paint("time, money and failures", "bold")]
    for line in economics_lines(lasting, paid, ""):
        lines += wrapped(line, width, "  ")
    return [*lines, *notes(found, paint, width)]


def title(machine: Machine, found: Estimate, paint: Paint) -> list[str]:
    """What is planned."""
    t = found.config.train
    batch = f"{t.global_batch_size:,} samples of {t.seq_len:,} tokens a step ({found.tokens / 1e6:.2f}M)"
    return [paint(f"{found.layout.world:,} x {machine.name}", "bold") + f", {batch}, {found.config.precision.dtype}"]


def ranking(best: Sequence[Estimate], paint: Paint) -> list[str]:
    """The layouts, fastest first."""
    rows = [HEAD]
    for number, each in enumerate(best, 1):
        waits = sum(each.step.communication.values())
        rows.append(
            (
                str(number),
                each.name(),
                f"{each.tokens_per_s_per_gpu:,.0f}",
                "?" if each.mfu is None else f"{each.mfu:.1%}",
                human(each.step.seconds),
                f"{each.step.bubble_fraction:.1%}",
                f"{waits / each.step.seconds:.1%}",
                f"{each.worst.total / GB:.1f} GB" + ("" if each.fits else "!"),
                f"{each.config.train.global_batch_size:,}",
            )
        )
    lines = table(rows, 2, paint)
    return [lines[0], paint(lines[1], "green", "bold") if best[0].fits else paint(lines[1], "red"), *lines[2:]]


def bars(found: Estimate, paint: Paint, width: int) -> list[str]:
    """The parts of a step, each with a bar."""
    parts = {name: seconds for name, seconds in terms(found.step).items() if seconds > 0.0005 * found.step.seconds}
    wide = max(map(len, parts), default=0)
    room = max(10, min(50, width - wide - 24))
    lines = []
    for name, seconds in parts.items():
        share = seconds / found.step.seconds
        lines.append(f"  {name:<{wide}}  {human(seconds):>9}  {share:6.1%}  {paint('█' * round(share * room), 'blue')}")
    return lines


def memory_bar(found: Estimate, paint: Paint, width: int) -> list[str]:
    """The components of the worst rank, and the limit."""
    worst, limit = found.worst, found.limit
    names = ("params", "grads", "optimizer", "activations", "buffers", "fragmentation", "context")
    room = max(10, min(50, width - 40))
    most = max(limit, worst.total)
    lines = []
    for name in names:
        size = getattr(worst, name)
        if size:
            lines.append(f"  {name:<13}  {size / GB:8.2f} GB  {paint('█' * round(size / most * room), 'cyan')}")
    colour = "green" if found.fits else "red"
    said = f"  {'total':<13}  {worst.total / GB:8.2f} GB  of {limit / GB:.1f} GB, on pipeline rank "
    lines.append(paint(said + str(found.memory.index(worst)), colour))
    if worst.host:
        lines.append(f"  {'host memory':<13}  {worst.host / GB:8.2f} GB  of each rank")
    return lines


def notes(found: Estimate, paint: Paint, width: int) -> list[str]:
    """What a user should know."""
    lines = [] if not found.notes else ["", paint("notes", "bold")]
    for note in found.notes:
        lines += wrapped(note, width, "  ")
    return lines


def machine_rows(machines: Sequence[Machine]) -> list[tuple[str, ...]]:
    """What `--gpu list` shows: the head, then a row for each."""
    rows: list[tuple[str, ...]] = [MACHINE_HEAD]
    for machine in machines:
        of = machine.accelerator
        rows.append(
            (
                machine.name,
                f"{of.memory_gb:g}",
                f"{of.bf16:g}",
                f"{of.memory_gb_per_s:g}",
                str(machine.gpus_per_node),
                f"{machine.price_per_gpu_hour:g}",
            )
        )
    return rows


def wrapped(text: str, width: int, indent: str, paint: Paint | None = None) -> list[str]:
    """Lines of at most ``width`` columns."""
    import textwrap

    lines = textwrap.wrap(text, max(40, width), initial_indent=indent, subsequent_indent=indent)
    return [paint(line, "dim") for line in lines] if paint else lines


def human(seconds: float) -> str:
    """Seconds with a unit that suits them."""
    return f"{seconds:.3g} s" if seconds >= 0.1 else f"{seconds * 1e3:.3g} ms"
