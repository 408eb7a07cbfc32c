"""Who holds up all others: rules that judge what was heard of ranks, without a clock or a connection of their own.

A rank that is stopped, frozen or cut off sends nothing: it is *silent*. One that is alive but does not come to a
collective that its peers wait in (an endless loop, a lost message, a slow disk) is *late*: nobody gets on, and it has
begun fewer collectives than those it shares them with, or waits for nobody. (How many a rank begins in all says
nothing: pipeline ranks in the middle have more messages than those at the ends.)
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

SLOW = 10.0
"""Usual steps after which nobody has got on."""


@dataclass(frozen=True)
class Limits:
    """Seconds: until a silent rank is named; until all ranks are ended because of it; and without any progress until
    they are ended, 0: never. (A late rank is named after ``SLOW`` usual steps, or as late as a silent one.)"""

    silent_s: float = 6.0
    abort_s: float = 60.0
    step_s: float = 0.0


@dataclass
class Seen:
    """What rank 0 knows of a rank."""

    host: str
    pid: int
    heard: float
    """When it was heard last, in seconds of rank 0's monotonic clock."""
    changed: float
    """When what it does changed last."""
    beat: Mapping[str, Any] = field(default_factory=dict)
    stack: str = ""


@dataclass(frozen=True)
class Finding:
    """Who holds up the others, since when, and how that is said."""

    kind: str
    """silent or late."""
    rank: int
    seconds: float
    text: str


def silent(seen: Mapping[int, Seen], now: float, limits: Limits) -> Iterator[Finding]:
    """Ranks of which nothing is heard."""
    for rank, each in sorted(seen.items()):
        quiet = now - each.heard
        if quiet >= limits.silent_s:
            where = f"rank {rank} ({each.host}, process {each.pid})"
            text = (
                f"{where} has been silent for {quiet:.0f} s: it is stopped, frozen or cut off. It was last seen in "
                f"{described(each.beat)}"
            )
            yield Finding("silent", rank, quiet, text)


def late(seen: Mapping[int, Seen], now: float, limits: Limits) -> Finding | None:
    """The rank that is behind where nobody has got on for longer than a step may last."""
    if not seen or any(each.beat.get("doing") != "step" for each in seen.values()):
        return None
    stuck = now - max(each.changed for each in seen.values())
    typical = max(each.beat["typical_s"] for each in seen.values())
    if stuck < (max(limits.silent_s, SLOW * typical) if typical else limits.step_s or math.inf):
        return None
    rank, behind = held_up_by({rank: each.beat for rank, each in seen.items()})
    each = seen[rank]
    who = f"rank {rank} ({each.host}, process {each.pid})"
    what = f"is behind its peers by {behind} collectives" if behind else "is where all others are"
    if not each.beat.get("waits", True):
        what += " and waits for nobody" if behind else ", but waits for nobody"
    text = f"nothing has happened for {stuck:.0f} s: {who} {what}, in {described(each.beat)}"
    return Finding("late", rank, stuck, text)


def held_up_by(beats: Mapping[int, Mapping[str, Any]]) -> tuple[int, int]:
    """The rank that most likely holds up all, and how many collectives and messages it is behind those it shares them
    with. Who waits for nobody comes before those who wait; then who is behind in most; then who is in an earlier step.
    """
    most: dict[str, int] = {}
    for beat in beats.values():
        for name, number in beat.get("counts", {}).items():
            most[name] = max(most.get(name, 0), number)

    def behind(rank: int) -> int:
        counts = beats[rank].get("counts", {})
        return sum(most[name] - number for name, number in counts.items())

    def order(rank: int) -> tuple[bool, int, int, int]:
        return bool(beats[rank].get("waits", True)), -behind(rank), beats[rank]["step"], rank

    rank = min(beats, key=order)
    return rank, behind(rank)


def described(beat: Mapping[str, Any]) -> str:
    """Where a rank is, in words."""
    after = f", after {beat['last']} (collective {beat['collectives']})" if beat.get("last") else ""
    doing = "" if beat.get("doing") == "step" else f"{beat.get('doing', 'start-up')}, "
    return f"{doing}step {beat.get('step', 0)}{after}"
