"""Every ZeRO stage computes what one process computes, with every optimizer, layout and schedule."""

from dataclasses import replace
from unittest import mock

import pytest
import torch
from torch import Tensor

from megacore.config.optimizers import optimizer_names
from megacore.config.schema import RunConfig
from megacore.model.inputs import Inputs
from megacore.schedule.instruction import COMPUTE, Op
from megacore.sharding import storage as storage_module
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
from tests.pool import WorkerPool

FOUR_LAYERS = ("model.num_layers=4", "train.micro_batch_size=1", "optim.lr_schedule=constant")
RATES = {"sgd": 0.1, "muon": 0.01, "lion": 0.0003, "adafactor": 0.01, "sm3": 0.01}
"""Learning rates at which something is learnt in 20 steps; 0.003 where none is named."""

Curve = list[tuple[float, float]]
Result = tuple[Curve, list[Part], list[Part]]


def steps_of_rank(rank: int, world_size: int, config: RunConfig, num_steps: int) -> Result:
    built = built_rank(rank, world_size, config)
    curve = [step_of(built, step, config.optim.lr) for step in range(1, num_steps + 1)]
    return curve, parts(built, "grads"), parts(built, "params")


class Runs:
    """Short runs, those of one process remembered."""

    def __init__(self, pool: WorkerPool) -> None:
        self.pool = pool
        self.alone: dict[tuple[int, tuple[str, ...]], tuple[Curve, dict[str, Tensor], dict[str, Tensor]]] = {}

    def of(
        self, num_steps: int, world_size: int, *overrides: str
    ) -> tuple[Curve, dict[str, Tensor], dict[str, Tensor]]:
        config = run_config(world_size, *FOUR_LAYERS, *overrides)
        results = self.pool.run(steps_of_rank, world_size, world_size, config, num_steps)
        assert all(result[0] == results[0][0] for result in results), "ranks disagree on loss or norm"
        grads, params = (assemble(config, [result[place] for result in results]) for place in (1, 2))
        return results[0][0], grads, params

    def compare(self, num_steps: int, world_size: int, run: tuple[str, ...], layout: tuple[str, ...]) -> None:
        """Hold a layout's figures, last gradients and weights against those of one process."""
        if (num_steps, run) not in self.alone:
            self.alone[num_steps, run] = self.of(num_steps, 1, *run)
        curve, grads, params = self.alone[num_steps, run]
        ours = self.of(num_steps, world_size, *run, *layout)
        assert len({loss for loss, _ in curve}) == num_steps, "nothing moved, so nothing was compared"
        for step, (got, expected) in enumerate(zip(ours[0], curve, strict=True), 1):
            assert got == pytest.approx(expected, rel=1e-9), f"step {step}"
        # of the last step: weights bring in the rounding of the steps before it, which optimizers amplify
        difference, where = worst_difference(ours[1], grads)
        assert difference < (1e-10 if num_steps <= 2 else 1e-6), where
        if num_steps <= 2:
            difference, where = worst_difference(ours[2], params)
            assert difference < 1e-8, where


@pytest.fixture(scope="module")
def runs(pool: WorkerPool) -> Runs:
    return Runs(pool)


def rule(name: str) -> tuple[str, ...]:
    return f"optim.name={name}", f"optim.lr={RATES.get(name, 0.003)}"


def sizes(**parallel: int) -> tuple[int, tuple[str, ...]]:
    """(ranks, overrides)"""
    world = parallel.get("tp", 1) * parallel.get("pp", 1) * parallel.get("dp", 1)
    return world, tuple(f"parallel.{key}={value}" for key, value in parallel.items())


# All pairs of stage and size, of each axis, occur.
COVERING = [
    *({"zero": zero, "dp": dp} for zero in (1, 2, 3) for dp in (1, 2, 4)),
    *({"zero": zero, "dp": 2, "tp": 2} for zero in (0, 1, 2, 3)),
    *({"zero": zero, "dp": 2, "pp": 2} for zero in (0, 1, 2, 3)),
]


@pytest.mark.parametrize("parallel", COVERING, ids=str)
def test_stages_in_every_layout(runs: Runs, parallel: dict[str, int]) -> None:
    runs.compare(2, sizes(**parallel)[0], rule("adamw"), sizes(**parallel)[1])


@pytest.mark.slow
@pytest.mark.parametrize("zero", [0, 1, 2, 3])
@pytest.mark.parametrize("parallel", [{"dp": 2, "tp": 2, "pp": 2}, {"dp": 4, "pp": 2}, {"dp": 4, "tp": 2}], ids=str)
def test_stages_on_eight_ranks(runs: Runs, zero: int, parallel: dict[str, int]) -> None:
    world_size, layout = sizes(zero=zero, **parallel)
    runs.compare(4, world_size, rule("adamw"), layout)


@pytest.mark.parametrize("name", optimizer_names())
def test_every_optimizer(runs: Runs, name: str) -> None:
    world_size, layout = sizes(zero=3, dp=2, tp=2)
    runs.compare(4, world_size, rule(name), layout)


