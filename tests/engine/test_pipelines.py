"""Pipelines compute what one process computes: bit for bit where only stages, chunks, schedule or recompute differ."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megacore.config.schema import RunConfig
from megacore.mesh.group import CommLog
from megacore.pipeline.engine import AHEAD
from megacore.schedule.generators.generate import generate
from megacore.schedule.instruction import SENDS
from megacore.schedule.live import peak_activations
from megacore.schedule.lower import lower
from megacore.spec.activations import activation_bytes
from megacore.spec.stages import layers_of_stages
from tests.engine.common import (
    Part,
    assemble,
    batch_of,
    built_rank,
    microbatches_of,
    parts,
    run_config,
    step_of,
    worst_difference,
)
from tests.model.stages import allocated
from tests.pool import WorkerPool

SIX_LAYERS = ("model.num_layers=6", "train.micro_batch_size=1")
SCHEDULES = ("gpipe", "1f1b", "interleaved", "zb-h1", "zb-h2", "zb-v", "dualpipe-v")
FOLDED = ("zb-v", "dualpipe-v")
PIPELINES = [
    (schedule, pp, chunks)
    for schedule in SCHEDULES
    for pp in (1, 2, 4)
    for chunks in (1, 2, 3)
    if (chunks == 2 if schedule in FOLDED else (chunks == 1) == (schedule != "interleaved")) and pp * chunks <= 8
]
TIED = ("model.tie_embeddings=true",)
FEATURES = (
    "model.family=gpt2",
    "model.dropout=0.1",
    "model.attention_dropout=0.2",
    "data.reset_attention=true",
    "train.z_loss=0.01",
)

Result = tuple[list[tuple[float, float]], list[Part], list[Part], int]


def steps_of_rank(rank: int, world_size: int, config: RunConfig) -> Result:
    """Two steps of gradient descent: figures, last gradients, weights, and the most microbatches alive at once."""
    built = built_rank(rank, world_size, config)
    figures = [step_of(built, step, lr=0.1) for step in (1, 2)]
    return figures, parts(built, "grads"), parts(built, "params"), built.trainer.engine.peak_live


def run_steps(
    pool: WorkerPool, world_size: int, *overrides: str
) -> tuple[list[tuple[float, float]], dict[str, Tensor], dict[str, Tensor], list[int]]:
    config = run_config(world_size, "optim.name=sgd", *overrides)
    results = pool.run(steps_of_rank, world_size, world_size, config)
    assert all(result[0] == results[0][0] for result in results), "every rank knows the loss and the norm"
    grads, params = (assemble(config, [result[place] for result in results]) for place in (1, 2))
    return results[0][0], grads, params, [result[3] for result in results]


def pipeline(schedule: str, pp: int, chunks: int) -> tuple[str, ...]:
    return f"parallel.schedule={schedule}", f"parallel.pp={pp}", f"parallel.chunks={chunks}"


@pytest.mark.parametrize("num_microbatches", [8, 5])
@pytest.mark.parametrize(("schedule", "pp", "chunks"), PIPELINES)
def test_no_bit_differs_from_one_process(
    pool: WorkerPool, schedule: str, pp: int, chunks: int, num_microbatches: int
) -> None:
    run = (*SIX_LAYERS, f"train.global_batch_size={num_microbatches}")
    figures, grads, params, _ = run_steps(pool, 1, *run)
    ours = run_steps(pool, pp, *run, *pipeline(schedule, pp, chunks))
    assert ours[0] == figures
    for name in params:
        assert torch.equal(ours[1][name], grads[name]), name
        assert torch.equal(ours[2][name], params[name]), name
    planned = lower(generate(schedule, pp, num_microbatches, chunks))
    assert [peak / chunks for peak in ours[3]] == list(peak_activations(planned)), "no activation lives longer"


@pytest.mark.parametrize("recompute", ["selective", "full"])
@pytest.mark.parametrize("schedule", ["1f1b", "zb-h1", "zb-v"])
def test_dropout_documents_and_recompute_change_no_bit(pool: WorkerPool, schedule: str, recompute: str) -> None:
    run = (*SIX_LAYERS, *FEATURES, "model.tie_embeddings=false")
    figures, grads, params, _ = run_steps(pool, 1, *run)
    chunks = 2 if schedule in FOLDED else 1
    ours = run_steps(pool, 2, *run, *pipeline(schedule, 2, chunks), f"parallel.recompute={recompute}")
    assert ours[0] == figures
    for name in params:
        assert torch.equal(ours[1][name], grads[name]), name
        assert torch.equal(ours[2][name], params[name]), name


TOGETHER = {
    "tp2 pp2": ("1f1b", 2, 1, 4, "parallel.tp=2"),
    "tp2 pp2 sequence": ("zb-h1", 2, 1, 4, "parallel.tp=2", "parallel.sequence_parallel=true"),
    "tp2 pp2 sequence, full recompute": (
        "interleaved",
        2,
        3,
        4,
        "parallel.tp=2",
        "parallel.sequence_parallel=true",
        "parallel.recompute=full",
    ),
    "pp2 dp2": ("dualpipe-v", 2, 2, 4),
    "pp4 dp2": ("zb-h2", 4, 1, 8),
    "tp2 pp2 dp2": ("zb-v", 2, 2, 8, "parallel.tp=2", "parallel.sequence_parallel=true"),
}


@pytest.mark.parametrize("model", [(), FEATURES, TIED], ids=["llama", "gpt2", "tied"])
@pytest.mark.parametrize("layout", TOGETHER)
def test_pipelines_of_every_other_kind_of_parallelism(pool: WorkerPool, layout: str, model: tuple[str, ...]) -> None:
    schedule, pp, chunks, world_size, *overrides = TOGETHER[layout]
    run = (*SIX_LAYERS, *model, "train.global_batch_size=8")
    figures, grads, params, _ = run_steps(pool, 1, *run)
    ours = run_steps(pool, world_size, *run, *pipeline(schedule, pp, chunks), *overrides)
    for (loss, norm), (expected_loss, expected_norm) in zip(ours[0], figures, strict=True):
        assert loss == pytest.approx(expected_loss, rel=1e-12)
        assert norm == pytest.approx(expected_norm, rel=1e-12)
    for got, expected in ((ours[1], grads), (ours[2], params)):
        difference, where = worst_difference(got, expected)
        assert difference < 1e-10, where


@pytest.mark.parametrize(
    ("stage_layers", "pp", "schedule"),
    [("[0, 1, 5, 0]", 4, "1f1b"), ("[4, 1, 1, 0]", 2, "zb-v"), ("[1, 5]", 2, "zb-h2")],
)
def test_stages_may_be_uneven(pool: WorkerPool, stage_layers: str, pp: int, schedule: str) -> None:
    figures, _, params, _ = run_steps(pool, 1, *SIX_LAYERS)
    chunks = 2 if schedule in FOLDED else 1
    ours = run_steps(pool, pp, *SIX_LAYERS, *pipeline(schedule, pp, chunks), f"parallel.stage_layers={stage_layers}")
    assert ours[0] == figures
    assert all(torch.equal(ours[2][name], params[name]) for name in params)


def test_a_list_from_a_file(pool: WorkerPool, tmp_path: Path) -> None:
    """One that no generator makes: rank 0 has the middle, and only some backwards are split."""
    path = tmp_path / "own.txt"
    path.write_text(
        "# the ends on rank 1\n"
        "0: F1.0 F2.0 F1.1 F2.1 B2.0 B1.0 B2.1 I1.1 W1.1\n"
        "1: F0.0 F0.1 F3.0 B3.0 F3.1 I3.1 B0.0 W3.1 B0.1\n"
    )
    run = (*SIX_LAYERS, "train.global_batch_size=2")
    figures, _, params, _ = run_steps(pool, 1, *run)
    ours = run_steps(pool, 2, *run, *pipeline(str(path), 2, 2))
    assert ours[0] == figures
    assert all(torch.equal(ours[2][name], params[name]) for name in params)


def evaluate_on_rank(rank: int, world_size: int, config: RunConfig) -> list[float]:
    built = built_rank(rank, world_size, config)
    dp = built.mesh.dp
    batches = [replace(each, training=False) for each in microbatches_of(batch_of(config, 3), config, dp.rank, dp.size)]
    return built.trainer.evaluate(batches).tolist()


@pytest.mark.parametrize(("schedule", "pp", "chunks"), [("1f1b", 2, 1), ("interleaved", 2, 3), ("zb-v", 2, 2)])
def test_evaluation_goes_through_all_stages(pool: WorkerPool, schedule: str, pp: int, chunks: int) -> None:
    (alone,) = pool.run(evaluate_on_rank, 1, 1, run_config(1, *SIX_LAYERS))
    config = run_config(pp, *SIX_LAYERS, *pipeline(schedule, pp, chunks))
    assert pool.run(evaluate_on_rank, pp, pp, config) == [alone] * pp


def log_of_rank(rank: int, world_size: int, config: RunConfig) -> list[tuple[str, str, int]]:
    log = CommLog()
    built = built_rank(rank, world_size, config, log)
    log.clear()
    step_of(built, step=1)
    return [(record.axis, record.operation, record.num_elements) for record in log]


@pytest.mark.parametrize(("schedule", "chunks"), [("1f1b", 1), ("interleaved", 3), ("zb-v", 2)])
def test_nothing_but_activations_and_their_gradients_travels(pool: WorkerPool, schedule: str, chunks: int) -> None:
    """No shapes, no dtypes: on the wire are the list's messages; then the norm's sum; loss, count and wishes."""
    pp = 2
    config = run_config(pp, *SIX_LAYERS, *pipeline(schedule, pp, chunks))
    listed = lower(generate(schedule, pp, 8, chunks))
    activation = config.train.seq_len * config.model.hidden_size
    for rank, records in enumerate(pool.run(log_of_rank, pp, pp, config)):
        sends = [("pp", "send", activation)] * len(listed.ranks[rank].having(*SENDS))
        assert records[: len(sends)] == sends
        assert sorted(records[len(sends) :])[1:] == [("pp", "all_reduce", 5)]
        assert sorted(records[len(sends) :])[0][:2] == ("model", "all_reduce")


def peak_bytes_of_rank(rank: int, world_size: int, config: RunConfig) -> int:
    built = built_rank(rank, world_size, config)
    step_of(built, step=1)
    return allocated(lambda: step_of(built, step=2))[1]


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_memory_follows_the_activations_that_the_schedule_keeps(pool: WorkerPool, recompute: str) -> None:
    """On the first rank GPipe keeps all 8 microbatches and 1F1B 2: they differ by what the blocks of 6 keep."""
    run = (*SIX_LAYERS, f"parallel.recompute={recompute}", "model.hidden_size=96", "model.head_dim=24")
    peaks = []
    for schedule in ("gpipe", "1f1b"):
        config = run_config(2, *run, *pipeline(schedule, 2, 1))
        peaks.append(pool.run(peak_bytes_of_rank, 2, 2, config)[0])
    model, seq_len = config.model, config.train.seq_len
    of_block = activation_bytes(model, seq_len, 1, recompute=recompute, dtype_bytes=8)
    of_stage = len(layers_of_stages(model, seq_len, 2)[0]) * of_block
    messages = (AHEAD + 1) * seq_len * model.hidden_size * 8  # under way at one peak, perhaps, and not at the other
    assert peaks[0] - peaks[1] == pytest.approx((8 - 2) * of_stage, rel=0.02, abs=messages)
