"""With state, or activations, in host memory a run computes bit for bit what it computes without."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from megacore.config.optimizers import optimizer_names
from megacore.config.schema import RunConfig
from megacore.model import offload
from megacore.optim.offload import Offloaded
from megacore.train.build import Built
from megacore.train.state import State
from tests.engine.common import Part, batch_of, built_rank, microbatches_of, parts, run_config, step_of
from tests.pool import WorkerPool

FOUR_LAYERS = ("model.num_layers=4", "train.micro_batch_size=1", "train.global_batch_size=4", "model.vocab_size=67")
STEPS = 3
GPT2 = ("model.family=gpt2", "model.dropout=0.1", "model.attention_dropout=0.2", "data.reset_attention=true")
TIED = ("model.tie_embeddings=true",)

Result = tuple[list[tuple[float, float]], list[Part], list[Part], list[Tensor]]


def steps_of_rank(rank: int, world_size: int, config: RunConfig) -> Result:
    """Figures of a few steps, the last gradients, parameters and this rank's own updated weights."""
    built = built_rank(rank, world_size, config)
    curve = [step_of(built, step, config.optim.lr) for step in range(1, STEPS + 1)]
    weights = [weight.double() for weight in built.trainer.storage.values()]
    return curve, parts(built, "grads"), parts(built, "params"), weights


def results(pool: WorkerPool, world_size: int, *overrides: str) -> list[Result]:
    config = run_config(world_size, *FOUR_LAYERS, "optim.lr=0.003", *overrides)
    return pool.run(steps_of_rank, world_size, world_size, config)


def assert_same(ours: list[Result], expected: list[Result], with_grads: bool = False) -> None:
    """Every bit of figures and weights. Gradients are the rule's to overwrite, which may spare the device's."""
    for (curve, grads, *weights), (wanted_curve, wanted_grads, *wanted) in zip(ours, expected, strict=True):
        assert curve == wanted_curve
        for got, want in ((grads, wanted_grads),) * with_grads + ((weights[0], wanted[0]),):
            assert [part.name for part in got] == [part.name for part in want]
            assert all(torch.equal(a.tensor, b.tensor) for a, b in zip(got, want))
        assert all(torch.equal(a, b) for a, b in zip(weights[1], wanted[1], strict=True))


def sizes(**parallel: int) -> tuple[int, tuple[str, ...]]:
    """(ranks, overrides)"""
    world = parallel.get("tp", 1) * parallel.get("pp", 1) * parallel.get("dp", 1)
    return world, tuple(f"parallel.{key}={value}" for key, value in parallel.items())


LAYOUTS = [
    {"dp": 1},
    *({"zero": zero, "dp": 2} for zero in (0, 1, 2, 3)),
    *({"zero": zero, "dp": 2, "tp": 2} for zero in (0, 1, 3)),
    *({"zero": zero, "dp": 2, "pp": 2} for zero in (1, 2, 3)),
]


@pytest.mark.parametrize("parallel", LAYOUTS, ids=str)
def test_state_on_the_host_changes_no_bit(pool: WorkerPool, parallel: dict[str, int]) -> None:
    world_size, layout = sizes(**parallel)
    assert_same(results(pool, world_size, *layout, "optim.offload=cpu"), results(pool, world_size, *layout))


@pytest.mark.parametrize("name", [name for name in optimizer_names() if name != "adamw"])
def test_nor_with_any_optimizer(pool: WorkerPool, name: str) -> None:
    world_size, layout = sizes(zero=3, dp=2, tp=2)
    run = (*layout, f"optim.name={name}", *TIED, "train.seed=7")
    ours = results(pool, world_size, *run, "optim.offload=cpu")
    assert_same(ours, results(pool, world_size, *run))


FORMATS = {
    "fp32": ("precision.dtype=fp32",),
    "bf16": ("precision.dtype=bf16",),
    "bf16, weights rounded by chance": ("precision.dtype=bf16", "precision.master=none"),
    "bf16, moments rounded by chance": (
        "precision.dtype=bf16", "optim.state_dtype=bf16", "optim.state_rounding=stochastic",
    ),
    "bf16, lion": ("precision.dtype=bf16", "optim.name=lion"),
    "fp16, int8": ("precision.dtype=fp16", "optim.state_dtype=int8", "precision.loss_scale_start=1024"),
}  # fmt: skip


@pytest.mark.parametrize("zero", [0, 1, 3])
@pytest.mark.parametrize("formats", FORMATS)
def test_nor_in_any_format(pool: WorkerPool, formats: str, zero: int) -> None:
    world_size, layout = sizes(zero=zero, dp=2)
    run = (*layout, *FORMATS[formats])
    assert_same(results(pool, world_size, *run, "optim.offload=cpu"), results(pool, world_size, *run))


@pytest.mark.slow
@pytest.mark.parametrize("where", ["cpu", "nvme"])
@pytest.mark.parametrize("name", optimizer_names())
@pytest.mark.parametrize("parallel", LAYOUTS, ids=str)
def test_nor_in_any_layout(pool: WorkerPool, tmp_path: Path, parallel: dict[str, int], name: str, where: str) -> None:
    world_size, layout = sizes(**parallel)
    run = (*layout, f"optim.name={name}")
    ours = results(pool, world_size, *run, f"optim.offload={where}", f"out={tmp_path}")
    assert_same(ours, results(pool, world_size, *run))


def built_and_stepped(rank: int, world_size: int, config: RunConfig) -> Built:
    built = built_rank(rank, world_size, config)
    step_of(built, 1, config.optim.lr)
    return built


