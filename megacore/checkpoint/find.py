"""Which checkpoints a folder holds. Manifests tell; the file ``latest`` is for people and programs in a hurry."""

from collections.abc import Iterator
from pathlib import Path

from megacore.checkpoint.manifest import MANIFEST, read_manifest
from megacore.checkpoint.store import Store
from megacore.config.schema import RunConfig

CHECKPOINTS = "checkpoints"
LATEST = "latest"
ASIDE = "aside"
"""Where checkpoints go that a run went back behind, or that were found damaged."""
PREFIX = "step-"


def checkpoints_of(config: RunConfig) -> str:
    """Where a run's checkpoints lie."""
    return config.checkpoint.folder or str(Path(config.out) / CHECKPOINTS)


def folder_of(step: int) -> str:
    """The name of a step's folder."""
    return f"{PREFIX}{step:08d}"


def step_of(folder: str) -> int | None:
    """The step that a folder's name tells, or None where it is none that ``folder_of`` gives."""
    digits = folder.removeprefix(PREFIX)
    step = int(digits) if digits.isascii() and digits.isdecimal() else None
    return step if step is not None and folder == folder_of(step) else None


def steps_in(store: Store) -> Iterator[tuple[int, Store, bool]]:
    """(step, its folder, whether it was finished) of what lies in a `checkpoints` folder, newest first."""
    steps = ((step_of(name), name) for name in store.folders())
    for step, name in sorted(((step, name) for step, name in steps if step is not None), reverse=True):
        folder = store.child(name)
        yield step, folder, MANIFEST in folder.names()


def newest(store: Store) -> Store:
    """The newest whole checkpoint of a run's folder or of its `checkpoints`; one that is not whole is passed over.

    Raises ValueError that says what is wrong with each if there is none.
    """
    where = store.child(CHECKPOINTS) if CHECKPOINTS in store.folders() else store
    reasons = []
    for _, folder, is_finished in steps_in(where):
        if not is_finished:
            reasons.append(f"{folder.describe()} was never finished")
            continue
        try:
            read_manifest(folder)
        except ValueError as reason:
            reasons.append(str(reason))
        else:
            return folder
    if not store.names() and not store.folders():
        raise ValueError(f"there is nothing at {store.describe()}; give a checkpoint, or a run that has some")
    why = "".join(f"\n  {reason}" for reason in reasons)
    raise ValueError(f"{store.describe()} holds no whole checkpoint (a folder {PREFIX}N with a {MANIFEST}){why}")
