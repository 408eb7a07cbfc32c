"""Collectives of megacore/mesh/gloo.py against gloo's own, in one run: ratios, not absolute times.

    python benchmarks/collectives.py [--ranks 2 4] [--kib 16 256 4096 16384] [--repeats 10]

Each line: time of gloo's primitive / time of ours (above 1: ours is faster), best and median, alternating A and B.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, distributed

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from launch.processes import run_local
from megacore.layout.layout import Layout
from megacore.mesh import collectives, process_group
from megacore.mesh.group import Group
from megacore.mesh.mesh import ParallelMesh
from megacore.mesh.rank_info import RankInfo

Contest = tuple[Callable[[], object], Callable[[], object]]


def contests(x: Tensor, group: Group) -> dict[str, Contest]:
    """For each collective: gloo's own and ours, on tensors of x's size [n] as the formulas count it."""
    part, whole = x[: x.numel() // group.size].clone(), torch.empty_like(x)
    native_part = torch.empty_like(part)
    gather = getattr(distributed, "all_gather_single", None) or distributed.all_gather_into_tensor
    scatter = getattr(distributed, "reduce_scatter_single", None) or distributed.reduce_scatter_tensor
    return {
        "all_reduce": (lambda: distributed.all_reduce(x), lambda: collectives.all_reduce(x, group)),
        "all_gather": (lambda: gather(whole, part), lambda: collectives.all_gather(part, group)),
        "reduce_scatter": (lambda: scatter(native_part, x), lambda: collectives.reduce_scatter(x, group)),
        "all_to_all": (lambda: distributed.all_to_all_single(whole, x), lambda: collectives.all_to_all(x, group)),
    }


def seconds(action: Callable[[], object]) -> float:
    """Time of one call on this rank, all ranks having begun together."""
    distributed.barrier()
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def measure(info: RankInfo, sizes_kib: list[int], repeats: int) -> None:
    """One rank's part; rank 0 prints."""
    process_group.start(info, torch.device("cpu"))
    group = ParallelMesh.build(Layout(tp=info.world_size), info.rank, torch.device("cpu")).tp
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        for kib in sizes_kib:
            x = torch.zeros(kib * 1024 // dtype.itemsize, dtype=dtype)
            for name, (native, ours) in contests(x, group).items():
                times = [(seconds(native), seconds(ours)) for _ in range(repeats + 1)][1:]  # the first is a warm-up
                theirs_ms, ours_ms = ([1e3 * t for t in column] for column in zip(*times))
                if info.rank == 0:
                    print(
                        f"{info.world_size} ranks {str(dtype)[6:]:8} {kib:6} KiB {name:14} "
                        f"best {min(theirs_ms):7.2f} / {min(ours_ms):7.2f} ms = {min(theirs_ms) / min(ours_ms):5.2f}   "
                        f"median {statistics.median(theirs_ms):7.2f} / {statistics.median(ours_ms):7.2f} ms = "
                        f"{statistics.median(theirs_ms) / statistics.median(ours_ms):5.2f}",
                        flush=True,
                    )
    process_group.stop()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4], help="world sizes")
    parser.add_argument("--kib", type=int, nargs="+", default=[16, 256, 4096, 16384], help="sizes of the whole tensor")
    parser.add_argument("--repeats", type=int, default=10, help="timed calls of each")
    args = parser.parse_args(argv)
    codes = [run_local("benchmarks.collectives:measure", (args.kib, args.repeats), ranks) for ranks in args.ranks]
    return max(codes)


if __name__ == "__main__":
    sys.exit(main())
