"""Alerts are told once until they are over, and sent without holding up who raises them."""

import json
import random
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from megacore.config.alerts import DEFAULTS
from megacore.monitor.alerts import EVENT_QUIET_S, QUIET_S, Alerts
from megacore.monitor.sinks import Outbox, targets_of


class Book:
    """Alerts, with a clock that is set by hand."""

    def __init__(self, *rules: str) -> None:
        self.now = 0.0
        self.told: list[tuple] = []
        self.alerts = Alerts(rules, self.write, lambda: self.now)

    def write(self, event: str, facts: dict) -> None:
        self.told.append((event, facts["step"], facts.get("times")))

    def see(self, *losses: float | None) -> list[tuple]:
        """What is told of these losses, of steps that are counted from 1."""
        for loss in losses:
            self.step = getattr(self, "step", 0) + 1
            self.alerts.see(self.step, {"loss": loss})
        told, self.told = self.told, []
        return told


def test_an_alert_is_told_once_until_it_is_over():
    book = Book("loss > 3")
    assert book.see(1, 4, 5, None, 6) == [("alert", 2, None)]
    assert book.see(2) == [("alert_over", 6, None)]
    assert book.see(2, 2) == []


def test_what_comes_and_goes_is_told_once_in_a_while():
    book = Book("loss > 3")
    assert book.see(4, 1) == [("alert", 1, None), ("alert_over", 2, None)]
    assert book.see(4, 1, 4, 1, 4) == []
    book.now = QUIET_S
    assert book.see(4) == [("alert", 8, 3)]
    assert book.see(1) == [("alert_over", 9, None)]


def test_it_must_last_as_long_as_the_rule_says():
    book = Book("loss > 3 for 3")
    assert book.see(4, 4, 1, 4, 4) == []
    assert book.see(4) == [("alert", 6, None)]


def test_it_must_last_as_many_seconds_as_the_rule_says():
    book = Book("loss > 3 for 60 s")
    assert book.see(4, 4) == []
    book.now = 59.0
    assert book.see(4, 1) == []
    assert book.see(*[4] * 100) == [], "begun anew"
    book.now = 119.0
    assert book.see(4, 4) == [("alert", 105, None)]
    assert book.see(1) == [("alert_over", 107, None)]


def rates(seed: int, number: int, seconds: float, drop: float = 1.0) -> list[tuple[float, float]]:
    """(time, tokens per second) as a shared machine gives them: neighbours take up to half of it for seconds at a time,
    and each tenth step waits for a save; from two thirds on ``drop`` of it is left."""
    rng, found, now, share, until = random.Random(seed), [], 0.0, 1.0, 0.0
    for step in range(number):
        if now >= until:
            share, until = rng.choice([1.0, 1.0, 0.9, 0.75, 0.5]), now + rng.uniform(2, 25)
        rate = 1000 * share * rng.uniform(0.8, 1.0) * (0.2 if step % 10 == 0 else 1.0)
        rate *= drop if step > number * 2 / 3 else 1.0
        now += seconds * 1000 / rate
        found.append((now, rate))
    return found


@pytest.mark.parametrize("seconds", [0.01, 0.3, 2.0])
@pytest.mark.parametrize("seed", range(3))
def test_usual_rules_keep_quiet_on_a_busy_machine(seed, seconds):
    book = Book(*DEFAULTS)
    for step, (now, rate) in enumerate(rates(seed, 2000, seconds), start=1):
        book.now = now
        book.alerts.see(step, {"tokens_per_s": rate, "step_time_s": 1000 / rate, "loss": 2.0})
    assert book.told == []


@pytest.mark.parametrize("seconds", [2.0, 20.0])
def test_usual_rules_see_a_rate_that_stays_low(seconds):
    book = Book(*DEFAULTS)
    for step, (now, rate) in enumerate(rates(1, 900, seconds, drop=0.4), start=1):
        book.now = now
        book.alerts.see(step, {"tokens_per_s": rate})
    (alert, *_) = book.told
    assert alert[0] == "alert" and 600 < alert[1] < 680


def test_events_of_a_kind_are_told_once_in_a_while():
    book = Book("event hang", "event spike")
    for _ in range(3):
        book.alerts.event("hang", {"step": 5, "text": "rank 3 is silent"})
    book.alerts.event("save", {"step": 6})
    assert book.told == [("alert", 5, None)]
    book.now = EVENT_QUIET_S
    book.alerts.event("hang", {"text": "again"})
    assert book.told[1:] == [("alert", None, 3)]


def test_an_alert_says_what_was_found():
    told = []
    alerts = Alerts(["loss > 1.5 * mean(loss, 2)"], lambda event, facts: told.append(facts))
    for step, loss in enumerate((2.0, 2.0, 4.0), start=1):
        alerts.see(step, {"loss": loss})
    assert told == [
        {
            "step": 3,
            "alert": "loss > 1.5 * mean(loss, 2)",
            "text": "loss > 1.5 * mean(loss, 2) (4 > 3)",
            "value": 4.0,
            "limit": 3.0,
        }
    ]


