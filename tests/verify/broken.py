"""Ranks that carry out a verification with a fault in them."""

import os
import signal
from typing import Any
from unittest import mock

import torch

from megacore.mesh.rank_info import RankInfo
from megacore.pipeline.engine import PipelineEngine
from megacore.sharding import reduce
from megacore.verify import ranks


def without_sums_over_tp(info: RankInfo, *args: Any) -> None:
    """What is partial over tp stays so."""
    with mock.patch.object(reduce, "_sum_together", lambda tensors, group: None):
        ranks.work(info, *args)


def slightly_off(info: RankInfo, *args: Any) -> None:
    """Layouts with dp get one element of one gradient wrong, by 1e-8 of the gradient norm, on all ranks alike."""
    measured = ranks.findings

    def findings(built: Any, yardstick: Any) -> Any:
        if built.mesh.dp.size > 1:
            built.flat.grads.views()["layers.1.mlp.down.weight"][0, 0] += 1e-8 * yardstick.grad_norm
        return measured(built, yardstick)

    with mock.patch.object(ranks, "findings", findings):
        ranks.work(info, *args)


def copies_drift(info: RankInfo, *args: Any) -> None:
    """On rank 1 one weight's last bit is another."""
    measured = ranks.findings

    def findings(built: Any, yardstick: Any) -> Any:
        if info.rank == 1:
            weight = built.flat.params.views()["final_norm.weight"]
            weight[0] = torch.nextafter(weight[0], weight[0] + 1)
        return measured(built, yardstick)

    with mock.patch.object(ranks, "findings", findings):
        ranks.work(info, *args)


def nan_gradient(info: RankInfo, *args: Any) -> None:
    """One rank's gradient holds a nan."""
    measured = ranks.findings

    def findings(built: Any, yardstick: Any) -> Any:
        if info.rank == 1:
            built.flat.grads.views()["final_norm.weight"][3] = torch.nan
        return measured(built, yardstick)

    with mock.patch.object(ranks, "findings", findings):
        ranks.work(info, *args)


def one_raises(info: RankInfo, *args: Any) -> None:
    """Rank 1 raises inside a schedule."""

    def run(*args: Any, **more: Any) -> None:
        raise KeyError("the cause")

    if info.rank == 1:
        PipelineEngine.run = run  # type: ignore[method-assign]
    ranks.work(info, *args)


def one_dies(info: RankInfo, *args: Any) -> None:
    """Rank 1 is killed inside a schedule."""

    def run(*args: Any, **more: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    if info.rank == 1:
        PipelineEngine.run = run  # type: ignore[method-assign]
    ranks.work(info, *args)
