"""The language of alerts: what rules mean, and that anything else is refused with a reason."""

import random
from dataclasses import fields

import pytest

from megacore.config.alerts import DEFAULTS, EVENTS, FIGURES, GPU_NAMES, MORE, read_rule
from megacore.config.load import load
from megacore.config.schema import RunConfig
from megacore.config.validate import validate
from megacore.monitor.metrics import StepMetrics


def held(text: str, *records: dict) -> list[bool | None]:
    """Whether a rule holds after each record."""
    rule = read_rule(text)
    assert rule.condition is not None
    found = []
    for record in records:
        found.append(rule.condition.holds(record))
        rule.remember(record)
    return found


def losses(*values: float) -> list[dict]:
    return [{"loss": value} for value in values]


@pytest.mark.parametrize(
    ("text", "holds"),
    [
        ("loss > 3", True),
        ("loss > 4", False),
        ("loss >= 4", True),
        ("loss <= 4", True),
        ("loss < 4.0e0", False),
        ("loss > 300%", True),
        ("1 + 2 * loss > 8.9", True),
        ("(1 + 2) * loss > 12", False),
        ("-loss < -3", True),
        ("10 - 3 - 3 >= loss", True),
        ("8 / 2 / 2 < loss", True),
        ("loss / 0 > 1", False),
        ("lr > 0", None),
        ("gpu.power_w.mean > 1", None),
        ("statistics.update_norm.mlp > 2", True),
        ("statistics.update_norm > 2", None),
    ],
)
def test_what_a_condition_means(text, holds):
    assert held(text, {"loss": 4.0, "lr": None, "statistics": {"update_norm": {"mlp": 2.5}}}) == [holds]


def test_windows_are_of_the_records_before():
    assert held("loss > 1.5 * mean(loss, 2)", *losses(2, 2, 2.9, 9, 8.8)) == [None, None, False, True, False]
    assert held("loss > median(loss, 3)", *losses(1, 5, 2, 3, 2)) == [None, None, None, True, False]
    assert held("loss < min(loss, 2)", *losses(3, 2, 1, 1)) == [None, None, True, False]
    assert held("loss > max(loss, 2)", *losses(3, 2, 4, 4)) == [None, None, True, False]
    assert held("share(loss > 2, 4) > 25%", *losses(1, 3, 1, 1, 3, 1)) == [None] * 4 + [False, True]


def test_a_window_leaves_out_what_is_not_finite():
    assert held("loss > mean(loss, 2)", *losses(1, float("nan"), 1, 2)) == [None, None, None, True]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "it ends where a number or a name should stand"),
        ("loss", "it ends where one of > < >= <= should stand"),
        ("loss >", "it ends where a number or a name should stand"),
        ("los > 3", 'no figure "los"; did you mean loss?'),
        ("gpu.utilisation.mean < 1", "did you mean gpu.utilization.mean?"),
        ("gpu > 3", "there is no figure"),
        ("event hung", 'no event "hung"; did you mean hang?'),
        ("event hang now", '"now" is too much'),
        ("loss > 3 for 0", "1 to"),
        ("loss > 3 for x", "1 to"),
        ("loss > 3 for s", "1 to"),
        ("loss > 3 for 0 s", "1 to"),
        ("loss > 3 for 5 m", '"m" is too much'),
        ("mean(loss) > 3", '")" stands where "," should'),
        ("mean(loss, 5 > 3", '">" stands where ")" should'),
        ("loss > 3 + ", "it ends"),
        ("loss = 3", '"=" is no number, name or sign'),
        ("loss == 3", "is no number, name or sign"),
        ("__import__('os').system('true') > 1", "is no number, name or sign"),
        ("loss.__class__ > 1", "there is no figure"),
        ("open(loss, 3) > 1", 'there is no figure "open"'),
        ("(" * 100 + "loss" + ")" * 100 + " > 1", "nested too deeply"),
        ("-" * 5000 + "loss > 1", "nested too deeply"),
    ],
)
def test_anything_else_is_refused_with_a_reason(text, reason):
    with pytest.raises(ValueError, match=".") as raised:
        read_rule(text)
    assert reason in str(raised.value)
    problems = [line for line in validate(load(None, [], "demo"), 1) if "log.alerts" in line]
    assert not problems


def test_no_text_does_more_than_fail():
    rng = random.Random(1)
    words = [*FIGURES[:3], *"+-*/(),<>%", "for", "event", "mean", "share", "3", "1e400", "nan", "\0", "é", " ", "'"]
    good = 0
    for _ in range(2000):
        parts = rng.choice(DEFAULTS).split()
        for _ in range(rng.randint(1, 2)):
            parts[rng.randrange(len(parts))] = rng.choice(words)
        text = " ".join(parts)
        try:
            rule = read_rule(text)
        except ValueError:
            continue
        good += 1
        if rule.condition is not None:
            rule.condition.holds({"step": 1, "loss": 2.0, "grad_norm": float("nan")})
    assert good > 5


def test_names_are_those_that_records_have():
    numbers = {field.name for field in fields(StepMetrics)} - {"skipped", "statistics", "gpu"}
    assert set(FIGURES) == numbers


def test_the_defaults_are_rules():
    assert RunConfig().log.alerts == DEFAULTS
    rules = [read_rule(text) for text in DEFAULTS]
    assert {rule.event for rule in rules if rule.event} < set(EVENTS)
    assert len(set(FIGURES) & set(MORE) & set(GPU_NAMES)) == 0


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ('log.alerts=["los > 3"]', 'log.alerts has "los > 3": there is no figure "los"; did you mean loss?'),
        ("log.alert_webhook=example.com", "must be a URL that begins with https:// or http://"),
        ("log.alert_webhook=file:///etc/passwd", "must be a URL that begins with https:// or http://"),
        ("log.alert_webhook=http://[bad", "must be a URL"),
        ("log.alert_command=mail 'me", "close its quotation marks"),
        ("log.prometheus_port=70000", "out of range"),
    ],
)
def test_wrong_keys_are_told(override, message):
    assert message in "\n".join(validate(load(None, [override], "demo"), 1))
