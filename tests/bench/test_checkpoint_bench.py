"""`megacore bench checkpoint` times saves and loads that bring back what was saved, of as many bytes on both sides."""

import json
from pathlib import Path

import pytest

from megacore.bench.checkpoint import CASES, COPY, DCP, Sides, lay_out
from megacore.bench.train import OURS, configure
from megacore.checkpoint.read import Checkpoint
from megacore.mesh.rank_info import RankInfo
from megacore.tools import bench
from tests.pool import WorkerPool

TINY = (
    "model.num_layers=2",
    "model.hidden_size=32",
    "model.ffn_hidden_size=48",
    "model.num_heads=4",
    "model.num_kv_heads=4",
    "model.vocab_size=64",
    "train.seq_len=16",
    "train.global_batch_size=2",
)


def sizes_of(rank: int, folder: str) -> tuple[int, int]:
    """Bytes that this rank keeps: ours, and torch's without its counters of steps."""
    config = lay_out(configure(TINY), CASES[0])
    sides = Sides(RankInfo(rank, 2, rank, 2), config, Path(folder))
    state = sides.theirs.state
    tensors = [*state["model"].values()]
    tensors += [x for of in state["optim"]["state"].values() for name, x in of.items() if name != "step"]
    theirs = sum(tensor.to_local().nbytes for tensor in tensors)
    sides.save_ours(True, False)
    sides.save_theirs(False)
    sides.settle()
    assert not list((Path(folder) / DCP).glob("*"))
    saved = Checkpoint.open(str(Path(folder) / OURS))
    saved.verify()
    assert sum(each.size for each in saved.manifest.files) > sides.num_bytes
    return sides.num_bytes, theirs


def test_both_sides_keep_the_same_bytes(pool: WorkerPool, tmp_path: Path) -> None:
    ranks = pool.run(sizes_of, 2, str(tmp_path))
    ours, theirs = (sum(sizes) for sizes in zip(*ranks, strict=True))
    assert ours - theirs == 4  # the clock


@pytest.mark.parametrize("case", [case.name for case in CASES])
def test_a_case_runs_and_is_kept(case: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = ["checkpoint", *TINY, "--case", case, "--rounds", "2", "--json", "--output", str(tmp_path)]
    assert bench.main(arguments) == 0
    shown = json.loads(capfd.readouterr().out)
    (comparison,) = shown["comparisons"]
    assert comparison["name"] == case and comparison["settings"][f"GB/s {OURS}"] > 0
    expected = [OURS, DCP, COPY] if case == "stall" else [OURS, DCP]
    assert [side["side"] for side in comparison["sides"]] == expected
    assert json.loads((tmp_path / "checkpoint.json").read_text()) == shown
