"""Ranks that are built and stepped without numbers hold and send what real ones do."""

from collections import Counter
from dataclasses import replace

import pytest

from megacore.config.schema import RunConfig
from megacore.mesh.group import CommLog
from megacore.train.dry_run import dry_run
from megacore.train.imagine import Imagination, Traffic
from megacore.train.live import LiveBytes
from tests.engine.common import batch_of, built_rank, microbatches_of, run_config, step_of
from tests.pool import WorkerPool

LAYOUTS = [
    (4, ("parallel.tp=2", "parallel.pp=2", "parallel.sequence_parallel=true", "model.vocab_size=1004")),
    (2, ("parallel.zero=3",)),
    (4, ("parallel.pp=2", "parallel.zero=2", "parallel.schedule=zb-v", "model.num_layers=4")),
]
"""Of 8 microbatches and more: what is not walked is told from what is."""


def sent_by(
    rank: int, world: int, config: RunConfig
) -> tuple[dict[tuple[str, str], int], dict[tuple[str, str], float]]:
    """Counts and bytes of one real step."""
    log = CommLog()
    built = built_rank(rank, world, config, log)
    log.clear()
    step_of(built, step=1)
    built.storage.arrive()
    size: Counter[tuple[str, str]] = Counter()
    for record in log:
        sent = record.wire_elements(getattr(built.mesh, record.axis).size) * record.dtype.itemsize
        size[record.axis, record.operation] += sent  # type: ignore[assignment]
    return dict(log.totals()), dict(size)


@pytest.mark.parametrize(("world", "overrides"), LAYOUTS)
def test_an_imagined_step_sends_what_a_real_one_sends(pool: WorkerPool, world: int, overrides: tuple[str, ...]) -> None:
    config = run_config(world, "train.micro_batch_size=1", "train.global_batch_size=32", *overrides)
    imagination = Imagination(config, world, "cpu")
    for rank, (counts, size) in enumerate(pool.run(sent_by, world, world, config)):
        traffic: tuple[Traffic, ...] = imagination.rank(rank, walk=True).traffic
        assert {key: count for *key_, count, _ in traffic for key in [tuple(key_)]} == counts
        assert {(axis, operation): sent for axis, operation, _, sent in traffic} == pytest.approx(size)


def test_an_imagined_step_holds_what_a_real_one_holds() -> None:
    config = run_config(1, "train.global_batch_size=2", "precision.dtype=bf16", "train.seq_len=64")
    built = built_rank(0, 1, config)
    microbatches = microbatches_of(batch_of(config, 1), config, 0, 1)
    with LiveBytes() as live:
        built.trainer.step(microbatches, 2 * config.train.seq_len, 0.0)
    imagined = Imagination(config, 1, "cpu").rank(0, walk=True)
    assert imagined.step_bytes == live.peak


@pytest.mark.parametrize(
    "overrides",
    [
        ("optim.name=adamw", "optim.state_dtype=int8"),
        ("precision.dtype=bf16", "precision.master=split"),
        ("optim.name=adafactor",),
        ("optim.freeze=embedding.*", "optim.name=lion"),
    ],
)
@pytest.mark.parametrize("zero", [0, 1, 3])
def test_buffers_have_the_bytes_that_the_spec_counts(overrides: tuple[str, ...], zero: int) -> None:
    layout = (f"parallel.zero={zero}", "parallel.tp=2", "parallel.pp=2", "train.global_batch_size=16")
    if "optim.name=adafactor" in overrides:  # its ranks would ask each other
        layout = ("parallel.pp=2",)
    world = 2 if "optim.name=adafactor" in overrides else 8
    dtype = () if any("dtype=bf16" in each for each in overrides) else ("precision.dtype=fp32",)
    config = run_config(world, *layout, *dtype, *overrides)
    found = dry_run(config, world, "cpu")
    assert found.unbuilt == ""
    assert [stand.number for stand in found.stands] == ([1, 1] if world == 2 else [2, 2, 2, 2])
    for rank in found.ranks:
        assert rank.agrees, (rank.state, rank.spec)
        assert rank.state["optimizer"].used > 0
    changed = replace(found.ranks[0], spec=replace(found.ranks[0].spec, grads=1))
    assert not changed.agrees


def test_what_cannot_be_built_is_told() -> None:
    config = run_config(4, "parallel.tp=2", "optim.name=muon", "precision.dtype=fp32", "parallel.recompute=offload")
    found = dry_run(config, 4, "cpu")
    text = "\n".join(found.lines())
    assert "the optimizer's bytes are the spec's: it asks other ranks" in text
    assert "no step was walked: parallel.recompute=offload" in text
    assert found.as_json()["ranks"][0]["optimizer"] == found.ranks[0].spec.optimizer > 0


def test_the_size_of_the_world_is_no_matter() -> None:
    config = run_config(
        4096,
        "parallel.tp=4",
        "parallel.pp=2",
        "train.global_batch_size=1024",
        "precision.dtype=bf16",
        "parallel.zero=1",
    )
    found = dry_run(config, 4096, "cpu", "small", 1e6)
    data = found.as_json()
    assert sum(rank["stands_for"] for rank in data["ranks"]) == 4096
    walked = [rank for rank in data["ranks"] if rank["step"]]
    assert [rank["pp"] for rank in walked] == [0, 1]
    for rank in walked:
        assert rank["total"] == rank["params"] + rank["grads"] + rank["optimizer"] + rank["step"]
        assert rank["fits"] == (rank["total"] <= 1e6)
