"""Saves and loads small engines on made-up tokens, and compares what lies in checkpoints."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from megacore.checkpoint.find import folder_of
from megacore.checkpoint.formats import bytes_of
from megacore.checkpoint.manifest import hash_of
from megacore.checkpoint.read import WEIGHTS, Checkpoint
from megacore.checkpoint.retain import Retention
from megacore.checkpoint.save import Facts, Outcome, Saver
from megacore.checkpoint.store import Notice, open_store, unnoticed
from megacore.config.schema import RunConfig
from megacore.train.build import Built
from megacore.train.state import State
from tests.engine.common import built_rank, run_config, step_of

Curve = list[tuple[float, float]]
"""(loss, gradient norm) of steps."""
SIZES = ("tp", "pp", "dp", "world")
SMALL = ("model.num_layers=4", "train.micro_batch_size=1", "optim.lr_schedule=constant", "optim.lr=0.003")


def config_of(words: Sequence[str], layout: Mapping[str, Any]) -> RunConfig:
    """The run of some overrides on a layout, given as keys of [parallel]."""
    return run_config(world_of(layout), *SMALL, *words, *(f"parallel.{key}={value}" for key, value in layout.items()))


def world_of(layout: Mapping[str, Any]) -> int:
    return layout.get("tp", 1) * layout.get("pp", 1) * layout.get("dp", 1)


def saver_of(
    built: Built,
    folder: str,
    in_background: bool = False,
    retention: Retention | None = None,
    notice: Notice = unnoticed,
) -> Saver:
    """Collective, for the group that it makes."""
    parts, group = State(built).own_parts(), built.mesh.beside()
    ticks = iter(range(1 << 30))
    return Saver(
        open_store(folder, notice), parts, group, retention or Retention(0), in_background, lambda: float(next(ticks))
    )


def facts_of(built: Built, step: int, **state: Any) -> Facts:
    layout = {axis: getattr(built.mesh.layout, axis) for axis in SIZES}
    return Facts(step, built.config, layout, {"samples": 8 * step, **state}, {"tokenizer/a.json": b"{}"})


def save(built: Built, saver: Saver, step: int) -> Outcome:
    saver.start(facts_of(built, step))
    outcome = saver.take(wait=True)
    assert outcome is not None
    return outcome


def load(state: State, folder: str, step: int) -> Checkpoint:
    checkpoint = Checkpoint.of(open_store(folder).child(folder_of(step)))
    state.load(checkpoint)
    state.publish()
    return checkpoint


def steps(built: Built, first: int, last: int) -> Curve:
    return [step_of(built, step, built.config.optim.lr) for step in range(first, last + 1)]


def digests(folder: str, step: int) -> dict[str, str]:
    """Of every tensor of a checkpoint as one: shape, format and bits."""
    checkpoint = Checkpoint.of(open_store(folder).child(folder_of(step)))
    found = {}
    for key, entry in checkpoint.manifest.tensors.items():
        whole = checkpoint.read_key(key, (0,) * len(entry.shape), entry.shape)
        found[key] = f"{entry.dtype} {list(entry.shape)} {hash_of(bytes_of(whole))}"
    return found


def write_rank(rank: int, world: int, config: RunConfig, folder: str, num: int, more: int) -> tuple[Curve, list[str]]:
    """``num`` steps, a checkpoint, ``more`` steps and another one; the curve of these, and what saves had to say."""
    built = built_rank(rank, world, config)
    saver = saver_of(built, folder)
    steps(built, 1, num)
    problems = [save(built, saver, num).problem]
    curve = steps(built, num + 1, num + more)
    return curve, [*problems, save(built, saver, num + more).problem]


Taken = tuple[Curve, dict[str, str], float]
"""The curve of the steps that follow, the digests of what was loaded and saved again, and how far the weights are
from those of the run that went on."""


def read_rank(
    rank: int, world: int, config: RunConfig, folders: Sequence[str], own: str, num: int, more: int
) -> list[Taken]:
    """Take up each folder's checkpoint, save it again in ``own``, and go on; digests come from rank 0 alone."""
    built = built_rank(rank, world, config)
    state, saver = State(built), saver_of(built, own)
    found = []
    for folder in folders:
        load(state, folder, num)
        assert save(built, saver, num).problem == ""
        again = digests(own, num) if rank == 0 else {}
        curve = steps(built, num + 1, num + more)
        found.append((curve, again, distance(state, folder, num + more)))
    return found


def distance(state: State, folder: str, step: int) -> float:
    """The largest difference of a weight from that in a checkpoint, of parts of this rank, relative to 1 or it."""
    checkpoint = Checkpoint.of(open_store(folder).child(folder_of(step)))
    worst = 0.0
    for part in state.parts:
        if part.key.startswith(WEIGHTS):
            expected = checkpoint.read_key(part.key, part.start, part.size).to(torch.float64)
            difference = (part.values().to(torch.float64) - expected).abs() / expected.abs().clamp(min=1.0)
            worst = max(worst, difference.max().item())
    return worst
