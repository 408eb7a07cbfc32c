"""Blocks whose linear layers are transformer-engine's, on a stand-in for it: our side of the contract."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megacore.config.schema import RunConfig
from megacore.parallel.transformer_engine import Linear, TransformerEngine
from megacore.train.build import Built
from tests.checkpoint.common import Curve, Taken, config_of, digests, read_rank, write_rank
from tests.engine.common import (
    Piece,
    assemble,
    batch_of,
    built_rank,
    microbatches_of,
    parts,
    run_config,
    step_of,
    worst_difference,
)
from tests.parallel import standin
from tests.parallel.standin import State, standing_in
from tests.pool import WorkerPool

NAMED = ("linear=transformer-engine",)
LAYERS = ("attention.qkv", "attention.out", "mlp.gate_up", "mlp.down")
SHAPE = (
    "model.hidden_size=64",
    "model.ffn_hidden_size=128",
    "model.num_heads=4",
    "model.num_kv_heads=2",
    "model.head_dim=16",
    "model.vocab_size=67",
    "optim.name=sgd",
    'kernels.use=["linear=transformer-engine"]',
)
LAYOUTS = {
    "alone": (1,),
    "tp2": (2, "parallel.tp=2"),
    "tp4 sequence, copies of kv heads": (4, "parallel.tp=4", "parallel.sequence_parallel=true"),
    "pp2": (2, "parallel.pp=2", "parallel.recompute=selective"),
    "pp2 zb-h1 dp2 zero1": (4, "parallel.pp=2", "parallel.schedule=zb-h1", "parallel.dp=2", "parallel.zero=1"),
    "zb-v": (2, "parallel.pp=2", "parallel.schedule=zb-v", "model.num_layers=4"),
    "dp2 zero2": (2, "parallel.dp=2", "parallel.zero=2"),
    "tp2 sequence dp2 zero3": (4, "parallel.tp=2", "parallel.sequence_parallel=true", "parallel.zero=3"),
}
MODELS = {"llama": (), "gpt2": ("model.family=gpt2", "optim.freeze=layers.1.mlp.up.*")}
QUICK = {*((layout, "gpt2") for layout in LAYOUTS if layout not in ("tp2", "pp2")), ("pp2", "llama")}


def named(config: RunConfig) -> RunConfig:
    """With transformer-engine's layers, also in float64, which the real one has not."""
    return replace(config, kernels=replace(config.kernels, use=NAMED))


def gradients_of_rank(rank: int, world_size: int, config: RunConfig) -> tuple[Curve, list[Piece], int]:
    """(loss, gradient norm) of two steps, the second one's gradients, and how often the stand-in went forward."""
    with standing_in() as state:
        built = built_rank(rank, world_size, config)
        curve = [step_of(built, step=1, lr=0.1), step_of(built, step=2)]
        assert all(m.store is None or not m.store for m, _, _ in state.calls), "what was put off was done"
        return curve, parts(built, "grads"), len(state.calls)


def gradients(pool: WorkerPool, world_size: int, config: RunConfig) -> tuple[Curve, dict[str, Tensor], int]:
    results = pool.run(gradients_of_rank, world_size, world_size, config)
    return results[0][0], assemble(config, [each for _, each, _ in results]), sum(number for _, _, number in results)


@pytest.mark.parametrize(
    ("layout", "model"),
    [
        pytest.param(layout, model, marks=() if (layout, model) in QUICK else pytest.mark.slow)
        for layout in LAYOUTS
        for model in MODELS
    ],
)
def test_layouts_compute_what_our_own_layers_do(pool: WorkerPool, layout: str, model: str) -> None:
    """With biases, frozen layers, and weight gradients that are put off; the reference has one process."""
    world_size, *overrides = LAYOUTS[layout]
    shape = [word for word in overrides if word.startswith("model.")]
    words = (*MODELS[model], "optim.name=sgd")
    expected, expected_grads, none = gradients(pool, 1, run_config(1, *words, *shape))
    assert none == 0
    ours, grads, number = gradients(pool, world_size, named(run_config(world_size, *words, *overrides)))
    worst, whose = worst_difference(grads, expected_grads)
    assert worst <= 1e-10, whose
    for got, wanted in zip(ours, expected, strict=True):
        assert got == pytest.approx(wanted, rel=1e-12)
    tp = next((int(word[-1]) for word in overrides if word.startswith("parallel.tp=")), 1)
    num_layers = 4 if layout == "zb-v" else 3
    assert number == 2 * 4 * num_layers * len(LAYERS) * tp  # steps, microbatches, layers


def config_with(fp8: str, *overrides: str, world_size: int = 1) -> RunConfig:
    precision = ("train.seq_len=32", "precision.dtype=fp32", f"precision.fp8={fp8}")
    return run_config(world_size, *SHAPE, *precision, *overrides)


