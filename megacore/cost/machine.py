"""A cluster as the planner sees it: devices, how they are wired, and what share of their peaks real work reaches.

A machine is data. These are known by name; one's own is a TOML file that names one of them and what differs:

    base = "h100"            # every key below is optional
    gpus_per_node = 8
    nvlink_domain = 8        # neighbouring ranks that NVLink joins
    price_per_gpu_hour = 2.6
    nvls_gb_per_s = 480      # of all-reduce, where switches add up
    memory_gb = 80
    [node]                   # between GPUs of a domain, per GPU and direction
    gb_per_s = 370
    latency_us = 7
    [network]                # between nodes, per GPU and direction
    gb_per_s = 45
    latency_us = 16
    [reached]                # shares of the data sheet's peaks that large, undisturbed work reaches
    gemm = 0.65
    fp8 = 0.66
    attention = 0.45
    memory = 0.83
    host_us = 5.0            # what the host needs to launch a kernel

`reached` holds for training, where devices run warm, at the clock that their power allows, and next to other work: it
was set so that published runs come out right (`benchmarks/planner/validate.py`). Products by themselves reach more:
0.87 of an A100's peak, 0.80 of an H100's, 0.78 of a B200's. What NVLS reaches on Blackwell is taken from H100's ratio.

Figures: `cost/hardware.py` for peaks; bandwidths are those that NCCL's tests print as bus bandwidth for large messages
on such machines (DGX A100: 235 GB/s in a node, H100: 360 to 480, HGX H200: 367 with rings). Prices are list prices of
clouds in 2026 for a rented GPU hour, to be replaced by the user's own.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from megacore.config.errors import did_you_mean
from megacore.config.parse import toml
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
    nvls_gb_per_s: float = 0.0
    """Of all-reduce where switches add up (NVLink SHARP); 0: they do not."""


AMPERE = Reached(gemm=0.73, fp8=0.0, attention=0.51, memory=0.83, host_us=6.0, units=108)
HOPPER = Reached(gemm=0.65, fp8=0.66, attention=0.45, memory=0.83, host_us=5.0, units=132)
BLACKWELL = Reached(gemm=0.52, fp8=0.60, attention=0.39, memory=0.83, host_us=4.0, units=148)
ULTRA = replace(BLACKWELL, gemm=0.57, fp8=0.67, attention=0.45)
NVLINK3, NVLINK4, NVLINK5 = Link(232.0, 7.0), Link(370.0, 7.0), Link(680.0, 7.0)
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
    nvls: float = 0.0,
) -> Machine:
    return Machine(name, _BY_NAME[accelerator], gpus, domain, node, network, reached, price, nvls)


MACHINES = (
    _machine("a100-40gb", "a100-40gb", NVLINK3, HDR, AMPERE, 1.6),
    _machine("a100-80gb", "a100-80gb", NVLINK3, HDR, AMPERE, 2.0),
    _machine("a100-pcie", "a100-80gb-pcie", PCIE4, HDR, replace(AMPERE, gemm=0.66), 1.6),
    _machine("a800", "a100-80gb", Link(160.0, 8.0), HDR, AMPERE, 2.0),
    _machine("h100", "h100-sxm", NVLINK4, NDR, HOPPER, 3.0, nvls=480.0),
    _machine("h100-96gb", "h100-96gb", NVLINK4, NDR, HOPPER, 3.0, nvls=480.0),
    _machine("h100-pcie", "h100-pcie", PCIE5, NDR, replace(HOPPER, gemm=0.60, units=114), 2.4),
    _machine("h100-nvl", "h100-nvl", Link(240.0, 8.0), NDR, replace(HOPPER, gemm=0.62), 2.6, domain=2),
    _machine("h200", "h200", NVLINK4, NDR, HOPPER, 3.6, nvls=480.0),
    _machine("b200", "b200", NVLINK5, NDR, BLACKWELL, 5.5, nvls=880.0),
    _machine("b300", "b300", NVLINK5, XDR, ULTRA, 6.5, nvls=880.0),
    _machine("gb200", "gb200", NVLINK5, NDR, BLACKWELL, 6.0, domain=72, gpus=4, nvls=880.0),
    _machine("gb300", "gb300", NVLINK5, XDR, ULTRA, 7.0, domain=72, gpus=4, nvls=880.0),
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
        said = toml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"--gpu={path} cannot be read: {error.strerror}; give a machine's name or file") from None
    except ValueError as error:
        raise ValueError(f"{path} is not TOML: {error}") from None
    base = find_machine(str(said.pop("base", "h100")))
    memory = said.pop("memory_gb", None)
    if memory is not None:
        base = replace(base, accelerator=replace(base.accelerator, memory_gb=_number(path, "memory_gb", memory)))
    plain = {
        "gpus_per_node": int,
        "nvlink_domain": int,
        "price_per_gpu_hour": float,
        "nvls_gb_per_s": float,
        "name": str,
    }
    changes: dict[str, Any] = {"name": path.stem}
    for key, value in said.items():
        if key in ("node", "network", "reached"):
            changes[key] = _section(path, key, getattr(base, key), value)
        elif key in plain:
            if key == "name" and not isinstance(value, str):
                raise ValueError(f'{path}: name={value} must be text, such as "{path.stem}"')
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
    changes: dict[str, Any] = {key: _number(path, f"{name}.{key}", value) for key, value in said.items()}
    return replace(base, **changes)


def _number(path: Path, key: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise ValueError(f"{path}: {key}={value!r} must be a number above 0")
    return value
