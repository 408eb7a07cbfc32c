"""The course of `megacore bench calibrate`: which processes measure what."""

import argparse
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import torch

from megacore.bench.calibrate import DTYPES, Point, points_of
from megacore.bench.machine_file import base_of, machine_file
from megacore.processes import usable_cores

SIZES = (1 << 10, 1 << 14, 1 << 17, 1 << 20, 1 << 22, 1 << 24, 1 << 26)
"""Bytes of collectives' tensors."""
MORE_SIZES = (1 << 28,)
"""Beside these on GPUs."""

Ranks = Callable[..., AbstractContextManager[Path]]
"""(what, number of processes, name, arguments...): runs it on fresh processes, gives the file of its result."""


def measure(arguments: argparse.Namespace, ranks: Ranks) -> list[Point]:
    """All points; the machine file, if asked for. Raises ValueError for what cannot be measured."""
    device, dtypes, groups = plan(arguments.device, arguments.dtype, arguments.ranks)
    name = torch.cuda.get_device_name() if device == "cuda" else "a CPU"
    base = base_of(name) if arguments.machine else None  # first: what cannot be written is told before it is measured
    points: list[Point] = []
    for threads in (1, usable_cores()) if device == "cpu" and usable_cores() > 1 else (1,):
        name = f"one rank, {threads} thread{'s' * (threads > 1)}"
        with ranks("megacore.bench.calibrate:measure_alone", 1, name, device, dtypes, threads) as result:
            points += points_of(result)
    sizes = SIZES if device == "cpu" else SIZES + MORE_SIZES
    for number in groups:
        told = device, sizes, arguments.rounds
        with ranks("megacore.bench.calibrate:measure_together", number, f"{number} ranks", *told) as result:
            points += points_of(result)
    if base is not None:
        Path(arguments.machine).write_text(machine_file(points, base), encoding="utf-8")
    return points


def plan(device: str, dtypes: Sequence[str] | None, ranks: Sequence[int] | None) -> tuple[str, list[str], list[int]]:
    """Device, formats and numbers of ranks. Raises ValueError for what there is not."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device=cuda: torch finds no GPU here; leave it out to measure the CPU")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if unknown := set(dtypes or ()).difference(DTYPES):
        raise ValueError(f"--dtype={min(unknown)} is not measured; use one of {', '.join(DTYPES)}")
    gpus = torch.cuda.device_count() if device == "cuda" else 0
    default = [2, 4] if device == "cpu" else [n for n in (2, 4, 8) if n <= gpus]
    groups = list(ranks or default)
    if few := [n for n in groups if n < 2]:
        raise ValueError(f"--ranks={few[0]}: collectives are between 2 ranks or more")
    if gpus and (many := [n for n in groups if n > gpus]):
        raise ValueError(f"--ranks={many[0]} is more than the {gpus} GPUs of this machine, one for each rank")
    return device, list(dtypes or (["fp32"] if device == "cpu" else ["bf16", "fp32"])), groups
