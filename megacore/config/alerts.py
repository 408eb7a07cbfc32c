"""Rules for alerts: a small language that is read here, never run as Python.

    grad_norm > 100
    loss > 1.5 * mean(loss, 50)                      the mean of the 50 records before this one
    share(grad_norm > clip_grad, 1000) > 5%          of the 1000 records before this one
    gpu.utilization.mean < 50% for 3                 three records in a row
    gpu.slowed.max > 0 for 60 s                      all records of a minute, however many these are
    event hang                                       something that events.jsonl names

Names are the numbers of metrics.jsonl, dotted where they lie deeper, and a few more (``MORE``). What a record does not
know (a GPU's figures on a CPU, a mean before there are enough records) makes a rule say nothing.
"""

import math
import re
import statistics
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from operator import add, ge, gt, le, lt, mul, sub
from types import MappingProxyType
from typing import Any

FIGURES = (
    *("step", "loss", "grad_norm", "lr", "tokens", "tokens_per_s", "step_time_s", "tflops_per_device", "mfu"),
    *("memory_gb", "val_loss"),
)
"""Numbers of metrics.jsonl."""
MORE = ("clip_grad", "steps_since_save", "memory_headroom")
"""optim.clip_grad where the global norm is clipped; steps since the last save where any are made; the share of a GPU's
memory that torch has never used, of the rank that has used most."""
GPU_FIGURES = ("utilization", "memory_used", "power_w", "temperature_c", "sm_clock_mhz", "ecc_errors", "slowed")
GPU_NAMES = (*(f"gpu.{name}.{part}" for name in GPU_FIGURES for part in ("mean", "min", "max")), "gpu.joules_per_token")
EVENTS = (
    *("hang", "spike", "rewind", "corruption", "straggler", "save_failed", "export_failed", "skip", "warning", "fault"),
    *("start", "resume", "stop", "finish"),
)
DEFAULTS = (
    "grad_norm > 100",
    "share(grad_norm > clip_grad, 1000) > 5%",
    "loss > 1.5 * mean(loss, 50)",
    "gpu.utilization.mean < 50% for 60 s",
    "gpu.slowed.max > 0 for 60 s",
    "gpu.ecc_errors.max > 0",
    "memory_headroom < 10%",
    # medians, and minutes: neighbours on a shared machine, a save or an evaluation make no alert. Tokens, not steps:
    # a batch that grows makes these longer
    "median(tokens_per_s, 10) < 0.7 * median(tokens_per_s, 200) for 180 s",
    "steps_since_save > 5000",
    *("event hang", "event spike", "event corruption", "event straggler", "event save_failed", "event fault"),
)
"""Usual limits of healthy training runs on large clusters."""

MOST_RECORDS = 100_000
COMPARISONS: Mapping[str, Callable[[float, float], bool]] = MappingProxyType({">": gt, "<": lt, ">=": ge, "<=": le})
ARITHMETIC: Mapping[str, Callable[[float, float], float]] = MappingProxyType(
    {"+": add, "-": sub, "*": mul, "/": lambda a, b: a / b if b else math.nan}
)
WINDOWS: Mapping[str, Callable[[list[float]], float]] = MappingProxyType(
    {"mean": statistics.fmean, "median": statistics.median, "min": min, "max": max}
)
TOKEN = re.compile(r"\s*(?:(\d+\.?\d*(?:[eE][-+]?\d+)?|\.\d+)|([A-Za-z_][\w.]*)|(>=|<=|[-+*/(),<>%]))")
DEEPEST = 20

Record = Mapping[str, Any]
Value = Callable[[Record], float | None]


@dataclass
class Window:
    """A figure of the records before this one."""

    value: Value
    of: Callable[[list[float]], float]
    size: int
    before: deque[float] = field(default_factory=deque)

    def __call__(self, record: Record) -> float | None:
        """None until there are ``size`` records."""
        return self.of(list(self.before)) if len(self.before) == self.size else None

    def remember(self, record: Record) -> None:
        """This one is over. What is not finite is left out: one NaN would blind the rule for long."""
        value = self.value(record)
        if value is not None and math.isfinite(value):
            self.before.append(value)
        if len(self.before) > self.size:
            self.before.popleft()


@dataclass(frozen=True)
class Condition:
    """left OP right."""

    left: Value
    sign: str
    right: Value

    def sides(self, record: Record) -> tuple[float, float] | None:
        """Both values; None where one is not known."""
        left, right = self.left(record), self.right(record)
        return None if left is None or right is None else (left, right)

    def holds(self, record: Record) -> bool | None:
        """None where that is not known."""
        sides = self.sides(record)
        return None if sides is None else COMPARISONS[self.sign](*sides)


@dataclass(frozen=True)
class AlertRule:
    """One rule. ``event``: the name of an event, or '' where there is a condition."""

    text: str
    event: str = ""
    condition: Condition | None = None
    lasting: int = 1
    """Records in a row for which the condition must hold."""
    lasting_s: float = 0.0
    """And seconds."""
    windows: tuple[Window, ...] = ()

    def remember(self, record: Record) -> None:
        """A record is over."""
        for window in self.windows:
            window.remember(record)


def read_rule(text: str) -> AlertRule:
    """The rule that ``text`` says. Raises ValueError that says what is wrong with it."""
    return _Reader(text).rule()


