"""How much memory the run needs at its peak."""

import resource
import sys
from pathlib import Path

GB = 1e9


def peak_memory_gb(device_peak_bytes: int | None = None) -> float:
    """The peak in GB (1e9 bytes): of the accelerator if its count is given (torch.cuda.max_memory_allocated()),
    else of this process in main memory (resident set)."""
    return (peak_resident_bytes() if device_peak_bytes is None else device_peak_bytes) / GB


def peak_resident_bytes(status: Path = Path("/proc/self/status")) -> int:
    """The largest resident set that this process had, in bytes.

    Linux' VmHWM comes first: getrusage's figure is inherited over fork and exec, so a worker would report what
    its parent once held.
    """
    try:
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass  # not Linux: the system call below is the only source
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
