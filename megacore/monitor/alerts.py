"""Alerts: each rule of `log.alerts` is held against every record and event, and told once until it is over."""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megacore.config.alerts import AlertRule, read_rule

QUIET_S = 60.0
"""An alert that comes and goes is told once in that time."""
EVENT_QUIET_S = 600.0
"""Events have no end: one of a kind is told once in that time."""

Told = Callable[[str, dict[str, Any]], None]
"""Called with "alert" or "alert_over" and what belongs to it."""


@dataclass
class State:
    """Of one rule."""

    rule: AlertRule
    held: int = 0
    """Records in a row."""
    began_at: float = 0.0
    """When the first of them was."""
    lasts: bool = False
    """For as long as the rule says."""
    raised: bool = False
    told_at: float | None = None
    untold: int = 0
    """Times since it was last told."""
    since_step: int = 0


class Alerts:
    """Of one run, on its rank 0. Its methods may be called from several threads."""

    def __init__(self, rules: Sequence[str], told: Told, clock: Callable[[], float] = time.monotonic) -> None:
        """Raises ValueError for a text that is no rule."""
        self.states = [State(read_rule(text)) for text in rules]
        self.told, self.clock, self.lock = told, clock, threading.Lock()

    def see(self, step: int, record: Mapping[str, Any]) -> None:
        """Hold every condition against a record of metrics.jsonl, which may know more than is written down."""
        with self.lock:
            for state in self.states:
                if state.rule.condition is not None:
                    self._hold(state, step, record)
                    state.rule.remember(record)

    def event(self, name: str, facts: Mapping[str, Any]) -> None:
        """Something has happened."""
        with self.lock:
            for state in self.states:
                if state.rule.event != name:
                    continue
                state.untold += 1
                if not self._quiet(state, EVENT_QUIET_S):
                    self._tell(state, facts.get("step"), str(facts.get("text") or facts.get("error") or name))

    def _hold(self, state: State, step: int, record: Mapping[str, Any]) -> None:
        rule = state.rule
        assert rule.condition is not None
        holds = rule.condition.holds(record)
        if holds is None:
            return  # not known: neither raised nor over
        if not holds:
            if state.raised:
                state.raised = False
                text = f"{rule.text} is over (since step {state.since_step})"
                facts = {"step": step, "alert": rule.text, "text": text, "since_step": state.since_step}
                self.told("alert_over", facts)
            state.held, state.lasts = 0, False
            return
        if not state.held:
            state.began_at = self.clock()
        state.held += 1
        if state.raised or state.held < rule.lasting or self.clock() - state.began_at < rule.lasting_s:
            return
        if not state.lasts:
            state.lasts = True
            state.untold += 1
            state.since_step = step
        if not self._quiet(state, QUIET_S):
            state.raised = True
            left, right = rule.condition.sides(record) or (0.0, 0.0)
            self._tell(state, step, f"{rule.text} ({left:.4g} {rule.condition.sign} {right:.4g})", left, right)

    def _quiet(self, state: State, seconds: float) -> bool:
        """Whether it was told so short a time ago that it is not told again."""
        return state.told_at is not None and self.clock() - state.told_at < seconds

    def _tell(self, state: State, step: Any, text: str, value: float | None = None, limit: float | None = None) -> None:
        facts = {"step": step, "alert": state.rule.text, "text": text}
        if value is not None:
            facts |= {"value": value, "limit": limit}
        if state.untold > 1:
            facts["times"] = state.untold
        state.untold, state.told_at = 0, self.clock()
        self.told("alert", facts)
