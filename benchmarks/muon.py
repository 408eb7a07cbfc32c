"""Muon's step with matrices dealt out against every rank orthogonalising all of them, in one run: ratios.

    python benchmarks/muon.py [--ranks 2 4] [--hidden 128 256 512 768] [--repeats 5]

A block's four [h, h] and two [4h, h] matrices, each cut evenly over the ranks as ZeRO cuts them, one thread a rank.
The naive way gathers all updates on all ranks in one collective and works on every matrix there. Each cell: its time /
ours (above 1: ours is faster), of the best and (of the median) step; by the clock, and by the processor time of rank 0,
which other programs on the machine disturb less. By multiplications alone it would be 2.00 with 2 ranks and 3.33 with
4, which cannot share these matrices evenly.

Of 3 steps each, float32, torch 2.13, two cores of an AMD EPYC that other programs kept busy: the clock says little
here, and 4 ranks have half a core each.

| h | ranks | by the clock | processor time |
|---|---|---|---|
| 128 | 2 | 0.89 (0.93) | 1.42 (1.29) |
| 256 | 2 | 1.70 (2.32) | 1.65 (1.62) |
| 512 | 2 | 1.99 (1.58) | 1.94 (1.75) |
| 128 | 4 | 2.98 (2.22) | 2.10 (2.12) |
| 256 | 4 | 2.54 (3.58) | 2.72 (2.61) |
| 512 | 4 | 3.87 (4.33) | 3.21 (3.10) |
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, distributed

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megacore.config.optimizers import defaults
from megacore.launch.processes import run_local
from megacore.layout.layout import Layout
from megacore.layout.shards import Run
from megacore.mesh import process_group
from megacore.mesh.collectives import all_gather
from megacore.mesh.group import Group
from megacore.mesh.mesh import ParallelMesh
from megacore.mesh.rank_info import RankInfo
from megacore.optim.rule import Share
from megacore.optim.rules.muon import Muon
from megacore.spec import ParamSpec
from megacore.spec.matrices import Matrix, matrices_of

CPU = torch.device("cpu")


class Naive:
    """In the place of ``WholeMatrices``: everything everywhere."""

    def __init__(self, share: Share) -> None:
        self.share, self.matrices = share, [matrices_of(spec)[0] for spec in share.specs]

    def apply(self, tensors: Sequence[Tensor], work: Callable[[Matrix, Tensor], Tensor]) -> None:
        group, sizes = self.share.shards, [tensor.numel() for tensor in tensors]
        shards = all_gather(torch.cat(list(tensors)), group).view(group.size, -1).split(sizes, dim=1)
        for tensor, matrix, parts in zip(tensors, self.matrices, shards, strict=True):
            result = work(matrix, parts.reshape(matrix.rows, matrix.columns))
            tensor.copy_(result.reshape(-1)[group.rank * tensor.numel() :][: tensor.numel()])


def share_of(hidden: int, tp: Group, shards: Group) -> Share:
    """A rank's equal part of each matrix of a block."""
    shapes = [(hidden, hidden)] * 4 + [(4 * hidden, hidden), (hidden, 4 * hidden)]
    specs = tuple(ParamSpec(f"layers.0.{i}.weight", shape, is_matmul=True) for i, shape in enumerate(shapes))
    runs, weights, offset = [], [], 0
    for spec in specs:
        size = spec.numel // shards.size
        runs.append(Run(spec.name, shards.rank * size, (shards.rank + 1) * size, offset))
        weights.append(torch.zeros(size))
        offset += size
    ones = (1.0,) * len(specs)
    return Share(tuple(runs), specs, tuple(weights), ones, ones, tp, shards, torch.float32, CPU)


def seconds(rule: Muon, grads: Sequence[Tensor]) -> tuple[float, float]:
    """Time of one step on this rank, from all ranks' beginning to all ranks' end, and its processor time."""
    fresh = [grad.clone() for grad in grads]
    distributed.barrier()
    start, busy = time.perf_counter(), time.process_time()
    rule.update(fresh, 1e-3, torch.ones(()))
    distributed.barrier()
    return time.perf_counter() - start, time.process_time() - busy


def ratios(times: Sequence[tuple[float, float]]) -> str:
    """Of the best and (of the median) times."""
    theirs, ours = zip(*times)
    return f"{min(theirs) / min(ours):.2f} ({statistics.median(theirs) / statistics.median(ours):.2f})"


def measure(info: RankInfo, sizes: list[int], repeats: int) -> None:
    """One rank's part; rank 0 prints a row per size."""
    torch.set_num_threads(1)
    process_group.start(info, CPU)
    mesh = ParallelMesh.build(Layout(dp=info.world_size, dp_shard=info.world_size), info.rank, CPU)
    for hidden in sizes:
        ours, naive = (Muon(share_of(hidden, mesh.tp, mesh.dp_shard), defaults("muon")) for _ in range(2))
        naive.whole = Naive(naive.matrices)  # type: ignore[assignment]
        grads = [torch.randn_like(weight) for weight in ours.share.weights]
        times = [(seconds(naive, grads), seconds(ours, grads)) for _ in range(repeats + 1)][1:]  # first: warm-up
        for a, b in zip(ours.share.weights, naive.share.weights, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
        cells = [ratios([(theirs[clock], own[clock]) for theirs, own in times]) for clock in (0, 1)]
        if info.rank == 0:
            print(f"| {hidden} | {info.world_size} | {cells[0]} | {cells[1]} |", flush=True)
    process_group.stop()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4], help="world sizes")
    parser.add_argument("--hidden", type=int, nargs="+", default=[128, 256, 512, 768], help="sizes h")
    parser.add_argument("--repeats", type=int, default=5, help="timed steps of each")
    args = parser.parse_args(argv)
    print("| h | ranks | by the clock | processor time |\n|---|---|---|---|", flush=True)
    codes = [run_local("benchmarks.muon:measure", (args.hidden, args.repeats), ranks) for ranks in args.ranks]
    return max(codes)


if __name__ == "__main__":
    sys.exit(main())
