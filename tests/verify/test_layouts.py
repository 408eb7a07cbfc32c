"""The language of `--layouts`, and the choice among all legal layouts."""

from itertools import combinations

import pytest

from megacore.config.load import load
from megacore.config.schema import ParallelConfig
from megacore.verify.covering import covering, legal_layouts, values_of
from megacore.verify.layouts import ONE, filled_in, label_of, num_ranks, read_layouts, text_of, why_illegal


def read(text: str, run: ParallelConfig = ONE) -> dict[str, ParallelConfig]:
    problems: list[str] = []
    layouts = read_layouts(text, run, problems)
    assert not problems
    return layouts


def test_sizes_that_are_not_named_are_one() -> None:
    layouts = read("tp=2, pp=2 ; dp=2;pp=4,chunks=2,schedule=interleaved;", ParallelConfig(tp=8, pp=8, dp=8))
    assert list(layouts) == ["tp=2,pp=2", "dp=2", "pp=4,chunks=2,schedule=interleaved"]
    assert [(one.tp, one.pp, one.dp) for one in layouts.values()] == [(2, 2, 1), (1, 1, 2), (1, 4, 1)]
    assert [num_ranks(one) for one in layouts.values()] == [4, 2, 4]
    assert layouts["pp=4,chunks=2,schedule=interleaved"].chunks == 2


def test_how_the_work_is_done_is_the_runs_where_the_layout_has_it() -> None:
    run = ParallelConfig(
        tp=2,
        pp=2,
        schedule="interleaved",
        chunks=2,
        sequence_parallel=True,
        recompute="full",
        stage_layers=(1, 2, 3, 2),
    )
    layouts = read("tp=2,pp=2;pp=2;tp=2;pp=4;pp=2,schedule=zb-h1;tp=2,pp=2,sequence_parallel=false", run)
    how = {name: (one.schedule, one.chunks, one.sequence_parallel, one.stage_layers) for name, one in layouts.items()}
    assert how == {
        "tp=2,pp=2": ("interleaved", 2, True, (1, 2, 3, 2)),
        "pp=2": ("interleaved", 2, False, (1, 2, 3, 2)),
        "tp=2": ("1f1b", 0, True, ()),
        "pp=4": ("interleaved", 2, False, ()),
        "pp=2,schedule=zb-h1": ("zb-h1", 0, False, ()),
        "tp=2,pp=2,sequence_parallel=false": ("interleaved", 2, False, (1, 2, 3, 2)),
    }
    assert {one.recompute for one in layouts.values()} == {"full"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tpp=2", "layout tpp=2: tpp is not a key of a layout; did you mean tp?"),
        ("tp", "layout tp: 'tp' is not KEY=VALUE; write such as tp=2"),
        ("tp=", "layout tp=: 'tp=' is not KEY=VALUE"),
        ("tp=two", "layout tp=two: tp=two must be an integer"),
        ("tp=2,tp=4", "tp is given twice"),
        ("pp=2,schedule=1f2b", "schedule=1f2b is not one of"),
        (" ; ", "names no layout"),
        ("", "names no layout"),
    ],
)
def test_what_cannot_be_read_is_told(text: str, message: str) -> None:
    problems: list[str] = []
    assert not read_layouts(text, ParallelConfig(), problems)
    assert len(problems) == 1 and message in problems[0]


def test_every_layout_has_its_problems_told() -> None:
    problems: list[str] = []
    assert set(read_layouts("dp=2;a=1;b=2,c", ParallelConfig(), problems)) == {"dp=2"}
    assert len(problems) == 3


RUN = load(None, ["train.global_batch_size=24", "train.micro_batch_size=1", "model.num_layers=6"], "demo")


@pytest.fixture(scope="module")
def legal() -> list[ParallelConfig]:
    return legal_layouts(RUN, 4)


def test_legal_layouts_are_those_that_validation_accepts(legal: list[ParallelConfig]) -> None:
    assert len(legal) == len(set(map(values_of, legal)))
    assert values_of(ONE) not in set(map(values_of, legal))
    assert all(num_ranks(layout) <= 4 and not why_illegal(RUN, layout) for layout in legal)
    axes = list(zip(*map(values_of, legal), strict=True))
    assert [set(axis) for axis in (axes[0], axes[2], axes[4])] == [{1, 2, 4}, {1, 2, 3, 4}, {1, 2, 3}]
    assert len(set(axes[3])) == 7 and len(set(axes[1])) == 3 and len(set(axes[7])) == 4
    assert [set(axis) for axis in axes[8:]] == [{0, 1, 2, 3}, {0, 2}]


def test_dp_sizes_share_a_batch(legal: list[ParallelConfig]) -> None:
    """1, 2, 3 and 4 would all be legal; 4 has most divisors among them."""
    assert {layout.dp for layout in legal} == {1, 2, 4}


def test_a_few_layouts_cover_all_pairs(legal: list[ParallelConfig]) -> None:
    def pairs(layouts: list[ParallelConfig]) -> set[object]:
        return {pair for layout in layouts for pair in combinations(enumerate(values_of(layout)), 2)}

    chosen = covering(legal)
    assert pairs(chosen) == pairs(legal)
    assert set(chosen) <= set(legal) and len(chosen) < len(legal) / 10


def test_names_are_read_back(legal: list[ParallelConfig]) -> None:
    for layout in covering(legal):
        assert values_of(read(text_of(layout))[text_of(layout)]) == values_of(layout)
    counted = filled_in({"pp": 2, "stage_layers": (4, 2), "tp": 2, "sequence_parallel": True}, ParallelConfig())
    assert list(read(text_of(counted)).values()) == [counted]
    assert label_of(counted) == "tp2 pp2 sequence layers 4+2"
    hybrid = filled_in({"dp": 4, "dp_shard": 2}, ParallelConfig(zero=3))
    assert (text_of(hybrid), label_of(hybrid)) == ("dp=4,dp_shard=2,zero=3", "dp4 zero3 shard2")
    assert filled_in({"tp": 2}, ParallelConfig(zero=3)).zero == 0, "there is nothing to cut"
    assert (text_of(ONE), label_of(ONE)) == ("tp=1", "one process")
