"""Which checkpoints stay when a new one is there."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from megacore.checkpoint.find import steps_in
from megacore.checkpoint.manifest import MANIFEST, read_manifest
from megacore.checkpoint.store import Store

VAL_LOSS = "val_loss"
"""The name of the validation loss in a manifest's state."""
EVALUATION_DUE = "evaluation_due"
"""There, too: the figures of the step, whose evaluation a stop left out."""


@dataclass
class Retention:
    """The last ``keep`` stay (0: all), those of steps that ``keep_every`` divides, and the ``keep_best`` with the
    smallest validation loss. ``losses`` remembers what manifests said; ``held`` are steps that are being read."""

    keep: int = 3
    keep_every: int = 0
    keep_best: int = 0
    losses: dict[int, float | None] = field(default_factory=dict)
    held: frozenset[int] = frozenset()

    def kept(self, losses: Mapping[int, float | None]) -> set[int]:
        """Of checkpoints of these steps, each with its validation loss if there is one, those that stay."""
        steps = sorted(losses)
        if not self.keep:
            return set(steps)
        stay = set(steps[-self.keep :]) | self.held
        if self.keep_every:
            stay |= {step for step in steps if step % self.keep_every == 0}
        known = sorted((loss, step) for step, loss in losses.items() if loss is not None)
        return stay | {step for _, step in known[: self.keep_best]}


def prune(store: Store, retention: Retention) -> tuple[str, ...]:
    """Remove the checkpoints that need not stay; returns what was removed.

    A checkpoint's manifest goes first: at no moment is there half of one that claims to be whole.
    """
    folders = {step: folder for step, folder, is_finished in steps_in(store) if is_finished}
    if retention.keep_best:
        for step, folder in folders.items():
            if step not in retention.losses:
                retention.losses[step] = _loss_of(folder)
    stay = retention.kept({step: retention.losses.get(step) for step in folders})
    removed = []
    for step, folder in folders.items():
        if step not in stay:
            folder.remove_all(first=MANIFEST)
            removed.append(folder.describe())
    return tuple(removed)


def remove_unfinished(store: Store) -> None:
    """Remove what saves left behind that were killed or failed: nobody else may be saving there."""
    for _, folder, is_finished in list(steps_in(store)):
        if not is_finished:
            folder.remove_all()


def _loss_of(folder: Store) -> float | None:
    try:
        return read_manifest(folder).state.get(VAL_LOSS)
    except ValueError:
        return None  # damaged: it goes when its turn comes