@pytest.mark.slow
@pytest.mark.parametrize("name", optimizer_names())
@pytest.mark.parametrize("parallel", COVERING, ids=str)
def test_twenty_steps_of_every_optimizer_in_every_layout(runs: Runs, name: str, parallel: dict[str, int]) -> None:
    world_size, layout = sizes(**parallel)
    runs.compare(20, world_size, rule(name), layout)


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_hybrid_sharding(runs: Runs, zero: int) -> None:
    """Two pairs of ranks, each of which shards what the other holds, too."""
    runs.compare(2, 4, rule("adamw"), ("parallel.dp=4", "parallel.dp_shard=2", f"parallel.zero={zero}"))


TIED = ("model.tie_embeddings=true",)
FROZEN = ('optim.freeze=["layers.1.*", "embedding.*"]',)
MODELS = {
    "tied": TIED,
    "frozen": FROZEN,
    "frozen head": ('optim.freeze=["head.*", "final_norm.*"]',),
    "grouped": ('optim.groups=["*.qkv.*: lr_scale=0.1, weight_decay=0"]',),
    "gpt2, dropout, documents": (
        "model.family=gpt2",
        "model.dropout=0.1",
        "model.attention_dropout=0.2",
        "data.reset_attention=true",
    ),
    "clipped by value": ("optim.clip=value", "optim.clip_grad=0.003"),
    "adagc": ("optim.clip=adagc", "optim.adagc_warmup_steps=1", "optim.adagc_ratio=1", *TIED),
    "fewer rows than ranks": ("model.vocab_size=3", *TIED),
}


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
@pytest.mark.parametrize("parallel", [{"dp": 2}, {"dp": 2, "pp": 2}], ids=str)
@pytest.mark.parametrize("model", MODELS)
def test_kinds_of_models(runs: Runs, model: str, parallel: dict[str, int], zero: int) -> None:
    world_size, layout = sizes(zero=zero, **parallel)
    runs.compare(2, world_size, (*rule("adamw"), *MODELS[model]), layout)


@pytest.mark.parametrize("zero", [2, 3])
@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputation(runs: Runs, zero: int, recompute: str) -> None:
    layout = ("parallel.tp=2", "parallel.sequence_parallel=true", f"parallel.recompute={recompute}")
    runs.compare(2, 4, (*rule("adamw"), *MODELS["gpt2, dropout, documents"]), (*layout, f"parallel.zero={zero}"))


@pytest.mark.parametrize("zero", [2, 3])
@pytest.mark.parametrize("tied", [(), TIED], ids=["", "tied"])
@pytest.mark.parametrize(
    ("schedule", "pp"), [("gpipe", 2), ("zb-h1", 1), ("zb-h1", 2), ("zb-h2", 1), ("zb-v", 2), ("dualpipe-v", 2)]
)
def test_schedules(runs: Runs, schedule: str, pp: int, tied: tuple[str, ...], zero: int) -> None:
    pipeline = (f"parallel.pp={pp}", f"parallel.schedule={schedule}")
    runs.compare(2, 2 * pp, (*rule("adamw"), *tied), (*pipeline, f"parallel.zero={zero}"))


def under_way_of_rank(rank: int, world_size: int, config: RunConfig) -> list[int]:
    """How many sums are under way when each unit's backward begins, in a step's last microbatch."""
    built, seen = built_rank(rank, world_size, config), []
    storage, use = built.storage, built.storage.use

    def noted(unit: tuple[int, int], backward: bool) -> None:
        use(unit, backward)
        if backward:
            seen.append(len(storage.pending))

    storage.use = noted  # type: ignore[method-assign]
    step_of(built, 1)
    return seen[-len(storage.buckets) :]


@pytest.mark.parametrize("zero", [2, 3])
def test_gradients_are_summed_while_backward_goes_on(pool: WorkerPool, zero: int) -> None:
    """Embedding, four blocks and head: each begins while the sums of the two above it are under way."""
    config = run_config(2, *FOUR_LAYERS, f"parallel.zero={zero}", "train.global_batch_size=2")
    assert pool.run(under_way_of_rank, 2, 2, config) == [[0, 1, 2, 2, 2, 2]] * 2


def arriving_of_rank(rank: int, world_size: int, config: RunConfig) -> list[int]:
    """How many buckets of new weights are under way when each unit's forward begins, in a step's first microbatch."""
    with mock.patch.object(storage_module, "BUCKET_BYTES", 1 << 12):
        built, seen = built_rank(rank, world_size, config), []
    step_of(built, 1, config.optim.lr)
    storage, use = built.storage, built.storage.use

    def noted(unit: tuple[int, int], backward: bool) -> None:
        use(unit, backward)
        if not backward:
            seen.append(len(storage.arriving))

    storage.use = noted  # type: ignore[method-assign]
    step_of(built, 2, config.optim.lr)
    return seen[:6]


