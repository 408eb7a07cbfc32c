"""Ranks that carry out a verification with a fault in them."""

import os
import signal
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch

from megacore.mesh.rank_info import RankInfo
from megacore.pipeline.engine import PipelineEngine
from megacore.sharding import storage
from megacore.train.build import Built
from megacore.verify import ranks
from megacore.verify.measure import Finding, Yardstick, findings


def without_sums_over_tp(info: RankInfo, *args: Any) -> None:
    """What is partial over tp stays so."""
    with mock.patch.object(storage, "_sum_together", lambda tensors, group: None):
        ranks.work(info, *args)


def tampered(info: RankInfo, args: tuple[Any, ...], tamper: Callable[[Built, Yardstick], None]) -> None:
    """Something happens to what a layout has computed before it is measured."""

    def measured(built: Built, yardstick: Yardstick) -> list[Finding]:
        tamper(built, yardstick)
        return findings(built, yardstick)

    with mock.patch.object(ranks, "findings", measured):
        ranks.work(info, *args)


def slightly_off(info: RankInfo, *args: Any) -> None:
    """Layouts with dp get one element of one gradient wrong, by 1e-8 of the gradient norm, on all ranks alike."""

    def tamper(built: Built, yardstick: Yardstick) -> None:
        if built.mesh.dp.size > 1:
            built.storage.whole("grads").views()["layers.1.mlp.down.weight"][0, 0] += 1e-8 * yardstick.grad_norm

    tampered(info, args, tamper)


def copies_drift(info: RankInfo, *args: Any) -> None:
    """On rank 1 one weight's last bit is another."""

    def tamper(built: Built, yardstick: Yardstick) -> None:
        if info.rank == 1:
            weight = built.storage.whole("params").views()["final_norm.weight"]
            weight[0] = torch.nextafter(weight[0], weight[0] + 1)

    tampered(info, args, tamper)


def nan_gradient(info: RankInfo, *args: Any) -> None:
    """One rank's gradient holds a nan."""

    def tamper(built: Built, yardstick: Yardstick) -> None:
        if info.rank == 1:
            built.storage.whole("grads").views()["final_norm.weight"][3] = torch.nan

    tampered(info, args, tamper)


def one_raises(info: RankInfo, *args: Any) -> None:
    """Rank 1 raises inside a schedule."""

    def run(*args: Any, **more: Any) -> None:
        raise KeyError("the cause")

    with mock.patch.object(PipelineEngine, "run", run if info.rank == 1 else PipelineEngine.run):
        ranks.work(info, *args)


def one_dies(info: RankInfo, *args: Any) -> None:
    """Rank 1 is killed inside a schedule."""

    def run(*args: Any, **more: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    with mock.patch.object(PipelineEngine, "run", run if info.rank == 1 else PipelineEngine.run):
        ranks.work(info, *args)
