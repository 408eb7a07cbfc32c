"""The mesh's groups against the definition of its axes, for a zoo of layouts."""

from dataclasses import replace

import pytest
import torch
from torch.distributed import distributed_c10d

from megacore.layout.layout import Layout
from megacore.mesh.collectives import all_gather, all_reduce, gather_objects
from megacore.mesh.group import Group
from megacore.mesh.mesh import ParallelMesh
from tests.pool import JobFailed, WorkerPool

CPU = torch.device("cpu")
DENSE = {"tp": ("tp",), "cp": ("cp",), "dp": ("dp",), "pp": ("pp",), "dp_cp": ("dp", "cp"), "model": ("pp", "tp")}

LAYOUTS = [
    Layout(tp=2, dp=2, dp_shard=2, etp=2),
    Layout(tp=2, pp=2, dp_shard=1, etp=2),
    Layout(tp=4, ep=2, etp=2),
    Layout(dp=4, dp_shard=2),
    Layout(cp=2, dp=2, dp_shard=1, order=("pp", "cp", "dp", "tp")),
    Layout(tp=2, cp=2, etp=1, ep=4),
]


def describe_groups(rank: int, layout: Layout, kv_replicas: int) -> dict[str, tuple[int, ...]]:
    """The groups of a rank, each having spoken once to show that its members answer in order."""
    mesh = ParallelMesh.build(layout, rank, CPU, kv_replicas)
    groups = {name: value for name, value in vars(mesh).items() if isinstance(value, Group)}
    for name, group in groups.items():
        assert group.axis == name
        assert group.ranks[group.rank] == rank
        assert gather_objects(rank, group) == list(group.ranks)
        assert all_gather(torch.tensor([rank]), group).tolist() == list(group.ranks)
    handles = {group.ranks: group.handle for group in groups.values()}
    assert all(group.handle is handles[group.ranks] for group in groups.values()), "equal ranks share a process group"
    return {name: group.ranks for name, group in groups.items()}


def host_groups_of_rank(rank: int, layout: Layout) -> list[tuple[int, float]]:
    """With gloo in NCCL's place: groups of their own, over which tensors in host memory travel."""
    mesh = ParallelMesh.build(layout, rank, CPU)
    assert mesh.for_host("tp") is mesh.tp, "on the CPU there is nothing else"
    on_gpu, found = replace(mesh, device=torch.device("cuda", 0)), []
    for axis in ("tp", "dp_shard"):
        group, usual = on_gpu.for_host(axis), getattr(mesh, axis)
        assert (group.axis, group.ranks, group.rank) == (axis, usual.ranks, usual.rank)
        assert group.size == 1 or (group.backend == "gloo" and group.handle is not usual.handle)
        found.append((group.size, all_reduce(torch.tensor([10.0**rank]), group).item()))
    return found


def groups_of_lives(rank: int) -> list[int]:
    """How many process groups there are after each of four lives of a run that asks for one beside training."""
    mesh, found = ParallelMesh.build(Layout(dp=2, dp_shard=2), rank, CPU), []
    for life in range(4):
        assert gather_objects((life, rank), mesh.beside()) == [(life, 0), (life, 1)]
        found.append(len(distributed_c10d._world.pg_map))
    return found


def test_a_run_that_is_lived_again_makes_no_more_groups(pool: WorkerPool) -> None:
    for counts in pool.run(groups_of_lives, 2):
        assert len(set(counts)) == 1 and counts[0] > 0


def test_gpus_have_groups_for_what_is_in_host_memory(pool: WorkerPool) -> None:
    layout = Layout(tp=2, dp=2, dp_shard=2, etp=2)
    for rank, found in enumerate(pool.run(host_groups_of_rank, 4, layout)):
        assert found == [(2, [11.0, 1100.0][rank // 2]), (2, [101.0, 1010.0][rank % 2])]
    alone = pool.run(host_groups_of_rank, 2, Layout(dp=2, dp_shard=1))
    assert [each[0] for each in alone] == [(1, 1.0), (1, 10.0)] and alone[0][1] == (1, 1.0)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.describe())
def test_groups_vary_in_their_axes_and_in_nothing_else(pool: WorkerPool, layout: Layout) -> None:
    kv_replicas = 2 if layout.tp % 2 == 0 else 1
    groups = pool.run(describe_groups, layout.world, layout, kv_replicas)
    for rank, mine in enumerate(groups):
        own = layout.coordinate(rank)
        for name, axes in DENSE.items():
            others = [axis for axis in ("tp", "cp", "dp", "pp") if axis not in axes]
            expected = [r for r in range(layout.world) if all(layout.coordinate(r)[a] == own[a] for a in others)]
            assert mine[name] == tuple(expected), (rank, name)
        for axis in ("ep", "etp", "edp"):
            others = [other for other in ("ep", "etp", "edp", "pp") if other != axis]
            expected = [r for r in range(layout.world) if all(layout.coordinate(r)[a] == own[a] for a in others)]
            assert mine[axis] == tuple(expected), (rank, axis)
        assert len(mine["dp_shard"]) == layout.dp_shard
        assert len(mine["dp_replicate"]) == layout.dp_replicate
        assert set(mine["dp_shard"]) & set(mine["dp_replicate"]) == {rank}
        assert mine["kv"] == mine["tp"][own["tp"] // kv_replicas * kv_replicas :][:kv_replicas]
        assert mine["world"] == tuple(range(layout.world))


def build_too_large(rank: int) -> None:
    ParallelMesh.build(replace(Layout(tp=2), dp=2), rank, CPU)


def test_a_layout_for_another_world_is_refused(pool: WorkerPool) -> None:
    with pytest.raises(JobFailed, match="tp2 x dp2 needs 4 ranks, but 2 were started"):
        pool.run(build_too_large, 2)
