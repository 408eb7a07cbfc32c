"""What the processes do: one pool of them, started once, is each layout in turn.

Rank 0 is part of every layout and sets the pace by files, so nobody waits at a meeting point whose time may run out.
"""

import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import distributed

from megacore.config.schema import RunConfig
from megacore.mesh import process_group
from megacore.mesh.rank_info import RankInfo
from megacore.monitor.console import Console
from megacore.spec import ModelSpec
from megacore.train.build import DTYPES, build, join
from megacore.verify import outcome as outcome_files
from megacore.verify.measure import Bound, Comparison, Finding, Yardstick, findings
from megacore.verify.outcome import Outcome
from megacore.verify.plan import Plan, Trial
from megacore.verify.samples import microbatches
from megacore.verify.screen import Table


def work(info: RankInfo, plan: Plan, folder: str, table: Table | None) -> None:
    """One rank's part in everything that ``plan`` computes. Rank 0 shows ``table`` as it grows, and leaves the outcomes
    in ``folder``."""
    shop = Path(folder)
    console = Console(sys.stdout, colour=table.colour) if table and info.rank == 0 else Console()
    judge, outcomes = Judge(shop), []
    for turn, trial in enumerate(plan.computed):
        if info.rank >= trial.num_ranks:
            continue
        take_turn(shop, turn, info.rank)
        console.progress(f"  {trial.label}, {trial.config.parallel.schedule} ...")
        began = time.perf_counter()
        seen = step_of(info, turn, trial, shop)
        if info.rank == 0 and (outcome := judge.hear(trial, seen, time.perf_counter() - began)):
            outcomes.append(outcome)
            if table:
                console.line("\n".join(table.lines(outcome)))
    console.close()
    if info.rank == 0:
        outcome_files.write(outcomes, shop)


def take_turn(shop: Path, turn: int, rank: int) -> None:
    """Rank 0 says that a turn begins, the others wait for it."""
    sign = shop / f"turn-{turn}"
    if rank == 0:
        sign.touch()
    while not sign.exists():
        time.sleep(0.005)


class Seen(NamedTuple):
    """One rank's step: its figures, and its pieces held against the yardstick."""

    loss: float
    grad_norm: float
    found: list[Finding]


def step_of(info: RankInfo, turn: int, trial: Trial, shop: Path) -> list[Seen]:
    """One step in a layout; what all of its ranks saw, on rank 0."""
    config = replace(trial.config, data=replace(trial.config.data, cache=str(shop / "indices")))
    if config.train.device == "auto" and torch.cuda.device_count() < info.world_size:
        config = replace(config, train=replace(config.train, device="cpu"))
    place = RankInfo(info.rank, trial.num_ranks, info.rank, trial.num_ranks, f"file://{shop}/store-{turn}")
    device = join(config, place)
    try:
        return _step(config, place, device, shop / trial.model, trial.role == "exact")
    finally:
        process_group.stop()


def _step(config: RunConfig, place: RankInfo, device: torch.device, yard: Path, is_exact: bool) -> list[Seen]:
    """A function of its own: all that holds a process group ends with it."""
    built = build(config, place, device)
    num_nominal = config.train.global_batch_size * config.train.seq_len
    result = built.trainer.step(microbatches(config, built.mesh), num_nominal, config.optim.lr)
    loss, grad_norm = result.loss.item(), result.grad_norm.item()
    if is_exact:
        Yardstick.write(built, loss, grad_norm, yard)
        return [Seen(loss, grad_norm, [])]
    seen = Seen(loss, grad_norm, findings(built, Yardstick.read(built.spec, yard)))
    if place.world_size == 1:
        return [seen]
    everyone: list[Seen] = [seen] * place.world_size if place.rank == 0 else []
    distributed.gather_object(seen, everyone or None)
    return everyone


class Judge:
    """Rank 0's view: the bound of each model, once it is known, and what comes of each layout."""

    def __init__(self, shop: Path) -> None:
        self.shop = shop
        self.bounds: dict[str, Bound] = {}

    def hear(self, trial: Trial, seen: list[Seen], seconds: float) -> Outcome | None:
        """Take in what the ranks of a layout saw; its outcome, if it is on trial."""
        spec = ModelSpec.of(trial.config.model)
        if trial.role == "exact":
            self.bounds[trial.model] = Bound(Yardstick.read(spec, self.shop / trial.model))
            return None
        comparison = Comparison.of(spec, [finding for rank in seen for finding in rank.found])
        if trial.role == "own":
            eps = torch.finfo(dict(DTYPES)[trial.config.precision.dtype]).eps
            self.bounds[trial.model] = replace(
                self.bounds[trial.model],
                eps=eps,
                own=comparison,
                own_loss=seen[0].loss,
                own_grad_norm=seen[0].grad_norm,
            )
            return None
        return self.outcome(trial, comparison, seen, seconds)

    def outcome(self, trial: Trial, comparison: Comparison, seen: list[Seen], seconds: float) -> Outcome:
        """What is told of one layout."""
        loss, grad_norm, _ = seen[0]
        bound = self.bounds[trial.model]
        exact, excess = bound.yardstick, bound.excess(comparison)
        worst = max(excess, key=excess.__getitem__)
        problems = [*bound.scalar_problems(loss, grad_norm), *comparison.problems]
        for name, values in (("loss", {one.loss for one in seen}), ("gradient norm", {one.grad_norm for one in seen})):
            if len(values) > 1:
                problems.append(f"the ranks disagree on the {name}: {', '.join(map(repr, sorted(values)))}")
        return Outcome(
            layout=trial.text,
            label=trial.label,
            ranks=trial.num_ranks,
            stages=trial.num_stages,
            schedule=trial.config.parallel.schedule,
            recompute=trial.config.parallel.recompute,
            microbatches=trial.num_microbatches,
            loss=loss,
            loss_difference=abs(loss / exact.loss - 1),
            grad_norm=grad_norm,
            grad_norm_difference=abs(grad_norm / exact.grad_norm - 1),
            what=worst[0],
            parameter=worst[1],
            excess=excess[worst],
            num_beyond=len({name for (_, name), value in excess.items() if value > 1}),
            seconds=seconds,
            problems=tuple(problems),
        )
