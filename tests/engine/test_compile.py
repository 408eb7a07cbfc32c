"""`kernels.compile`: the same gradients as without, in few graphs that all blocks share, in any layout."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from megacore.config.errors import ConfigError
from megacore.config.schema import RunConfig
from megacore.kernels import inductor
from tests.engine.common import Part, assemble, built_rank, parts, run_config, step_of, worst_difference
from tests.pool import WorkerPool

COMPILE = "kernels.compile=true"


@pytest.fixture(autouse=True)
def from_the_start() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def traced_only(function: Callable[..., Any]) -> Callable[..., Any]:
    """As `compiled`, with graphs that torch walks itself: seconds less."""
    return torch.compile(function, fullgraph=True, backend="aot_eager")


def steps_of_rank(rank: int, world_size: int, config: RunConfig) -> tuple[list[tuple[float, float]], list[Part]]:
    built = built_rank(rank, world_size, config)
    return [step_of(built, step, 0.01) for step in (1, 2)], parts(built, "grads")


def alone(*overrides: str) -> tuple[list[tuple[float, float]], dict[str, Tensor]]:
    config = run_config(1, *overrides)
    curve, grads = steps_of_rank(0, 1, config)
    return curve, assemble(config, [grads])


def same(ours: Any, expected: Any) -> None:
    assert ours[0] == [pytest.approx(figures, rel=1e-12) for figures in expected[0]]
    difference, where = worst_difference(ours[1], expected[1])
    assert difference < 1e-10, where


@pytest.mark.parametrize(
    "recompute", ["full", *(pytest.param(each, marks=pytest.mark.slow) for each in ("none", "selective"))]
)
def test_traced_blocks_give_the_same_gradients(monkeypatch: pytest.MonkeyPatch, recompute: str) -> None:
    """Of three layers one graph for each piece: norm, norm with the residual, heads, activation."""
    monkeypatch.setattr(inductor, "compiled", traced_only)
    monkeypatch.setattr("megacore.train.build.compiled", traced_only)
    ours = alone(COMPILE, f"parallel.recompute={recompute}")
    assert counters["stats"]["unique_graphs"] == 4
    same(ours, alone(f"parallel.recompute={recompute}"))
    assert counters["stats"]["unique_graphs"] == 4, "what was not asked to be compiled is not"


def test_choices_say_so() -> None:
    built = built_rank(0, 1, run_config(1, COMPILE, 'kernels.use=["swiglu=reference"]'))
    backends = {choice.operation: choice.backend for choice in built.kernels}
    assert backends["rms_norm"] == backends["rope"] == inductor.BACKEND
    assert backends["swiglu"] == "reference", "what is named stays"
    assert all("heads" in vars(block.attention) for block in built.stages[0].blocks)
    assert not any("heads" in vars(block.attention) for block in built_rank(0, 1, run_config(1)).stages[0].blocks)


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("parallel.recompute=full",),
        ("parallel.recompute=selective",),
        ("model.family=gpt2", "model.dropout=0.1", "model.attention_dropout=0.1"),
        ("model.family=gemma2", "model.sliding_window=5"),
        ("model.family=olmo2",),
        ("model.family=gpt-neox", "model.head_dim=8"),
        ("data.reset_attention=true", "data.reset_positions=true"),
    ],
    ids=str,
)
def test_compiled_blocks_give_the_same_gradients(overrides: tuple[str, ...]) -> None:
    ours = alone(COMPILE, *overrides)
    assert 2 <= counters["stats"]["unique_graphs"] <= 6, "no graph per layer"
    same(ours, alone(*overrides))


LAYOUTS = {
    "tp2 sequence, zero3": (4, ("parallel.tp=2", "parallel.sequence_parallel=true", "parallel.zero=3")),
    "pp2 zb-h1, zero1": (4, ("parallel.pp=2", "parallel.schedule=zb-h1", "parallel.zero=1")),
    "pp2 zb-v, recomputed": (
        2,
        ("parallel.pp=2", "parallel.schedule=zb-v", "model.num_layers=4", "parallel.recompute=full"),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_in_any_layout(pool: WorkerPool, name: str) -> None:
    """Put-off weight gradients, units, recomputation and messages lie around what is compiled."""
    world_size, overrides = LAYOUTS[name]
    results = []
    for more in ((), (COMPILE,)):
        config = run_config(world_size, *overrides, *more)
        ranks = pool.run(steps_of_rank, world_size, world_size, config, timeout_s=400)
        results.append((ranks[0][0], assemble(config, [grads for _, grads in ranks])))
    same(*results)


@pytest.mark.slow
@pytest.mark.parametrize("overrides", [("precision.dtype=bf16",), ("precision.dtype=fp32",)], ids=str)
def test_other_formats_stay_close(overrides: tuple[str, ...]) -> None:
    ours, expected = alone(COMPILE, *overrides), alone(*overrides)
    for got, figures in zip(ours[0], expected[0]):
        assert got == pytest.approx(figures, rel=2e-2 if "bf16" in overrides[0] else 1e-4)


@pytest.mark.parametrize(
    ("overrides", "world_size", "expected"),
    [
        (("model.family=olmo2", "parallel.tp=2"), 2, "whose ranks sum within it; use tp=1"),
    ],
)
def test_what_cannot_be_compiled_is_refused(overrides: tuple[str, ...], world_size: int, expected: str) -> None:
    run_config(world_size, *overrides)
    with pytest.raises(ConfigError, match="kernels.compile=true") as caught:
        run_config(world_size, COMPILE, *overrides)
    assert expected in str(caught.value)


def test_a_machine_without_a_compiler_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inductor, "_refuses", lambda device: "InvalidCxxCompiler: no working C++ compiler")
    with pytest.raises(ValueError, match=r"torch cannot compile for cpu here \(InvalidCxxCompiler"):
        built_rank(0, 1, run_config(1, COMPILE))


def test_a_break_in_a_graph_is_an_error() -> None:
    def reads(x: Tensor) -> Tensor:
        return x * x.sum().item() if x.tolist() else x

    with pytest.raises(torch._dynamo.exc.Unsupported):
        inductor.compiled(reads)(torch.ones(2))