@pytest.mark.parametrize("zero", [1, 2])
def test_new_weights_arrive_while_forward_goes_on(pool: WorkerPool, zero: int) -> None:
    """Embedding, four blocks and head: each waits for its own weights alone."""
    config = run_config(2, *FOUR_LAYERS, f"parallel.zero={zero}", "train.global_batch_size=8")
    for seen in pool.run(arriving_of_rank, 2, 2, config):
        assert seen == sorted(seen, reverse=True) and len(set(seen)) >= 4 and seen[-1] == 0
        assert zero == 1 or seen == [5, 4, 3, 2, 1, 0]


def early_of_rank(rank: int, world_size: int, config: RunConfig, early: bool) -> tuple[Result, list[int]]:
    """As ``steps_of_rank`` in small buckets; and, for each sum of a step, how many computations it precedes."""
    with mock.patch.object(storage_module, "BUCKET_BYTES", 1 << 12):
        built = built_rank(rank, world_size, config)
    if not early:
        built.storage.summed_early = set  # type: ignore[method-assign]
    curve = [step_of(built, step, config.optim.lr) for step in (1, 2)]
    (steps,) = built.trainer._training.values()
    ops = [step.op for step in steps]
    after = [sum(op in COMPUTE for op in ops[place:]) for place, op in enumerate(ops) if op is Op.REDUCE]
    return (curve, parts(built, "grads"), parts(built, "params")), after


@pytest.mark.parametrize("zero", [0, 1])
@pytest.mark.parametrize("tied", [(), TIED], ids=["", "tied"])
@pytest.mark.parametrize(
    ("schedule", "pp", "chunks"),
    [("1f1b", 1, 1), ("zb-h1", 1, 1), ("1f1b", 2, 1), ("interleaved", 2, 2), ("zb-v", 2, 2), ("dualpipe-v", 2, 2)],
)
def test_whole_gradients_are_summed_in_the_last_backward(
    pool: WorkerPool, schedule: str, pp: int, chunks: int, tied: tuple[str, ...], zero: int
) -> None:
    """Unit by unit, and no bit is another than with sums behind it. (Those of DualPipe-V are halves of pairs.)"""
    run = (*FOUR_LAYERS, *rule("adamw"), *tied, f"parallel.zero={zero}", "model.dropout=0.1", "model.vocab_size=67")
    pipeline = (f"parallel.pp={pp}", f"parallel.schedule={schedule}", f"parallel.chunks={chunks}")
    config = run_config(2 * pp, *run, *pipeline)
    early, late = (pool.run(early_of_rank, 2 * pp, 2 * pp, config, early) for early in (True, False))
    followed = [sum(sum(after) for _, after in results) for results in (early, late)]
    assert schedule == "dualpipe-v" or followed[0] > followed[1]
    for (ours, after), (expected, after_late) in zip(early, late, strict=True):
        assert len(after) >= len(after_late) == chunks
        assert ours[0] == expected[0]
        for got, want in zip(ours[1] + ours[2], expected[1] + expected[2], strict=True):
            assert got.name == want.name and torch.equal(got.tensor, want.tensor), got.name


def look_of_rank(rank: int, world_size: int, config: RunConfig) -> tuple[list[float], Tensor | None, Curve]:
    """Evaluation and logits, between two steps."""
    built = built_rank(rank, world_size, config)
    curve = [step_of(built, 1, config.optim.lr)]
    dp = built.mesh.dp
    batches = [replace(each, training=False) for each in microbatches_of(batch_of(config, 3), config, dp.rank, dp.size)]
    evaluation = built.trainer.evaluate(batches).tolist()
    logits = built.trainer.logits(prompt(config))
    return evaluation, logits, [*curve, step_of(built, 2, config.optim.lr)]


def prompt(config: RunConfig) -> Inputs:
    """One sequence, the same for all ranks."""
    whole = batch_of(config, 4)
    return replace(microbatches_of(whole, config, 0, config.train.global_batch_size)[0], training=False)


@pytest.mark.parametrize("zero", [2, 3])
@pytest.mark.parametrize("parallel", [{"dp": 2}, {"dp": 2, "pp": 2}], ids=str)
def test_evaluation_and_logits_between_steps(pool: WorkerPool, parallel: dict[str, int], zero: int) -> None:
    run = (*FOUR_LAYERS, *rule("adamw"))
    ((evaluation, logits, curve),) = pool.run(look_of_rank, 1, 1, run_config(1, *run))
    assert logits is not None and not logits.isnan().any()
    world_size, layout = sizes(zero=zero, **parallel)
    results = pool.run(look_of_rank, world_size, world_size, run_config(world_size, *run, *layout))
    for ours, _, figures in results:
        assert ours == pytest.approx(evaluation, rel=1e-9)
        assert figures == [pytest.approx(each, rel=1e-9) for each in curve]
    seen = [ours for _, ours, _ in results if ours is not None]
    assert len(seen) == parallel["dp"]
    for ours in seen:
        torch.testing.assert_close(ours, logits, rtol=1e-8, atol=1e-9)
