"""Layouts in which one rank has a tensor twice, or ranks count themselves otherwise; and who writes how much."""

from pathlib import Path
from typing import Any

import pytest

from megacore.config.schema import RunConfig
from megacore.train.state import State
from tests.checkpoint.common import config_of, digests, read_rank, world_of, write_rank
from tests.engine.common import built_rank
from tests.pool import WorkerPool

ODD = {
    "tp outside dp": (("optim.name=adafactor",), {"tp": 2, "dp": 2, "order": "pp-tp-cp-dp"}),
    "both ends on one rank, frozen": (
        ("model.tie_embeddings=true", 'optim.freeze=["embedding.*"]'),
        {"pp": 2, "schedule": "zb-v"},
    ),
    "both ends on one rank": (("model.tie_embeddings=true", "optim.name=came"), {"pp": 2, "schedule": "dualpipe-v"}),
    "fewer rows than ranks": (("model.vocab_size=3", "model.num_kv_heads=1"), {"tp": 4, "dp": 1}),
    "ranks without a run": (("model.vocab_size=3", "model.num_layers=1"), {"dp": 8, "zero": 1}),
    "all frozen but one": (('optim.freeze=["layers.*", "embedding.*", "head.*"]',), {"dp": 4, "zero": 2}),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_layouts(pool: WorkerPool, tmp_path: Path, name: str) -> None:
    words, layout = ODD[name]
    folder, world = str(tmp_path / "source"), world_of(layout)
    written = pool.run(write_rank, world, world, config_of(words, layout), folder, 2, 1)
    assert written[0][1] == ["", ""]
    one = config_of(words, {"dp": 1})
    (((curve, again, _),),) = pool.run(read_rank, 1, 1, one, [folder], str(tmp_path / "own"), 2, 1)
    assert again == digests(folder, 2)
    assert curve[0] == pytest.approx(written[0][0][0], rel=1e-7)


def bytes_of_rank(rank: int, world: int, config: RunConfig) -> tuple[int, int]:
    """(bytes that this rank writes, those of its largest slice)."""
    parts = State(built_rank(rank, world, config)).own_parts()
    return sum(part.num_bytes for part in parts), max((part.num_bytes for part in parts), default=0)


@pytest.mark.parametrize(
    "layout", [{"dp": 4}, {"dp": 4, "zero": 3}, {"tp": 2, "dp": 2}, {"dp": 4, "zero": 2, "dp_shard": 2}], ids=str
)
@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_replicas_share_the_work(pool: WorkerPool, layout: dict[str, Any], name: str) -> None:
    words = ("model.vocab_size=67", f"optim.name={name}")
    ranks = pool.run(bytes_of_rank, 4, 4, config_of(words, layout))
    (alone,) = pool.run(bytes_of_rank, 1, 1, config_of(words, {"dp": 1}))
    assert sum(own for own, _ in ranks) == alone[0], "each byte once"
    largest = max(slice_bytes for _, slice_bytes in ranks)
    assert max(own for own, _ in ranks) <= alone[0] / 4 + 3 * largest
    assert min(own for own, _ in ranks) > 0