def rule_problems(rules: tuple[str, ...]) -> Iterator[str]:
    """A line for each text that is no rule."""
    for text in rules:
        try:
            read_rule(text)
        except ValueError as error:
            yield f'log.alerts has "{text}": {error}'


class _Reader:
    """Recursive descent over the tokens of one rule."""

    def __init__(self, text: str) -> None:
        self.text, self.at, self.depth = text, 0, 0
        self.windows: list[Window] = []
        self.tokens = list(self._tokens())

    def _tokens(self) -> Iterator[str]:
        place, text = 0, self.text.rstrip()
        while place < len(text):
            found = TOKEN.match(text, place)
            if found is None:
                raise ValueError(f'"{text[place:].split()[0]}" is no number, name or sign; try "loss > 10"')
            yield found[0].strip()
            place = found.end()

    def rule(self) -> AlertRule:
        """The whole text."""
        if self._take("event"):
            name = self._next("the name of an event")
            _check(name, EVENTS, "event")
            self._end()
            return AlertRule(self.text, name)
        condition = self.condition()
        lasting, seconds = 1, 0.0
        if self._take("for"):
            lasting = self.count("for")
            if self._take("s"):
                lasting, seconds = 1, float(lasting)
        self._end()
        return AlertRule(self.text, "", condition, lasting, seconds, tuple(self.windows))

    def condition(self) -> Condition:
        """sum OP sum."""
        left = self.sum()
        sign = self._next("one of > < >= <=")
        if sign not in COMPARISONS:
            raise ValueError(f'"{sign}" stands where one of > < >= <= should')
        return Condition(left, sign, self.sum())

    def sum(self) -> Value:
        """product (+|- product)*."""
        value = self.product()
        while (sign := self._peek()) in ("+", "-"):
            self.at += 1
            value = _both(ARITHMETIC[sign], value, self.product())
        return value

    def product(self) -> Value:
        """factor (*|/ factor)*."""
        value = self.factor()
        while (sign := self._peek()) in ("*", "/"):
            self.at += 1
            value = _both(ARITHMETIC[sign], value, self.factor())
        return value

    def factor(self) -> Value:
        """A number, a name, a window, or a sum in brackets."""
        self.depth += 1
        if self.depth > DEEPEST:
            raise ValueError("it is nested too deeply")
        token = self._next("a number or a name")
        value: Value
        if token == "-":
            value = _both(sub, lambda record: 0.0, self.factor())
        elif token == "(":
            value = self.sum()
            self._expect(")")
        elif token[0].isdigit() or token[0] == ".":
            number = float(token) / (100 if self._take("%") else 1)
            value = lambda record: number  # noqa: E731
        elif (token in WINDOWS or token == "share") and self._take("("):
            value = self.window(token)
        else:
            value = _figure(token)
        self.depth -= 1
        return value

    def window(self, name: str) -> Value:
        """What stands in the brackets of mean(...) and its like."""
        if name == "share":
            condition = self.condition()

            def value(record: Record) -> float | None:
                holds = condition.holds(record)
                return None if holds is None else float(holds)

            inner: Value = value
        else:
            inner = self.sum()
        self._expect(",")
        size = self.count(f"{name}(..., )")
        self._expect(")")
        self.windows.append(Window(inner, WINDOWS.get(name, statistics.fmean), size))
        return self.windows[-1]

    def count(self, what: str) -> int:
        """A number of records."""
        token = self._next(f"the number of records of {what}")
        if not token.isdigit() or not 1 <= int(token) <= MOST_RECORDS:
            raise ValueError(f'"{token}" stands where {what} wants a number of records, 1 to {MOST_RECORDS}')
        return int(token)

    def _peek(self) -> str:
        return self.tokens[self.at] if self.at < len(self.tokens) else ""

    def _take(self, token: str) -> bool:
        found = self._peek() == token
        self.at += found
        return found

    def _next(self, wanted: str) -> str:
        if not self._peek():
            raise ValueError(f"it ends where {wanted} should stand")
        self.at += 1
        return self.tokens[self.at - 1]

    def _expect(self, token: str) -> None:
        if not self._take(token):
            raise ValueError(f'"{self._peek() or "its end"}" stands where "{token}" should')

    def _end(self) -> None:
        if self._peek():
            raise ValueError(f'"{self._peek()}" is too much')


def _both(operation: Callable[[float, float], float], left: Value, right: Value) -> Value:
    def value(record: Record) -> float | None:
        a, b = left(record), right(record)
        return None if a is None or b is None else operation(a, b)

    return value


def _figure(name: str) -> Value:
    if not name.startswith("statistics."):
        _check(name, (*FIGURES, *MORE, *GPU_NAMES), "figure")
    parts = name.split(".")

    def value(record: Record) -> float | None:
        found: Any = record
        for part in parts:
            found = found.get(part) if isinstance(found, Mapping) else None
        return float(found) if isinstance(found, (int, float)) else None

    return value


def _check(name: str, known: tuple[str, ...], what: str) -> None:
    if name in known:
        return
    near = get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]}?" if near else f"it can be {', '.join(known)}"
    raise ValueError(f'there is no {what} "{name}"; {hint}')
