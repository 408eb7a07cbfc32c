"""A cluster as the planner sees it: devices, how they are wired, and what share of their peaks real work reaches.

A machine is data. These are known by name; one's own is a TOML file that names one of them and what differs:

    base = "h100"            # every key below is optional
    gpus_per_node = 8
    nvlink_domain = 8        # neighbouring ranks that NVLink joins
    price_per_gpu_hour = 2.6
    memory_gb = 80
    [node]                   # between GPUs of a domain, per GPU and direction
    gb_per_s = 370
    latency_us = 8
    [network]                # between nodes, per GPU and direction
    gb_per_s = 45
    latency_us = 16
    [reached]                # shares of the data sheet's peaks that large, undisturbed work reaches
    gemm = 0.66
    fp8 = 0.66
    attention = 0.47
    memory = 0.80
    host_us = 5.0            # what the host needs to launch a kernel

Figures: `cost/hardware.py` for peaks; bandwidths are those that NCCL's tests print as bus bandwidth for large messages
on such machines (DGX A100: 235 GB/s in a node, H100: 360 to 480, HGX H200: 367 with rings). Prices are list prices of
clouds in 2026 for a rented GPU hour, to be replaced by the user's own.
"""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from megacore.config.errors import did_you_mean
from megacore.cost.hardware import ACCELERATORS, Accelerator


@dataclass(frozen=True)
class Link:
    """What one device can send while it receives as much: GB/s of large messages, microseconds of small ones."""

    gb_per_s: float
    latency_us: float


@dataclass(frozen=True)
class Reached:
    """Shares of data-sheet peaks that large, undisturbed work reaches; ``host_us`` is what a kernel's launch takes the
    host, ``units`` how many multiprocessors share a product's tiles."""

    gemm: float
    fp8: float
    attention: float
    memory: float
    host_us: float
    units: int


@dataclass(frozen=True)
class Machine:
    """``nvlink_domain`` neighbouring ranks are joined by ``node``, all others by ``network``."""

    name: str
    accelerator: Accelerator
    gpus_per_node: int
    nvlink_domain: int
    node: Link
    network: Link
    reached: Reached
    price_per_gpu_hour: float


AMPERE = Reached(gemm=0.77, fp8=0.0, attention=0.56, memory=0.80, host_us=6.0, units=108)
HOPPER = Reached(gemm=0.66, fp8=0.66, attention=0.47, memory=0.80, host_us=5.0, units=132)
BLACKWELL = Reached(gemm=0.60, fp8=0.60, attention=0.43, memory=0.80, host_us=4.0, units=148)
ULTRA = replace(BLACKWELL, gemm=0.65, fp8=0.68, attention=0.50)
NVLINK3, NVLINK4, NVLINK5 = Link(230.0, 3.0), Link(400.0, 3.0), Link(700.0, 3.0)
PCIE4, PCIE5 = Link(20.0, 6.0), Link(40.0, 6.0)
HDR, NDR, XDR = Link(21.0, 12.0), Link(44.0, 10.0), Link(88.0, 10.0)
ETHERNET = Link(10.0, 40.0)

_BY_NAME = MappingProxyType({each.name: each for each in ACCELERATORS})


def _machine(
    name: str,
    accelerator: str,
    node: Link,
    network: Link,
    reached: Reached,
    price: float,
    domain: int = 8,
    gpus: int = 8,
) -> Machine:
    return Machine(name, _BY_NAME[accelerator], gpus, domain, node, network, reached, price)


MACHINES = (
    _machine("a100-40gb", "a100-40gb", NVLINK3, HDR, AMPERE, 1.6),
    _machine("a100-80gb", "a100-80gb", NVLINK3, HDR, AMPERE, 2.0),
    _machine("a100-pcie", "a100-80gb-pcie", PCIE4, HDR, replace(AMPERE, gemm=0.66), 1.6),
    _machine("a800", "a100-80gb", Link(160.0, 8.0), HDR, AMPERE, 2.0),
    _machine("h100", "h100-sxm", NVLINK4, NDR, HOPPER, 3.0),
    _machine("h100-96gb", "h100-96gb", NVLINK4, NDR, HOPPER, 3.0),
    _machine("h100-pcie", "h100-pcie", PCIE5, NDR, replace(HOPPER, gemm=0.60, units=114), 2.4),
    _machine("h100-nvl", "h100-nvl", Link(240.0, 8.0), NDR, replace(HOPPER, gemm=0.62), 2.6, domain=2),
    _machine("h200", "h200", NVLINK4, NDR, HOPPER, 3.6),
    _machine("b200", "b200", NVLINK5, NDR, BLACKWELL, 5.5),
    _machine("b300", "b300", NVLINK5, XDR, ULTRA, 6.5),
    _machine("gb200", "gb200", NVLINK5, NDR, BLACKWELL, 6.0, domain=72, gpus=4),
    _machine("gb300", "gb300", NVLINK5, XDR, ULTRA, 7.0, domain=72, gpus=4),
)
ALIASES = MappingProxyType({"a100": "a100-80gb", "h100-sxm": "h100", "h100-80gb": "h100"})


def machine_names() -> tuple[str, ...]:
    """The names that `find_machine` knows."""
    return tuple(each.name for each in MACHINES)


def find_machine(name: str) -> Machine:
    """The machine of that name, or of a TOML file. Raises ValueError for any other name, and for a file that says
    something else than it may."""
    if name.endswith(".toml"):
        return read_machine(Path(name))
    wanted = ALIASES.get(name.lower(), name.lower())
    for each in MACHINES:
        if each.name == wanted:
            return each
    known = (*machine_names(), *ALIASES)
    raise ValueError(
        f"--gpu={name} is not a known machine; {did_you_mean(name.lower(), known)} Or give a .toml file of your own"
    )


def read_machine(path: Path) -> Machine:
    """A machine file (see above)."""
    try:
        said = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"--gpu={path} cannot be read: {error.strerror}; give a machine's name or file") from None
    except ValueError as error:
        raise ValueError(f"{path} is not TOML: {error}") from None
    base = find_machine(str(said.pop("base", "h100")))
    memory = said.pop("memory_gb", None)
    if memory is not None:
        base = replace(base, accelerator=replace(base.accelerator, memory_gb=_number(path, "memory_gb", memory)))
    plain = {"gpus_per_node": int, "nvlink_domain": int, "price_per_gpu_hour": float, "name": str}
    changes: dict[str, Any] = {"name": path.stem}
    for key, value in said.items():
        if key in ("node", "network", "reached"):
            changes[key] = _section(path, key, getattr(base, key), value)
        elif key in plain:
            changes[key] = value if key == "name" else plain[key](_number(path, key, value))
        else:
            allowed = ("base", "memory_gb", *plain, "node", "network", "reached")
            raise ValueError(f"{path}: {key} is not a key of a machine; {did_you_mean(key, allowed)}")
    return replace(base, **changes)


def _section(path: Path, name: str, base: Link | Reached, said: Any) -> Any:
    if not isinstance(said, Mapping):
        raise ValueError(f"{path}: {name} must be a section [{name}]")
    known = {field.name for field in fields(base)}
    for key in said:
        if key not in known:
            raise ValueError(f"{path}: {name}.{key} is not a key; {did_you_mean(key, sorted(known))}")
    return replace(base, **{key: _number(path, f"{name}.{key}", value) for key, value in said.items()})


def _number(path: Path, key: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise ValueError(f"{path}: {key}={value!r} must be a number above 0")
    return value
