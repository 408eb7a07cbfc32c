"""A machine file for the planner (`cost/machine.py`) from what was measured on GPUs: what differs from a known one.

Written and never run on a GPU; on CPUs `megacore bench layouts --points` predicts from the points themselves.
"""

from collections.abc import Sequence

from megacore.bench.calibrate import Point
from megacore.cost.hardware import find_accelerator
from megacore.cost.machine import MACHINES, Machine


def base_of(device_name: str) -> Machine:
    """The known machine with such devices. Raises ValueError if there is none."""
    accelerator = find_accelerator(device_name)
    found = next((each for each in MACHINES if accelerator and each.accelerator.name == accelerator.name), None)
    if found is None:
        known = ", ".join(each.name for each in MACHINES)
        raise ValueError(
            f"--machine: {device_name} is none of the known {known}; on CPUs, and for other devices, predict from "
            "calibrate.json with `megacore bench layouts --points`"
        )
    return found


def machine_file(points: Sequence[Point], base: Machine) -> str:
    """TOML. Shares are of the data sheet's bf16 peak and of its memory's bandwidth; the link's speed is the bus
    bandwidth of the largest all-reduce among most ranks, its latency the smallest one's over the steps of a ring."""
    peak = base.accelerator.bf16 * 1e12
    shares = {
        "gemm": _best(points, ("gemm",), "bf16", "flops") / peak,
        "attention": _best(points, ("attention",), "bf16", "flops") / peak,
        "memory": _best(points, ("copy", "add"), "", "num_bytes") / (base.accelerator.memory_gb_per_s * 1e9),
    }
    host = min((point.seconds for point in points if point.what == "call"), default=0.0)
    lines = [f'base = "{base.name}"']
    sums = sorted((point for point in points if point.what == "all_reduce"), key=lambda point: point.num_bytes)
    if sums:
        ranks = max(point.ranks for point in sums)
        own = [point for point in sums if point.ranks == ranks]
        bus = max(2 * (ranks - 1) / ranks * point.num_bytes / point.seconds for point in own) / 1e9
        latency = own[0].seconds * 1e6 / (2 * (ranks - 1))
        lines += ["[node]", f"gb_per_s = {bus:.4g}", f"latency_us = {latency:.3g}"]
    lines.append("[reached]")
    lines += [f"{name} = {share:.3g}" for name, share in shares.items() if share > 0]
    lines += [f"host_us = {1e6 * host:.3g}"] if host else []
    return "\n".join(lines) + "\n"


def _best(points: Sequence[Point], what: Sequence[str], dtype: str, size: str) -> float:
    """The highest speed among points of these kinds."""
    own = [point for point in points if point.what in what and dtype in ("", point.dtype)]
    return max((getattr(point, size) / point.seconds for point in own), default=0.0)
