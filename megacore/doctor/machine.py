"""The machine without its GPUs: Python, cores, memory, limits, compilers, clock, disk. Linux tells more than others."""

import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from megacore.doctor.finding import FAIL, OK, WARN, Finding
from megacore.monitor.console import human_bytes
from megacore.processes import usable_cores

OLDEST_PYTHON = (3, 11)
MIN_FILES = 4096
"""Open files: a rank has sockets to its peers, data files, threads of gloo and NCCL."""
MIN_SHM = 1 << 30
DISK_PROBE_BYTES, PROBE_BLOCK = 256 << 20, 16 << 20
SLOW_DISK = 200e6
"""Bytes per second below which checkpoints take long."""
MIN_FREE = 20 << 30


def python() -> Iterator[Finding]:
    """The interpreter."""
    version = platform.python_version()
    where = f"{version} at {sys.executable}"
    if sys.version_info < OLDEST_PYTHON:
        yield Finding("python", FAIL, f"{where} is too old", "install Python 3.11 or later, then bash launch/setup.sh")
    else:
        yield Finding("python", OK, where)
    yield Finding("system", OK, f"{platform.platform()}, host {platform.node()}")


def cores_and_memory() -> Iterator[Finding]:
    """What ranks share."""
    cores, whole = usable_cores(), os.cpu_count() or 1
    limited = f" of {whole}: this process is bound to some of them" if cores < whole else ""
    yield Finding("cores", OK, f"{cores}{limited}")
    info = memory_info()
    if not info:
        return
    total, free = info["MemTotal"], info["MemAvailable"]
    text = f"{human_bytes(total)}, {human_bytes(free)} free"
    few = free < total / 10
    yield Finding("memory", WARN if few else OK, text, "end what else runs here" if few else "")
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.exists() and (value := limit.read_text().strip()).isdecimal() and int(value) < total:
        yield Finding("memory limit", WARN, f"this container may use {human_bytes(int(value))}", "ask for more memory")
    swap = info.get("SwapTotal", 0) - info.get("SwapFree", 0)
    if swap > total / 20:
        yield Finding("swap", WARN, f"{human_bytes(swap)} are in use: steps will stall", "end what else runs here")


def memory_info() -> dict[str, int]:
    """Bytes by name of /proc/meminfo; empty where there is none."""
    path = Path("/proc/meminfo")
    if not path.exists():
        return {}
    pairs = (line.split(":") for line in path.read_text().splitlines())
    return {name: int(rest.split()[0]) * 1024 for name, rest in pairs}


def shared_memory() -> Iterator[Finding]:
    """NCCL's ranks of a node talk through /dev/shm; in containers it is 64 MiB unless asked otherwise."""
    path = Path("/dev/shm")
    if not path.exists():
        yield Finding("shared memory", WARN, "there is no /dev/shm", "mount a tmpfs there")
        return
    size = shutil.disk_usage(path).total
    small = size < MIN_SHM
    fix = "docker run --shm-size=16g, or in Kubernetes an emptyDir of medium Memory at /dev/shm" if small else ""
    yield Finding("shared memory", WARN if small else OK, f"/dev/shm has {human_bytes(size)}", fix)


def limits() -> Iterator[Finding]:
    """What the system lets a process have."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files != resource.RLIM_INFINITY and files < MIN_FILES:
        yield Finding("open files", WARN, f"at most {files}", f"ulimit -n {16 * MIN_FILES}, before the run starts")
    else:
        yield Finding("open files", OK, "unlimited" if files == resource.RLIM_INFINITY else f"at most {files}")
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    bounded = locked != resource.RLIM_INFINITY
    if bounded and Path("/sys/class/infiniband").exists():
        text = f"at most {human_bytes(locked)}: InfiniBand registers memory that must stay where it is"
        yield Finding("locked memory", FAIL, text, "ulimit -l unlimited (limits.conf, docker run --ulimit memlock=-1)")
    else:
        yield Finding("locked memory", OK, f"at most {human_bytes(locked)}" if bounded else "unlimited")


def compilers() -> Iterator[Finding]:
    """What builds csrc/."""
    for name, arguments, without, fix in (
        ("g++", ["--version"], "AdamW, RMSNorm and sample indices run without our C++, more slowly", "apt install g++"),
        ("nvcc", ["--version"], "our CUDA kernels cannot be built", "install the CUDA toolkit, or do without"),
    ):
        found = shutil.which(name) or next((str(p) for p in Path("/usr/local").glob(f"cuda*/bin/{name}")), None)
        if found is None:
            yield Finding(name, WARN if name == "g++" else OK, f"not found: {without}", fix)
            continue
        said = subprocess.run([found, *arguments], capture_output=True, text=True, check=False, timeout=20).stdout
        lines = [line for line in said.splitlines() if line.strip()]
        line = next((line for line in lines if "release" in line), lines[0] if lines else "says no version")
        yield Finding(name, OK, f"{line.strip()} ({found})")


def clock() -> Iterator[Finding]:
    """Whether the machine's time is kept right: logs of many nodes are read side by side."""
    tool = shutil.which("timedatectl")
    if tool is None:
        yield Finding("clock", OK, "timedatectl is not here: whether it is synchronised is not known")
        return
    done = subprocess.run([tool, "show"], capture_output=True, text=True, check=False, timeout=10)
    if "NTPSynchronized=no" in done.stdout:
        yield Finding("clock", WARN, "not synchronised", "timedatectl set-ntp true, or start chronyd")
    elif "NTPSynchronized=yes" in done.stdout:
        yield Finding("clock", OK, "synchronised")
    else:
        yield Finding("clock", OK, "whether it is synchronised is not known")


def disk(folder: Path, num_bytes: int = DISK_PROBE_BYTES) -> Iterator[Finding]:
    """Room, whether it can be written, and speed where checkpoints would go; what is written is flushed, as a save
    does. ``num_bytes`` is what the speed is measured with; 0: it is not."""
    folder = next(each for each in (folder, *folder.resolve().parents) if each.exists())
    free = shutil.disk_usage(folder).free
    little = free < MIN_FREE
    fix = "set checkpoint.folder or out to a larger disk, or checkpoint.keep lower" if little else ""
    yield Finding("disk space", WARN if little else OK, f"{human_bytes(free)} free at {folder.resolve()}", fix)
    try:
        speed = write_speed(folder, num_bytes if free >= 2 * num_bytes else 0)
    except OSError as error:
        text = f"{folder.resolve()} cannot be written: {error.strerror}"
        yield Finding("disk", FAIL, text, "set out= to a folder that you may write to")
        return
    if speed is not None:
        slow = speed < SLOW_DISK
        text = f"{human_bytes(speed)}/s to {folder.resolve()}, flushed"
        yield Finding("disk speed", WARN if slow else OK, text, "put out= on a faster disk" if slow else "")


def write_speed(folder: Path, num_bytes: int) -> float | None:
    """Bytes per second, None where not even a block is asked for; a byte is written in any case. Raises OSError."""
    block = os.urandom(PROBE_BLOCK)
    with tempfile.TemporaryFile(dir=folder) as file:
        began = time.perf_counter()
        file.write(block[:1])
        for _ in range(num_bytes // len(block)):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        return num_bytes / (time.perf_counter() - began) if num_bytes >= len(block) else None
