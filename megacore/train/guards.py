"""What looks after training itself: losses that jump, copies that differ, slow ranks. All ranks call it alike."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megacore.data.skipping import place
from megacore.mesh.collectives import agree, gather_objects
from megacore.mesh.group import Group
from megacore.pipeline.engine import Marks
from megacore.train.replicas import differences
from megacore.train.spikes import Ledger, Spike, SpikeGuard
from megacore.train.stragglers import stragglers

if TYPE_CHECKING:
    from megacore.train.build import Built
    from megacore.train.data import RunData
    from megacore.train.keeping import Keeper, Resumed
    from megacore.train.reporter import Reporter

GUARD = "guard"
"""Key of a checkpoint's state."""
MOST_TOLD = 8
"""Tensors that differ of which each is told: one bad gradient makes all of a rank's differ, by way of the norm."""


class CopiesDiffer(RuntimeError):
    """Ranks hold different bits of what must be the same."""


def ledger_of(out: str, resumed: Resumed | None, world: Group) -> Ledger:
    """The samples that a run leaves out: what its checkpoint says, and what was written down after that. Rank 0 reads,
    so that all leave out the same. Raises ValueError on all ranks where the file is damaged."""
    if resumed is None:
        return Ledger()
    ledger, error = Ledger.of_state(resumed.state), None
    if world.rank == 0 and resumed.own:
        try:
            ledger = ledger.joined(Ledger.read(Path(out)))
        except (OSError, ValueError) as reason:
            error = reason
    agree(error, world)
    found: Ledger = gather_objects(ledger, world)[0]
    return found


class Guards:
    """Of one run, from one start or return to the next."""

    def __init__(
        self, built: Built, data: RunData, keeper: Keeper, reporter: Reporter, ledger: Ledger, state: Mapping[str, Any]
    ) -> None:
        self.config, self.guard, self.mesh = built.config, built.config.guard, built.mesh
        self.trainer, self.data, self.keeper, self.reporter = built.trainer, data, keeper, reporter
        self.ledger = ledger
        self.spikes = SpikeGuard(self.guard, state.get(GUARD, {}))
        self.goes_back = False
        """Whether the run is to be taken up again from its newest checkpoint, which lies before a spike."""

    def state(self) -> dict[str, Any]:
        """What checkpoints keep of it."""
        return {GUARD: self.spikes.state(), **self.ledger.state()}

    def times(self, step: int) -> bool:
        """Whether the instructions of a step are to be timed."""
        every = self.guard.stragglers_every
        return every > 0 and step % every == 0

    def after(self, step: int, num_microbatches: int, plan: Any, marks: Marks | None) -> None:
        """After a step's instructions were given. Raises CopiesDiffer where they do."""
        if self.times(step) and marks is not None:
            for each in stragglers(self.mesh, plan(num_microbatches), marks):
                self.reporter.warn("straggler", each.text, step=step, rank=each.own.rank, host=each.own.host)
        every = self.guard.replicas_every
        if every and step % every == 0:
            found = differences(self.trainer)
            for one in found[:MOST_TOLD]:
                self.reporter.warn("corruption", one.text, step=step, name=one.name, ranks=list(one.ranks))
            if found:
                more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
                raise CopiesDiffer(
                    f"step {step}: {found[0].text}{more}. The run ends here and goes on from its newest checkpoint"
                )

    def see(self, step: int, loss: float) -> None:
        """A step's loss, which all ranks know."""
        if self.guard.spike == "off":
            return
        spike = self.spikes.see(step, loss)
        if spike is None:
            return
        facts = asdict(spike)
        if self.guard.spike == "rewind":
            problem = self._go_back(spike)
            if not problem:
                return
            facts["not_undone"] = problem
        self.reporter.warn(
            "spike", spike.text + (f" ({facts['not_undone']})" if "not_undone" in facts else ""), **facts
        )

    def _go_back(self, spike: Spike) -> str:
        """Make ready to return to a checkpoint before a spike, leaving its batch out; or why that cannot be."""
        if self.ledger.batches >= self.guard.max_rewinds:
            return f"guard.max_rewinds={self.guard.max_rewinds} batches are left out already"
        target = self.keeper.newest_before(spike.step, self.reporter)
        if not target:
            return "there is no checkpoint before it"
        batch = self.data.plan.batch(spike.step)
        counted = np.arange(batch.first_ordinal, batch.first_ordinal + batch.size, dtype=np.int64)
        ordinals = place(counted, self.ledger.holes).tolist()
        self.ledger = self.ledger.with_batch(ordinals)
        error: Exception | None = None
        if self.mesh.rank == 0:
            try:
                self.ledger.write(Path(self.config.out))  # first: the batch must be left out however this ends
            except OSError as reason:
                error = reason
        agree(error, self.mesh.world)
        self.keeper.put_aside(target)
        self.reporter.warn(
            "rewind",
            f"{spike.text}; back to step {target}, without the {batch.size} samples from {ordinals[0]} on",
            **asdict(spike),
            to_step=target,
            samples=[ordinals[0], ordinals[-1] + 1],
        )
        self.goes_back = True
        return ""
