"""All groups of one process, built once from the layout and handed to whoever needs one of them."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import cached_property
from itertools import count

import torch
from torch import distributed
from torch.distributed import ProcessGroup

from megacore.layout.layout import Layout
from megacore.mesh.group import IMAGINED, CommLog, Group

Ranks = tuple[int, ...]

BESIDE_LIMIT = timedelta(hours=6)
"""How long one rank may wait for another beside training: for a slow disk that takes terabytes."""


@dataclass(frozen=True)
class ParallelMesh:
    """The groups that this process is one of. Modules are given a `Group`, never the mesh."""

    layout: Layout
    rank: int
    device: torch.device
    tp: Group  # splits every layer's matrices
    cp: Group  # splits the sequence
    dp: Group  # splits the batch
    pp: Group  # splits the layers
    ep: Group  # splits the experts
    etp: Group  # splits each expert's matrices
    edp: Group  # copies of the same experts
    dp_cp: Group  # sums gradients of dense parameters
    dp_shard: Group  # shards state
    dp_replicate: Group  # copies of the sharded state
    model: Group  # pp x tp: holds one copy of the model; norms are summed over it
    kv: Group  # the neighbours in tp that hold copies of the same kv heads
    world: Group

    @classmethod
    def build(
        cls, layout: Layout, rank: int, device: torch.device, kv_replicas: int = 1, log: CommLog | None = None
    ) -> "ParallelMesh":
        """The mesh of `rank`; with more than one rank, torch.distributed must have been started.

        All ranks must call it, with the same layout: each makes all process groups, in the same order. Groups of the
        same ranks share one. Raises ValueError if the layout's world is not the one that was started.
        """
        if layout.world > 1 and distributed.get_world_size() != layout.world:
            raise ValueError(
                f"the layout {layout.describe()} needs {layout.world} ranks, but {distributed.get_world_size()} were "
                "started; start as many, or leave parallel.dp out to derive it"
            )
        partitions = partitions_of(layout, kv_replicas)
        handles = _make_handles(partitions)
        groups = {}
        for axis, partition in partitions.items():
            ranks = next(group for group in partition if rank in group)
            handle, tags = handles.get(ranks, (None, count()))
            backend = "" if handle is None else distributed.get_backend(handle)
            groups[axis] = Group(axis, ranks, ranks.index(rank), handle, backend, log, tags)
        return cls(layout, rank, device, **groups)

    @classmethod
    def single(cls, device: torch.device | str = "cpu") -> "ParallelMesh":
        """The mesh of one process alone; torch.distributed is not touched."""
        return cls.build(Layout(), 0, torch.device(device))

    @classmethod
    def imagined(
        cls, layout: Layout, rank: int, partitions: Mapping[str, tuple[Ranks, ...]], log: CommLog | None = None
    ) -> "ParallelMesh":
        """The mesh of ``rank`` among ranks that are not there, on the meta device; ``partitions`` are
        `partitions_of` the layout. torch.distributed is not touched, and any world will do."""
        groups = {}
        for axis, partition in partitions.items():
            ranks = next(group for group in partition if rank in group)
            groups[axis] = Group(axis, ranks, ranks.index(rank), None, IMAGINED if len(ranks) > 1 else "", log)
        return cls(layout, rank, torch.device("meta"), **groups)

    def for_host(self, axis: str) -> Group:
        """The group of an axis for tensors in host memory: gloo's where NCCL serves those of the device.

        All ranks must call it, for the same axes in the same order.
        """
        group: Group = getattr(self, axis)
        if self.device.type == "cpu" or self.layout.world == 1:
            return group
        handles = {
            ranks: distributed.new_group(list(ranks), backend="gloo")
            for ranks in self.layout.groups(axis)
            if len(ranks) > 1
        }
        if group.size == 1:
            return group
        return replace(group, handle=handles[group.ranks], backend="gloo", tags=count())

    def same_stages(self) -> Group:
        """The ranks of this rank's stages: all of its place in the pipeline. All ranks must call it."""
        if self.layout.pp == 1:
            return self.world
        partition = self.layout.groups("dp", "cp", "tp")
        ranks = next(group for group in partition if self.rank in group)
        handles = {each: distributed.new_group(list(each)) for each in partition if len(each) > 1}
        return Group("same_stages", ranks, ranks.index(self.rank), handles.get(ranks), self.world.backend)

    def beside(self) -> Group:
        """All ranks, over gloo, in a process group of its own: for a thread that works beside training. All ranks must
        call it. It is made once: whoever asks again gets the same, when the thread before has ended."""
        return self._beside

    @cached_property
    def _beside(self) -> Group:
        if self.layout.world == 1:
            return Group.single("beside")
        ranks = self.world.ranks
        handle = distributed.new_group(list(ranks), backend="gloo", timeout=BESIDE_LIMIT)
        return Group("beside", ranks, self.rank, handle, "gloo")


def partitions_of(layout: Layout, kv_replicas: int) -> dict[str, tuple[Ranks, ...]]:
    """For every field of the mesh, how its groups cut the world; the order is that of creation."""
    single_axes = ("tp", "cp", "dp", "pp", "ep", "etp", "edp", "dp_shard", "dp_replicate")
    return {
        "world": layout.groups("pp", "dp", "cp", "tp"),
        **{axis: layout.groups(axis) for axis in single_axes},
        "dp_cp": layout.groups("dp", "cp"),
        "model": layout.groups("pp", "tp"),
        "kv": layout.subgroups("tp", kv_replicas),
    }


def _make_handles(partitions: dict[str, tuple[Ranks, ...]]) -> dict[Ranks, tuple[ProcessGroup, Iterator[int]]]:
    """One process group, with its counter of tags, for each set of two or more ranks."""
    handles: dict[Ranks, tuple[ProcessGroup, Iterator[int]]] = {}
    world = partitions["world"][0]
    for partition in partitions.values():
        for ranks in partition:
            if len(ranks) > 1 and ranks not in handles:
                handle = distributed.group.WORLD if ranks == world else distributed.new_group(list(ranks))
                assert handle is not None, "torch.distributed has been started"
                handles[ranks] = (handle, count())
    return handles