def test_what_was_read_back_can_be_published() -> None:
    """As a checkpoint does: weights are written, then given to the model; and the clock of every bucket is set."""
    config = run_config(1, *FOUR_LAYERS, "precision.dtype=bf16", "optim.offload=cpu", "optim.lr=0.003")
    built = built_and_stepped(0, 1, config)
    rule, storage = built.trainer.rule, built.storage
    assert isinstance(rule, Offloaded) and rule.clock == 1
    assert rule.share.weights is storage.weights and all(one.dtype == torch.float32 for one in storage.weights)
    for weight in storage.weights:
        weight.fill_(1 + 2**-12)
    storage.publish()
    assert all((param == 1).all() for param in storage.parameters.values())
    rule.set_clock(torch.tensor(5.0))
    step_of(built, 2, config.optim.lr)
    assert {one.clock.item() for one in (rule, *rule.rules)} == {6}


def saved_of_rank(rank: int, world_size: int, config: RunConfig) -> dict[str, bytes]:
    """What a checkpoint would hold of this rank, by key and place."""
    state = State(built_and_stepped(rank, world_size, config))
    return {
        f"{part.key} {part.start}": part.tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        for part in state.parts
    }


@pytest.mark.parametrize("name", ["adamw", "adafactor", "muon"])
def test_a_checkpoint_holds_the_same(pool: WorkerPool, tmp_path: Path, name: str) -> None:
    world_size, layout = sizes(zero=1, dp=2, tp=2)
    run = (*FOUR_LAYERS, *layout, *TIED, f"optim.name={name}", "optim.lr=0.003", "precision.dtype=bf16")
    seen = [
        pool.run(saved_of_rank, world_size, world_size, run_config(world_size, *run, f"optim.offload={where}", *more))
        for where, *more in (("none",), ("cpu",), ("nvme", f"out={tmp_path}"))
    ]
    assert all(len(saved) > 30 for saved in seen[0])
    assert seen[1] == seen[0] and seen[2] == seen[0]


def test_statistics_see_the_weights_on_the_host(pool: WorkerPool) -> None:
    run = ("log.statistics_every=1", "precision.dtype=fp32")
    seen = [figures_of_rank(run_config(1, *FOUR_LAYERS, *run, f"optim.offload={where}")) for where in ("none", "cpu")]
    assert seen[0] == seen[1] and seen[0]["update_norm"]["mlp"] > 0


def figures_of_rank(config: RunConfig) -> dict[str, dict[str, float]]:
    built = built_rank(0, 1, config)
    nominal = config.train.global_batch_size * config.train.seq_len
    batch = microbatches_of(batch_of(config, 1), config, 0, 1)
    statistics = built.trainer.step(batch, nominal, 1e-3, watched=True).statistics
    assert statistics is not None
    return statistics.record()


def sent_of_rank(rank: int, world_size: int, config: RunConfig) -> tuple[Result, int]:
    """As ``steps_of_rank``, with every saved tensor sent away however small; and how many were."""
    sent: list[int] = []
    begin, least = offload._Trip.__init__, offload.MIN_BYTES

    def noted(trip: offload._Trip, tensor: Tensor) -> None:
        sent.append(tensor.nbytes)
        begin(trip, tensor)

    offload._Trip.__init__, offload.MIN_BYTES = noted, 0  # type: ignore[method-assign]
    try:
        return steps_of_rank(rank, world_size, config), len(sent)
    finally:
        offload._Trip.__init__, offload.MIN_BYTES = begin, least  # type: ignore[method-assign]


ACTIVATIONS = {
    "one process": ({"dp": 1},),
    "zero 2": ({"dp": 2, "zero": 2},),
    "zero 3": ({"dp": 2, "zero": 3},),
    "zero 3, gpt2": ({"dp": 2, "zero": 3}, *GPT2),
    "zero 3, norms of heads": ({"dp": 2, "zero": 3}, "model.qk_norm=true"),
    "zero 3, tp, sequence": ({"tp": 2, "dp": 2, "zero": 3}, "parallel.sequence_parallel=true"),
    "gpipe": ({"pp": 2}, "parallel.schedule=gpipe"),
    "interleaved, tied": ({"pp": 2}, "parallel.schedule=interleaved", "parallel.chunks=2", *TIED),
    "zb-h1, zero 3": ({"pp": 2, "dp": 2, "zero": 3}, "parallel.schedule=zb-h1"),
    "zb-v, gpt2": ({"pp": 2}, "parallel.schedule=zb-v", *GPT2),
    "frozen, zero 3": ({"dp": 2, "zero": 3}, 'optim.freeze=["layers.1.*", "embedding.*"]'),
}  # fmt: skip


@pytest.mark.parametrize("layout", ACTIVATIONS)
def test_activations_on_the_host_change_no_bit(pool: WorkerPool, layout: str) -> None:
    """Under ZeRO-3 norms' weights have left their buffer, and others' have come, between forward and backward."""
    parallel, *more = ACTIVATIONS[layout]
    world_size, words = sizes(**parallel)
    run = ("optim.lr=0.02", *words, *more)
    config = run_config(world_size, *FOUR_LAYERS, *run, "parallel.recompute=offload")
    ours = pool.run(sent_of_rank, world_size, world_size, config)
    assert all(number > 100 for _, number in ours)
    assert_same([result for result, _ in ours], results(pool, world_size, *run), with_grads=True)
