"""Whether this machine can compute a model in float64, in memory and within minutes."""

import os
from collections.abc import Sequence
from pathlib import Path

from megacore.config.schema import ParallelConfig, RunConfig
from megacore.monitor.console import human_bytes, human_time
from megacore.processes import usable_cores
from megacore.spec import ModelSpec
from megacore.spec.flops import train_flops_per_token
from megacore.spec.memory import state_bytes

FLOPS_PER_CORE = 5e9
"""Float64 FLOPs per second that small matrices get from one core: a guess, on the low side."""

BUDGET_S = 600.0
"""Longer than this, and a twin is the better answer."""

SHARE = 0.5
"""Of the free memory; activations, which are not estimated, and everybody else have the rest."""


def needed_bytes(run: RunConfig, layouts: Sequence[ParallelConfig]) -> int:
    """Memory for parameters and gradients in float64: one process' own on file, and one copy per dp rank."""
    copies = 1 + max(max(1, layout.dp) for layout in layouts)
    return state_bytes(ModelSpec.of(run.model).params, run.optim, "fp64").total * copies


def needed_seconds(run: RunConfig, num_layouts: int) -> float:
    """Time of one step in each layout and in one process, all on this machine's cores."""
    tokens = run.train.global_batch_size * run.train.seq_len
    flops = train_flops_per_token(ModelSpec.of(run.model), run.train.seq_len) * tokens * (1 + num_layouts)
    return flops / (FLOPS_PER_CORE * usable_cores())


def available_bytes(meminfo: Path = Path("/proc/meminfo")) -> int:
    """Memory that processes can get without swapping; where the system does not tell, all of the machine's."""
    try:
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass  # not Linux
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def too_large(run: RunConfig, layouts: Sequence[ParallelConfig]) -> str:
    """Why the run, in one process and in ``layouts``, is too large for this machine; else nothing."""
    size, there = needed_bytes(run, layouts), available_bytes()
    if size > SHARE * there:
        return f"{human_bytes(size)} of state in float64, and {human_bytes(there)} of memory are free"
    seconds = needed_seconds(run, len(layouts))
    if seconds > BUDGET_S:
        return f"about {human_time(seconds)} in float64 on {usable_cores()} cores"
    return ""