@contextmanager
def web_server(wait: threading.Event | None = None, code: int = 204) -> Iterator[tuple[str, list]]:
    """Its address, and what it is sent; it answers once ``wait`` is set."""
    got: list = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            got.append((self.headers["Content-Type"], json.loads(body)))
            if wait is not None:
                wait.wait(5)
            self.send_response(code)
            if 300 <= code < 400:
                self.send_header("Location", "/elsewhere/topsecret")
            self.end_headers()

        def do_GET(self):
            got.append("GET")
            self.send_response(200)
            self.end_headers()

        def log_message(self, format, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/hook", got
    finally:
        server.shutdown()
        server.server_close()


def test_alerts_go_to_a_web_hook_and_a_command(tmp_path):
    script = "import pathlib, sys; pathlib.Path(sys.argv[1]).write_text(sys.stdin.read())"
    (tmp_path / "script.py").write_text(script)
    failed: list = []
    with web_server() as (url, got):
        line = f"{sys.executable} {tmp_path / 'script.py'} '{tmp_path / 'a file; touch b'}'"
        outbox = Outbox(targets_of(url, line), lambda *told: failed.append(told))
        outbox.put({"event": "alert", "alert": "loss > 3", "value": 4.0})
        outbox.close()
    sent = {"event": "alert", "alert": "loss > 3", "value": 4.0}
    assert got == [("application/json", sent)]
    assert json.loads((tmp_path / "a file; touch b").read_text()) == sent
    assert not failed


def test_a_hook_that_hangs_holds_nobody_up(monkeypatch):
    monkeypatch.setattr("megacore.monitor.sinks.MOST_WAITING", 5)
    wait, failed = threading.Event(), []
    with web_server(wait) as (url, got):
        outbox = Outbox(targets_of(url, ""), lambda *told: failed.append(told))
        began = time.monotonic()
        for number in range(20):
            outbox.put({"number": number})
        outbox.close(0.1)
        assert time.monotonic() - began < 2
        wait.set()
    assert [target for target, _ in failed] == ["alerts"]
    assert got[0] == ("application/json", {"number": 0})


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/", "http://no-such-host.invalid/"])
def test_what_does_not_arrive_is_told_once(url):
    failed: list = []
    outbox = Outbox(targets_of(url, "/no/such/command"), lambda *told: failed.append(told))
    for _ in range(3):
        outbox.put({})
    outbox.close()
    assert [target for target, _ in failed] == ["log.alert_webhook", "log.alert_command"]


def reasons(hook: str, line: str, alert: dict | None = None) -> list[str]:
    """Why an alert did not arrive."""
    failed: list = []
    outbox = Outbox(targets_of(hook, line), lambda target, reason: failed.append(reason))
    outbox.put(alert or {})
    outbox.close()
    assert not outbox.thread.is_alive()
    return failed


@pytest.mark.parametrize(
    ("code", "reason"), [(302, "HTTP 302; give the address"), (404, "HTTP 404"), (500, "HTTP 500")]
)
def test_a_hook_that_sends_alerts_elsewhere_or_refuses_them_is_told_without_its_url(code, reason):
    with web_server(code=code) as (url, got):
        (said,) = reasons(url + "/topsecret", "")
    assert reason in said and "topsecret" not in said and "hook" not in said
    assert len(got) == 1, "urllib would go on with a GET"


def test_a_hook_that_says_nothing_is_given_up(monkeypatch):
    monkeypatch.setattr("megacore.monitor.sinks.TIMEOUT_S", 0.3)
    wait, failed = threading.Event(), []
    with web_server(wait) as (url, _):
        outbox = Outbox(targets_of(url, ""), lambda target, reason: failed.append(reason))
        outbox.put({})
        outbox.close(5)
        wait.set()
    assert failed and ("within 0.3 s" in failed[0] or "timed out" in failed[0])


def test_a_hook_gets_json_whatever_the_loss_is():
    with web_server() as (url, got):
        assert reasons(url, "", {"value": float("nan"), "limit": 3.0}) == []
    assert got == [("application/json", {"value": None, "limit": 3.0, "nonfinite": {"value": "nan"}})]


def test_a_command_that_fails_is_told_without_its_words():
    line = f"""{sys.executable} -c 'import sys; sys.exit("topsecret is wrong")' topsecret"""
    assert reasons("", line) == ["it ended with exit code 1; what it prints is not kept"]
    assert reasons("", "/no/such/topsecret") == ["it cannot be started: No such file or directory"]


def test_a_command_that_hangs_is_killed_with_all_that_it_started(tmp_path, monkeypatch):
    monkeypatch.setattr("megacore.monitor.sinks.TIMEOUT_S", 0.5)
    line = f"sh -c '(echo $$; sleep 60; true) > {tmp_path / 'pid'} & sleep 60; true'"
    failed: list = []
    outbox = Outbox(targets_of("", line), lambda target, reason: failed.append(reason))
    outbox.put({})
    began = time.monotonic()
    outbox.close(20)
    assert time.monotonic() - began < 5
    assert failed == ["it did not end within 0.5 s, and was killed"]
    group = int((tmp_path / "pid").read_text())
    until = time.monotonic() + 5
    while _lives(group) and time.monotonic() < until:
        time.sleep(0.02)
    assert not _lives(group)


def _lives(group: int) -> bool:
    """Whether any process of a group does more than wait to be reaped."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, _, its = stat.read_text().rpartition(")")[2].split()[:3]
            if int(its) == group and state != "Z":
                return True
    return False


def test_nothing_is_started_without_targets():
    outbox = Outbox(targets_of("", ""), lambda *told: None)
    outbox.put({})
    outbox.close()
    assert outbox.thread is None