def test_16_bits_are_added_up_in_32() -> None:
    found = []
    for words in (SHAPE[:-1], SHAPE):
        with standing_in():
            built = built_rank(0, 1, run_config(1, *words, "precision.dtype=bf16", "model.family=gpt2"))
            step_of(built, step=1)
            weight = built.storage.parameters["layers.1.mlp.down.weight"]
            assert weight.grad is None and weight.main_grad.dtype == torch.float32
            found.append(built.storage.grads.clone())
    ours, theirs = found
    assert (ours - theirs).norm() <= 1e-4 * ours.norm() and not torch.equal(theirs, torch.zeros_like(theirs))


def layers_of(built: Built) -> dict[str, Linear]:
    modules = built.trainer.fp8
    assert isinstance(modules, TransformerEngine)
    return modules.made


def calls_of(state: State, layer: Linear) -> list[tuple[bool, bool | None]]:
    return [(in_fp8, first) for module, in_fp8, first in state.calls if module is layer.inner]


def test_weights_are_kept_over_a_steps_microbatches() -> None:
    """Layers that are skipped leave FP8; evaluation neither uses nor changes what is kept."""
    with standing_in() as state:
        built = built_rank(0, 1, config_with("current", "precision.fp8_skip_first=1"))
        layers = layers_of(built)
        assert list(layers) == [f"layers.{block}.{name}" for block in range(3) for name in LAYERS]
        assert {name for name, _ in built.stages[0].named_parameters()} == set(built.spec.by_name)
        microbatches = microbatches_of(batch_of(built.config, 1), built.config, 0, 1)
        for step in (1, 2):
            state.calls.clear()
            step_of(built, step, lr=0.1)
            for name, layer in layers.items():
                skipped = name.startswith("layers.0.")
                kept = [(True, True), (True, False), (True, False), (True, False)]
                assert calls_of(state, layer) == ([(False, None)] * 4 if skipped else kept)
            state.calls.clear()
            built.trainer.evaluate(microbatches)
            assert all(first is None for _, _, first in state.calls) and len(state.calls) == 4 * 12
        assert [c.backend for c in built.kernels if c.operation == "linear"][1] == "transformer-engine, fp8 current"


@pytest.mark.parametrize(
    ("layout", "fp8", "bound"),
    [
        ("pp2 zb-h1 dp2 zero1", "current", 1e-3),
        ("pp2", "delayed", 0.0),
        pytest.param("tp4 sequence, copies of kv heads", "current", 0.15, marks=pytest.mark.slow),
        pytest.param("dp2 zero2", "block", 1e-3, marks=pytest.mark.slow),
        pytest.param("zb-v", "current", 0.0, marks=pytest.mark.slow),
        pytest.param("tp2", "delayed", 0.3, marks=pytest.mark.slow),
    ],
)
def test_layouts_agree_in_fp8(pool: WorkerPool, layout: str, fp8: str, bound: float) -> None:
    """Pipelines to the bit, though they put off and interleave; what tp computes in parts has noise of its own."""
    world_size, *overrides = LAYOUTS[layout]
    shape = [word for word in overrides if word.startswith("model.")]
    expected, expected_grads, _ = gradients(pool, 1, config_with(fp8, *shape))
    ours, grads, _ = gradients(pool, world_size, config_with(fp8, *overrides, world_size=world_size))
    plain, _, _ = gradients(pool, 1, config_with("off", *shape))
    assert expected != plain, "FP8 leaves a trace"
    off = torch.stack([(grads[name] - b).norm() for name, b in expected_grads.items()]).norm()
    assert off <= bound * torch.stack([b.norm() for b in expected_grads.values()]).norm()
    assert ours[0][0] == pytest.approx(expected[0][0], rel=max(bound / 10, 1e-7))


def reductions_of_rank(rank: int, world_size: int, config: RunConfig) -> tuple[list[tuple[str, int]], list[float]]:
    with standing_in() as state:
        built = built_rank(rank, world_size, config)
        step_of(built, step=1)
        modules = built.trainer.fp8
        assert modules is not None
        largest = [tensor.amax().item() for key, tensor in modules.state().items() if "amax_history" in key]
        built.trainer.evaluate(microbatches_of(batch_of(config, 9), config, built.mesh.dp.rank, built.mesh.dp.size))
        histories = [tensor for key, tensor in modules.state().items() if "amax_history" in key]
        assert largest == [tensor.amax().item() for tensor in histories] and all(not h[0].any() for h in histories)
        return state.reductions, largest


def test_ranks_of_a_stage_agree_on_delayed_scales(pool: WorkerPool) -> None:
    """And no others: the two stages have different layers. Evaluation leaves no trace."""
    config = config_with("delayed", "parallel.pp=2", "parallel.tp=2", "precision.fp8_history=16", world_size=4)
    results = pool.run(reductions_of_rank, 4, 4, config)
    assert all(sorted(made) == [("scaling_bwd", 2)] * 4 + [("scaling_fwd", 2)] * 4 for made, _ in results)
    groups = [largest for _, largest in results]
    assert groups[0] == groups[1] and groups[2] == groups[3] and groups[0] != groups[2][: len(groups[0])]
    alone = config_with("delayed", "parallel.pp=2", world_size=2)
    assert all(number == 1 for made, _ in pool.run(reductions_of_rank, 2, 2, alone) for _, number in made)


