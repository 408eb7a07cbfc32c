"""The host does not wait for the device in a step: nothing there reads a number, or needs one to know a shape.

The figures of a step are read while the next one runs, by `train/loop.py`. Where the optimizer's state lies in host
memory, the host reads whether a step is taken, for it does the update itself.
"""

from typing import Any

import pytest
import torch

from megacore.config.optimizers import optimizer_names
from megacore.config.schema import RunConfig
from megacore.optim.clipping import clear_where
from tests.engine.common import batch_of, built_rank, microbatches_of, run_config, step_of
from tests.engine.waiting import Calls, counting
from tests.pool import WorkerPool

ON_CPU = "clear_unless"
"""Reads a number that on the CPU is at hand; elsewhere it calls `clear_where`."""
FP8 = (
    "precision.dtype=bf16",
    "model.hidden_size=32",
    "model.ffn_hidden_size=64",
    "model.num_heads=2",
    "model.num_kv_heads=2",
    "model.head_dim=16",
)
ALONE: dict[str, tuple[str, ...]] = {
    "documents": ("data.reset_attention=true", "data.reset_positions=true", "model.tie_embeddings=true"),
    "fp16, dropout": ("precision.dtype=fp16", "model.dropout=0.1", "model.attention_dropout=0.1"),
    "fp8 current, statistics": (*FP8, "precision.fp8=current", "log.statistics_every=1"),
    "fp8 delayed": (*FP8, "precision.fp8=delayed", "optim.clip=adagc"),
    "gemma2, recomputed": ("model.family=gemma2", "model.sliding_window=5", "parallel.recompute=full"),
    "smoothed, z-loss": ("train.label_smoothing=0.1", "train.z_loss=0.01", "optim.clip=value"),
    "bf16, split": ("precision.dtype=bf16", "precision.master=split", "parallel.recompute=selective"),
    "bf16, no copies": ("precision.dtype=bf16", "precision.master=none"),
    "moments in 8 bits": ("precision.dtype=fp32", "optim.state_dtype=int8"),
}
LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "tp2 sequence": (2, ("parallel.tp=2", "parallel.sequence_parallel=true", "log.statistics_every=1")),
    "dp2 zero1": (2, ("parallel.zero=1", "precision.dtype=fp16")),
    "dp2 zero3, gathered in fp8": (2, (*FP8, "precision.fp8=current", "precision.fp8_gather=true", "parallel.zero=3")),
    "dp2 zero3 muon": (2, ("parallel.zero=3", "optim.name=muon")),
    "pp2 zb-v": (2, ("parallel.pp=2", "parallel.schedule=zb-v", "model.num_layers=6", "model.tie_embeddings=true")),
    "tp2 pp2 dp1 zb-h1": (4, ("parallel.tp=2", "parallel.pp=2", "parallel.schedule=zb-h1", "model.num_layers=6")),
}


def calls_in_a_step(rank: int, world_size: int, config: RunConfig) -> Calls:
    """Of the second step, and of an evaluation after it."""
    built = built_rank(rank, world_size, config)
    step_of(built, 1, config.optim.lr)
    dp, nominal = built.mesh.dp, config.train.global_batch_size * config.train.seq_len
    microbatches = microbatches_of(batch_of(config, 2), config, dp.rank, dp.size)
    with counting() as calls:
        built.trainer.step(microbatches, nominal, config.optim.lr, watched=config.log.statistics_every > 0)
        built.trainer.evaluate(microbatches)
    return calls


def waits(calls: Calls) -> Calls:
    assert any(caller == ON_CPU for _, caller in calls), "the counters see nothing"
    return Calls({call: number for call, number in calls.items() if call[1] != ON_CPU})


@pytest.mark.parametrize("name", ALONE)
def test_nothing_waits_in_one_process(name: str) -> None:
    assert not waits(calls_in_a_step(0, 1, run_config(1, *ALONE[name])))


@pytest.mark.parametrize("name", optimizer_names())
def test_no_optimizer_waits(name: str) -> None:
    assert not waits(calls_in_a_step(0, 1, run_config(1, f"optim.name={name}", "model.num_layers=1")))


QUICK = ("tp2 sequence", "dp2 zero3 muon", "pp2 zb-v")


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in LAYOUTS])
def test_nothing_waits_in_any_layout(pool: WorkerPool, name: str) -> None:
    world_size, overrides = LAYOUTS[name]
    config = run_config(world_size, *overrides)
    for calls in pool.run(calls_in_a_step, world_size, world_size, config):
        assert not waits(calls)


def test_gradients_are_cleared_without_being_asked_for() -> None:
    grads = [torch.full((3,), torch.inf), torch.ones(2)]
    with counting() as calls:
        clear_where(torch.tensor(1.0, dtype=torch.float64).isinf(), grads)
        assert torch.isinf(grads[0]).sum().shape == ()
        clear_where(~torch.zeros((), dtype=torch.bool), grads)
    assert set(calls) == {("lift_fresh", "?")}
    assert not torch.cat(grads).any()


X = torch.arange(4.0)


@pytest.mark.parametrize(
    ("read", "expected"),
    [
        (lambda: X.sum().item(), "item"),
        (lambda: X.tolist(), "tolist"),
        (lambda: bool(X[0] > 0), "__bool__"),
        (lambda: X[X > 1], "index"),
        (lambda: X.clone().__setitem__(X > 1, X[:2]), "index_put_"),
        (lambda: torch.nonzero(X), "nonzero"),
        (lambda: X.masked_select(X > 1), "masked_select"),
        (lambda: torch.equal(X, X), "equal"),
        (lambda: X.numpy(), "numpy"),
        (lambda: X.cpu(), "cpu"),
        (lambda: torch.tensor([1.0]), "lift_fresh"),
        (lambda: range(4)[X[1].long()], "__index__"),
        (lambda: torch.unique(X), "_unique2"),
    ],
)
def test_the_counters_see_what_waits(read: Any, expected: str) -> None:
    with counting() as calls:
        read()
    assert expected in {name for name, _ in calls}


def test_the_counters_see_backward() -> None:
    class Reads(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            return grad * grad.sum().item() * grad.tolist()[0]

    y = Reads.apply(torch.ones(2, requires_grad=True)).sum()
    with counting() as calls:
        y.backward()
    assert {"item", "tolist", "_local_scalar_dense"} <= {name for name, _ in calls}


@pytest.mark.gpu
def test_cuda_waits_for_nothing() -> None:
    """torch's own watch over the calls that wait, on the device itself. Not run yet."""
    from megacore.mesh.rank_info import RankInfo
    from megacore.train.build import build

    device = torch.device("cuda", 0)
    config = run_config(1, "precision.dtype=bf16", "train.device=cuda", "log.statistics_every=1")
    built = build(config, RankInfo(0, 1, 0, 1), device)
    nominal = config.train.global_batch_size * config.train.seq_len
    from megacore.verify.samples import dealt

    microbatches = dealt(batch_of(config, 1), config, 0, 1, device)
    built.trainer.step(microbatches, nominal, 0.001)
    torch.cuda.set_sync_debug_mode("error")
    try:
        built.trainer.step(microbatches, nominal, 0.001, watched=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")
