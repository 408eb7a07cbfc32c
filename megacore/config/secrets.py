"""Keys whose values are known to the run alone: whatever is written, shown or sent on has ``HIDDEN`` in their place."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any
from urllib.parse import urlsplit

from megacore.config.schema import RunConfig

SECRETS = ("log.alert_webhook", "log.alert_command")
"""A web hook's path is its password, and a command may bring one."""
HIDDEN = "(hidden)"
"""In a run file it stands for a value that the file was not given: alerts are then sent nowhere."""


def without_secrets(config: RunConfig) -> RunConfig:
    """The run as it may be read by others; ``config.toml`` and checkpoints hold this one."""
    found: dict[str, Any] = {name: HIDDEN for name in _names() if getattr(config.log, name)}
    return replace(config, log=replace(config.log, **found)) if found else config


def hidden_keys(config: RunConfig) -> list[str]:
    """Keys whose values stayed behind when the run was written down."""
    return [f"log.{name}" for name in _names() if getattr(config.log, name) == HIDDEN]


def in_overrides(overrides: Sequence[str]) -> Iterator[str]:
    """A line for each ``key=value`` that would be written down with the command that it belongs to."""
    for override in overrides:
        key = override.partition("=")[0].strip()
        if key in SECRETS:
            yield f"{key} on the command line would be written into the job, for all to read; put it into the run file"


def url_problem(key: str, url: str) -> str:
    """What is wrong with a URL that is written down as it is, or ''. Its password is not said."""
    try:
        named = urlsplit(url).password is not None
    except ValueError:
        named = True
    return f"{key} holds a password, and is written down in many places; give it in the environment" if named else ""


def _names() -> Iterator[str]:
    for key in SECRETS:
        yield key.removeprefix("log.")
