"""What a profile's events were busy with: kinds of work, told by the names of events and of what they lie in.

On the CPU an event's own time counts, without that of the events within it; on CUDA the time of the device's kernels
that it launched. A collective is one wherever it lies, attention too; the loss (with the output matrix) and the
optimizer keep all else that lies in them; the rest is told apart by the operation's name.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from megacore.schedule.instruction import Instruction

GEMM, ATTENTION, ELEMENTWISE = "gemm", "attention", "norms, activations, elementwise"
LOSS, OPTIMIZER, COPIES, OTHER = "loss", "optimizer", "copies", "idle, other"
COLLECTIVES = "collectives "
"""And the axis."""
ORDER = (GEMM, ATTENTION, ELEMENTWISE, LOSS, OPTIMIZER, COPIES, COLLECTIVES, OTHER)

AXES = MappingProxyType({"dp_cp": "dp", "dp_shard": "dp", "dp_replicate": "dp", "kv": "tp", "edp": "dp"})
"""Axes of the mesh that are parts or products of what users know as axes."""
COLLECTIVE = re.compile(r"(\w+) (all_reduce|all_gather|reduce_scatter|all_to_all|broadcast|exchange)")
"""As `mesh/named.py` names them: axis and operation."""

_LEAVES: Sequence[tuple[str, re.Pattern[str]]] = (
    (
        GEMM,
        re.compile(
            r"(aten::)?_?(mm|addmm|bmm|baddbmm|addbmm|linear|matmul|dot|mv|addmv|scaled_mm|grouped_mm)(_out)?"
            r"|.*(gemm|nvjet|cutlass|wgmma|_linear_pointwise|mkldnn_linear).*"
        ),
    ),
    (
        COPIES,
        re.compile(
            r"(aten::)?(copy_|_to_copy|to|clone|contiguous|cat|stack|repeat|fill_|zero_|zeros|full|empty\w*)"
            r"|.*(Memcpy|Memset|CatArrayBatched).*"
        ),
    ),
)
_WITHIN: Sequence[tuple[str, re.Pattern[str]]] = (
    (ATTENTION, re.compile(r"aten::_?scaled_dot_product_\w+|.*(flash_fwd|flash_bwd|fmha|flash_attn|sdpa).*")),
    (LOSS, re.compile(r"_?LinearCrossEntropy(Backward)?")),
)


class Event(NamedTuple):
    """An event of a profile: microseconds of it that count, which are its own and not those of events within it."""

    name: str
    own_us: float
    within: tuple["Event", ...] = ()


def by_kind(events: Iterable[Event], span_us: float) -> dict[str, float]:
    """Milliseconds of each kind of work, in the order of ``ORDER``; what of ``span_us`` was none is idle or other.

    Where a device does several things at once, kinds overlap, and nothing may be idle though their sum is no less.
    """
    found: dict[str, float] = defaultdict(float)
    for kind, own_us in _walk(events):
        found[kind] += own_us
    known = sum(us for kind, us in found.items() if kind != OTHER)
    found[OTHER] = max(0.0, span_us - known)
    return {kind: found[kind] / 1000 for kind in sorted(found, key=_place)}


def by_instruction(events: Iterable[Event]) -> dict[str, float]:
    """Milliseconds within instructions of each op, such as F and B."""
    found: dict[str, float] = defaultdict(float)
    left = list(events)
    while left:
        event = left.pop()
        op = _op_of(event.name)
        if op:
            found[op] += _whole(event) / 1000
        else:
            left += event.within
    return dict(sorted(found.items()))


def _walk(events: Iterable[Event]) -> Iterator[tuple[str, float]]:
    """Each event's kind and own time."""
    left = [(event, "") for event in events]
    while left:
        event, outer = left.pop()
        kind = outer if outer.startswith(COLLECTIVES) or outer == ATTENTION else _container(event.name) or outer
        yield kind or _leaf(event.name), event.own_us
        left += [(each, kind) for each in event.within]


def _container(name: str) -> str:
    """The kind of everything within an event, if its name says one."""
    if collective := COLLECTIVE.fullmatch(name):
        return COLLECTIVES + AXES.get(collective[1], collective[1])
    if name == "O":
        return OPTIMIZER
    return next((kind for kind, pattern in _WITHIN if pattern.fullmatch(name)), "")


def _leaf(name: str) -> str:
    """The kind of one operation."""
    if _op_of(name) or name.startswith("step "):
        return OTHER
    return next((kind for kind, pattern in _LEAVES if pattern.fullmatch(name)), ELEMENTWISE)


def _op_of(name: str) -> str:
    """The letters of an instruction's name, or of the first of several; else nothing."""
    try:
        instruction = Instruction.parse(name.partition(" ")[0])
    except ValueError:
        return ""
    return (re.match("[A-Z]+", str(instruction)) or [""])[0]


def _whole(event: Event) -> float:
    left, total = [event], 0.0
    while left:
        event = left.pop()
        total += event.own_us
        left += event.within
    return total


def _place(kind: str) -> tuple[int, str]:
    return next(place for place, name in enumerate(ORDER) if kind.startswith(name)), kind


def merged(ranks: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean over ranks, kind by kind."""
    kinds = sorted({kind for rank in ranks for kind in rank}, key=_place)
    return {kind: sum(rank.get(kind, 0.0) for rank in ranks) / len(ranks) for kind in kinds}


def table(kinds: Mapping[str, float], num_steps: int) -> list[str]:
    """Lines for people: milliseconds per step and share of all."""
    total = sum(kinds.values()) or 1.0
    width = max(len(kind) for kind in kinds)
    return [f"{kind:<{width}}  {ms / num_steps:10.2f} ms  {ms / total:6.1%}" for kind, ms in kinds.items()]


def as_json(kinds: Mapping[str, float], num_steps: int) -> dict[str, Any]:
    """The same for programs."""
    total = sum(kinds.values()) or 1.0
    return {kind: {"ms": round(ms / num_steps, 4), "share": round(ms / total, 5)} for kind, ms in kinds.items()}