def standing(function: str, *args: Any) -> Any:
    with standing_in():
        return {"write": write_rank, "read": read_rank}[function](*args)


def write(rank: int, *args: Any) -> Any:
    return standing("write", rank, *args)


def read(rank: int, *args: Any) -> Any:
    return standing("read", rank, *args)


def test_a_run_goes_on_to_the_bit(pool: WorkerPool, tmp_path: Path) -> None:
    """With what delayed scales remember, layer by layer, also in another pipeline; another length knows nothing."""
    words = (*SHAPE, "train.seq_len=16", "precision.dtype=bf16", "precision.fp8=delayed", "precision.fp8_history=8")
    source = str(tmp_path / "source")
    curve, problems = pool.run(write, 2, 2, config_of(words, {"pp": 2}), source, 2, 2)[0]
    assert problems == ["", ""]
    there = digests(source, 2)
    kept = [key for key in there if key.startswith("state/fp8/")]
    assert len(kept) == 4 * len(LAYERS) * 4 and "state/fp8/te8/layers.3.mlp.down/scaling_bwd.scale" in kept
    assert [there[key].split("]")[0] for key in kept[:4]] == ["F32 [8, 2", "F32 [2", "F32 [8, 3", "F32 [3"]

    def taken(layout: dict[str, int], folder: str, *more: str) -> Taken:
        world, own = layout.get("pp", 1), str(tmp_path / folder)
        config = config_of((*words, *more), layout)
        (found,) = pool.run(read, world, world, config, [source], own, 2, 2)[0]
        result: Taken = found
        return result

    for layout in ({"pp": 2}, {}):
        ours, again, difference = taken(layout, f"own{len(layout)}")
        assert again == there and ours == curve and difference == 0.0
    _, again, _ = taken({}, "shorter", "precision.fp8_history=3")
    assert sorted(key for key in again if key.startswith("state/fp8/")) == sorted(
        key.replace("/te8/", "/te3/") for key in kept
    )


def test_what_does_not_go_together_is_refused() -> None:
    def refused(*words: str) -> str:
        with pytest.raises(ValueError) as raised:
            config_with("current", *words, world_size=2)
        return str(raised.value)

    assert "use none or selective" in refused("parallel.recompute=full")
    assert "which ZeRO-3 is there to avoid; use zero=2" in refused("parallel.dp=2", "parallel.zero=3")
    assert "use zero=1" in refused("parallel.dp=2", "parallel.zero=2", "precision.fp8=delayed")
    assert "multiplies 16 and 32 bits; use bf16" in refused("precision.fp8=off", "precision.dtype=fp64")
    words = ("parallel.tp=2", "parallel.sequence_parallel=true", "train.seq_len=8")
    assert "=8 tokens of a rank with parallel.sequence_parallel=true" in refused(*words)


def refuse_on_rank(rank: int, world_size: int, config: RunConfig, no_fp8: str) -> str:
    with standing_in() as state, pytest.raises(ValueError) as raised:
        state.no_fp8 = no_fp8
        built_rank(rank, world_size, config)
    return str(raised.value)


def test_it_says_why_it_cannot_serve(pool: WorkerPool) -> None:
    config = config_with("block")
    why = refuse_on_rank(0, 1, config, "needs compute capability 9.0")
    assert why.endswith("transformer-engine has none of it here: needs compute capability 9.0; use off")
    words = ("parallel.pp=2", "parallel.dp=2", "parallel.schedule=zb-h1", "parallel.zero=2")
    (why, *_) = pool.run(refuse_on_rank, 4, 4, config_with("off", *words, world_size=4), "")
    assert "parallel.schedule=zb-h1 puts weight gradients off" in why and "use zero=1, another schedule" in why
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="no linear for torch.float32 on cpu: transformer-engine: no CUDA device"):
            built_rank(0, 1, config)


def test_recipes_are_those_of_the_run() -> None:
    with standing_in() as state:
        for fp8, kind in (("current", "Float8CurrentScaling"), ("block", "Float8BlockScaling")):
            built_rank(0, 1, config_with(fp8))
            modules = built_rank(0, 1, config_with(fp8)).trainer.fp8
            assert isinstance(modules, TransformerEngine) and isinstance(modules.recipe, getattr(standin, kind))
        words = ("precision.fp8_history=7", "precision.fp8_margin=2")
        modules = built_rank(0, 1, config_with("delayed", *words)).trainer.fp8
        assert isinstance(modules, TransformerEngine)
        assert modules.recipe == standin.DelayedScaling(2, 7, "max", reduce_amax=False)
        assert not state.calls
