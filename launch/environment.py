"""Environment variables that CUDA, NCCL and torch read when they start: chosen from the run, told, never overruled.

They must be there before torch is imported and CUDA begins, so whoever starts ranks sets them: `megacore train`, and
what writes job files for clusters. What the user has set stays as it is.
"""

import os
import shutil
import subprocess
from collections.abc import Mapping, MutableMapping, Sequence
from typing import NamedTuple

from megacore.config.schema import RunConfig

Capability = tuple[int, int]
"""A GPU's compute capability: (9, 0) is Hopper, (10, 0) Blackwell."""
BLACKWELL = 10

ALLOCATOR = "PYTORCH_CUDA_ALLOC_CONF"
ALLOCATORS = (ALLOCATOR, "PYTORCH_ALLOC_CONF")
"""The same to torch, by its older and its newer name."""
CONNECTIONS = "CUDA_DEVICE_MAX_CONNECTIONS"
QUERY_LIMIT_S = 10


class Setting(NamedTuple):
    """A variable, and why it has its value."""

    name: str
    value: str
    why: str


def settings_for(config: RunConfig, capability: Capability | None) -> tuple[Setting, ...]:
    """What a resolved run wants on GPUs of ``capability`` (None: on none): a function of the run alone."""
    found: list[Setting] = []
    if config.log.profile:
        found.append(Setting("KINETO_LOG_LEVEL", "6", "the profiler's own chatter stays off the console"))
    if config.log.mlflow:
        found.append(Setting("MLFLOW_DISABLE_TELEMETRY", "true", "MLflow sends figures of its own use nowhere"))
        if not config.log.mlflow_uri:
            found.append(
                Setting("MLFLOW_ALLOW_FILE_STORE", "true", "newer versions of MLflow ask before they use files")
            )
    if capability is None or config.train.device == "cpu":
        return tuple(found)
    found.append(
        Setting(ALLOCATOR, "expandable_segments:True", "memory that was freed in other sizes can be used again")
    )
    found += connections_for(config, capability)
    p = config.parallel
    if p.tp * p.pp * p.cp * max(1, p.dp) > 1:
        # what else NCCL's groups can be told is torch's default by now: no recorded streams, a dump when one hangs
        found.append(
            Setting("TORCH_NCCL_HIGH_PRIORITY", "1", "collectives that are ready go before products that wait")
        )
    return tuple(found)


def connections_for(config: RunConfig, capability: Capability) -> tuple[Setting, ...]:
    """How many queues the host has to the device.

    With one, kernels start in the order in which they were given: before Blackwell the only way to have a collective
    begin before the product that it is to hide behind (Korthikanti et al. 2022; Megatron-LM asks for it under tensor
    and context parallelism). ZeRO-3 gathers on other streams, which one queue would hold up.
    """
    p = config.parallel
    if (p.tp == 1 and p.cp == 1) or capability[0] >= BLACKWELL:
        return ()
    if p.zero == 3:
        return (Setting(CONNECTIONS, "32", "parameters are gathered beside other work; one queue would stop them"),)
    return (Setting(CONNECTIONS, "1", "collectives of tp and cp begin in order, before the products that hide them"),)


def problem_with(config: RunConfig, given: Mapping[str, str]) -> str:
    """What in the user's own environment would hurt, or ''."""
    if config.parallel.zero == 3 and config.train.device != "cpu" and given.get(CONNECTIONS) == "1":
        return (
            f"{CONNECTIONS}=1 with parallel.zero=3 lets nothing gather parameters beside other work; unset it, or use "
            "32"
        )
    return ""


def missing(settings: Sequence[Setting], given: Mapping[str, str]) -> tuple[Setting, ...]:
    """Those of which the user has not set anything."""
    taken = set(given)
    if taken.intersection(ALLOCATORS):
        taken.update(ALLOCATORS)
    return tuple(setting for setting in settings if setting.name not in taken)


def prepare(
    config: RunConfig, environment: MutableMapping[str, str], capability: Capability | None
) -> tuple[Setting, ...]:
    """Set in ``environment`` what is missing there, before torch starts; returns what was. Raises ValueError where the
    user has set what would hurt."""
    if capability is not None and (problem := problem_with(config, environment)):
        raise ValueError(problem)
    added = missing(settings_for(config, capability), environment)
    environment.update({setting.name: setting.value for setting in added})
    return added


def lines_of(settings: Sequence[Setting]) -> tuple[str, ...]:
    """A line for each, for the start-up."""
    return tuple(f"{each.name}={each.value}: {each.why}" for each in settings)


def capability_here() -> Capability | None:
    """Of this machine's first visible GPU, asked of the driver's own tool, since torch would start CUDA; None: there is
    none."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "" or not (tool := shutil.which("nvidia-smi")):
        return None
    command = [tool, "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=QUERY_LIMIT_S, check=True)
        major, _, minor = done.stdout.split()[0].partition(".")
        return int(major), int(minor)
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None
