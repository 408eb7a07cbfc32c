"""Rules of what looks on while steps are taken: profiles, ranges, logs of communication, guards."""

import shlex
from collections.abc import Iterator
from urllib.parse import urlsplit

from megacore.config.alerts import rule_problems
from megacore.config.schema import RunConfig
from megacore.config.secrets import HIDDEN, url_problem


def watching_problems(config: RunConfig, world_size: int | None) -> Iterator[str]:
    """A line for each thing that cannot be done."""
    log, steps = config.log, config.train.steps
    profile = list(log.profile)
    if profile and (len(profile) != 2 or not 1 <= profile[0] <= profile[1]):
        yield f"log.profile={profile} must be the first and the last step to profile, such as [3, 4]"
    elif profile and profile[1] > steps:
        yield f"log.profile={profile} ends after the last step, train.steps={steps}; use steps up to {steps}"
    ranks = list(log.profile_ranks)
    if ranks and not profile:
        yield f"log.profile_ranks={ranks} are of no use without log.profile; give the steps to profile"
    if min(ranks, default=0) < 0 or len(set(ranks)) != len(ranks):
        yield f"log.profile_ranks={ranks} must be ranks, each once"
    elif world_size is not None and max(ranks, default=0) >= world_size:
        yield f"log.profile_ranks={ranks} names ranks of {world_size}; they are 0 to {world_size - 1}"
    if log.nvtx and config.train.device == "cpu":
        yield "log.nvtx=true marks ranges for a GPU's tools, but train.device=cpu; use log.profile"
    if log.communication > steps:
        yield f"log.communication={log.communication} is more than train.steps={steps}; use at most {steps}"


def guard_problems(config: RunConfig) -> Iterator[str]:
    """A line for each guard that could not do its work."""
    guard = config.guard
    if guard.spike == "rewind" and not config.checkpoint.save_every:
        yield (
            "guard.spike=rewind goes back to a checkpoint, but checkpoint.save_every=0 makes none; save every so many "
            "steps, or set guard.spike=alert"
        )
    if guard.spike == "rewind" and config.data.index == "megatron":
        yield (
            "guard.spike=rewind leaves samples out, which moves all others with data.index=megatron, whose order "
            "depends on their number; use data.index=megacore, or guard.spike=alert"
        )
    if guard.abort_s < guard.silent_s:
        yield (
            f"guard.abort_s={guard.abort_s:g} ends the ranks before a silent one is named, guard.silent_s="
            f"{guard.silent_s:g}; raise it"
        )


def alert_problems(config: RunConfig) -> Iterator[str]:
    """A line for each rule that is none, and each place that alerts cannot be sent to."""
    log = config.log
    yield from rule_problems(log.alerts)
    try:
        parts = urlsplit(log.alert_webhook)
        legal = log.alert_webhook in ("", HIDDEN) or (parts.scheme in ("http", "https") and bool(parts.hostname))
    except ValueError:
        legal = False
    if not legal:
        yield "log.alert_webhook must be a URL that begins with https:// or http://, with a host"
    try:
        words = shlex.split(log.alert_command)
    except ValueError as error:
        yield f"log.alert_command is no command line ({error}); close its quotation marks"
    else:
        if log.alert_command and not words:
            yield f"log.alert_command={log.alert_command!r} names no command; leave it out"
    if log.mlflow_uri and (problem := url_problem("log.mlflow_uri", log.mlflow_uri)):
        yield f"{problem}, as MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
    if (log.wandb or log.mlflow) and not log.project:
        yield 'log.project="" must be the name of a project; leave it out for megacore'
