"""The two factorings of the ranks: every group is what the digits of its ranks say."""

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megacore.config.schema import ParallelConfig
from megacore.layout import Layout

ORDERS = ("pp-dp-cp-tp", "pp-cp-dp-tp", "pp-tp-cp-dp", "pp-dp-tp-cp")
DENSE, EXPERT = ("tp", "cp", "dp", "pp"), ("etp", "ep", "edp", "pp")
small = st.integers(1, 3)


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    """Any legal layout of up to a few hundred ranks."""
    tp, cp, pp, shard, replicate = (draw(small) for _ in range(5))
    ranks = tp * cp * shard * replicate
    ep = draw(st.sampled_from([n for n in range(1, ranks + 1) if ranks % n == 0]))
    etp = draw(st.sampled_from([n for n in range(1, ranks // ep + 1) if ranks // ep % n == 0]))
    order = tuple(draw(st.sampled_from(ORDERS)).split("-"))
    return Layout(tp=tp, cp=cp, dp=shard * replicate, pp=pp, dp_shard=shard, ep=ep, etp=etp, order=order)


@given(layouts())
def test_a_rank_and_its_coordinate_name_each_other(layout: Layout) -> None:
    seen = {tuple(layout.coordinate(rank)[axis] for axis in DENSE) for rank in range(layout.world)}
    assert len(seen) == layout.world == layout.tp * layout.cp * layout.dp * layout.pp
    for rank in range(layout.world):
        at = layout.coordinate(rank)
        assert all(0 <= at[axis] < getattr(layout, axis) for axis in (*DENSE, *EXPERT))
        assert layout.rank({axis: at[axis] for axis in DENSE}) == rank
        assert layout.rank({axis: at[axis] for axis in ("pp", "dp_replicate", "dp_shard", "cp", "tp")}) == rank


@given(layouts())
def test_both_factorings_cover_the_same_ranks(layout: Layout) -> None:
    assert layout.dp * layout.cp * layout.tp == layout.edp * layout.ep * layout.etp
    for expert in (False, True):
        assert math.prod(size for _, size in layout.radices(expert)) == layout.world
    for stage in range(layout.pp):  # a pipeline rank holds the same ranks in both
        assert {layout.coordinate(rank)["pp"] for rank in layout.groups("dp", "cp", "tp")[stage]} == {stage}
    assert layout.groups("dp", "cp", "tp") == layout.groups("edp", "ep", "etp")


@given(layouts(), st.data())
def test_groups_partition_the_world_and_differ_along_their_axes_only(layout: Layout, data: st.DataObject) -> None:
    factoring = data.draw(st.sampled_from([DENSE, EXPERT]))
    axes = data.draw(st.lists(st.sampled_from(factoring), min_size=1, unique=True))
    groups = layout.groups(*axes)
    assert sorted(rank for group in groups for rank in group) == list(range(layout.world))
    assert [group[0] for group in groups] == sorted(group[0] for group in groups)
    others = [axis for axis in factoring if axis not in axes]
    for group in groups:
        assert len(group) == math.prod(getattr(layout, axis) for axis in axes)
        assert list(group) == sorted(group)
        assert len({tuple(layout.coordinate(rank)[axis] for axis in others) for rank in group}) == 1


@given(layouts())
def test_replicas_are_outermost_in_dp(layout: Layout) -> None:
    assert layout.dp == layout.dp_replicate * layout.dp_shard
    for group in layout.groups("dp"):
        at = [layout.coordinate(rank) for rank in group]
        assert [coordinate["dp"] for coordinate in at] == list(range(layout.dp))
        assert [divmod(coordinate["dp"], layout.dp_shard) for coordinate in at] == [
            (coordinate["dp_replicate"], coordinate["dp_shard"]) for coordinate in at
        ]


@given(layouts())
def test_the_default_order_puts_tp_next_to_each_other_and_pp_farthest(layout: Layout) -> None:
    layout = replace(layout, order=Layout.order)
    assert layout.groups("tp")[0] == tuple(range(layout.tp))
    assert layout.groups("pp")[0] == tuple(range(0, layout.world, layout.world // layout.pp))


def test_groups_of_a_layout_written_out() -> None:
    layout = Layout(tp=2, dp=2, pp=2, dp_shard=2, ep=4)
    assert layout.groups("tp") == ((0, 1), (2, 3), (4, 5), (6, 7))
    assert layout.groups("dp", "cp") == ((0, 2), (1, 3), (4, 6), (5, 7))
    assert layout.groups("pp", "tp") == ((0, 1, 4, 5), (2, 3, 6, 7))
    assert layout.groups("ep") == ((0, 1, 2, 3), (4, 5, 6, 7))
    assert layout.edp == 1
    assert layout.describe() == "tp2 x pp2 x dp2 x ep4"
    assert Layout().describe() == "one process"


def test_subgroups_are_runs_of_neighbours() -> None:
    layout = Layout(tp=4, dp=2, dp_shard=2)
    assert layout.subgroups("tp", 2) == ((0, 1), (2, 3), (4, 5), (6, 7))
    assert layout.subgroups("dp", 1) == tuple((rank,) for group in layout.groups("dp") for rank in group)
    with pytest.raises(ValueError, match="runs of 3 do not divide tp=4"):
        layout.subgroups("tp", 3)


def test_sizes_left_out_are_derived_from_the_world() -> None:
    layout = Layout.of(ParallelConfig(tp=2, pp=2, zero=1, chunks=2), 16)
    assert (layout.dp, layout.dp_shard, layout.etp, layout.edp, layout.zero) == (4, 4, 2, 4, 1)
    assert layout.world == 16
    assert layout.num_stages == 4
    assert Layout.of(ParallelConfig(tp=2, ep=4), 8).etp == 1
    assert [Layout.of(ParallelConfig(pp=4, schedule=kind), 4).num_stages for kind in ("1f1b", "zb-v")] == [4, 8]
    assert Layout.of(ParallelConfig(dp=4, dp_shard=2), 4).dp_replicate == 2


@pytest.mark.parametrize(
    ("parallel", "world", "message"),
    [
        (ParallelConfig(tp=2, pp=3), 8, r"8 ranks cannot hold tp\*pp\*cp=2\*3\*1=6; use a multiple of 6 ranks"),
        (ParallelConfig(tp=2, dp=2), 8, "dp=2 needs 4 ranks, but there are 8"),
        (ParallelConfig(dp_shard=3), 4, "dp_shard=3 does not divide dp=4"),
        (ParallelConfig(ep=3), 4, r"ep\*etp=3 does not divide dp\*cp\*tp=4"),
        (ParallelConfig(order="dp-pp-cp-tp"), 4, "order=dp-pp-cp-tp must begin with pp"),
        (ParallelConfig(order="pp-dp-cp"), 4, "order=pp-dp-cp must"),
    ],
)
def test_a_layout_that_does_not_fit_is_refused(parallel: ParallelConfig, world: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Layout.of(parallel, world)


def test_strangers_are_refused() -> None:
    layout = Layout(dp=2, dp_shard=2)
    with pytest.raises(ValueError, match="rank 2 is not in a world of 2"):
        layout.coordinate(2)
    with pytest.raises(ValueError, match="rank -1"):
        layout.coordinate(-1)
    with pytest.raises(ValueError, match="are not among"):
        layout.groups("dp", "ep")  # of two factorings
