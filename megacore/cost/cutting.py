"""How a model's layers lie on a pipeline: which stages and which ranks hold the same, so that each is priced once."""

from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from megacore.config.schema import ModelConfig, OptimConfig, PrecisionConfig
from megacore.cost.states import kinds_of, layers_of
from megacore.schedule.generators.placement import fold, loop


class StageKind(NamedTuple):
    """What some stages hold: ``blocks`` are (layer that stands for its like, how many of them)."""

    blocks: tuple[tuple[int, int], ...]
    first: bool
    last: bool


class Cutting(NamedTuple):
    """``stage_kinds`` and which of them each stage is; the rank of each stage; for each rank that differs from
    others, how many stages it has of each kind; and that of all ranks together."""

    stage_kinds: tuple[StageKind, ...]
    kind_of: NDArray[np.int64]
    home: tuple[int, ...]
    ranks: NDArray[np.int64]
    total: NDArray[np.int64]


@lru_cache(maxsize=4096)
def cutting_of(
    model: ModelConfig,
    optim: OptimConfig,
    precision: PrecisionConfig,
    seq_len: int,
    ranks: int,
    chunks: int,
    folded: bool,
    given: tuple[int, ...],
) -> Cutting:
    """Of ``ranks`` pipeline ranks with ``chunks`` stages each. Raises ValueError where the layers cannot be cut so."""
    stages = layers_of(model, seq_len, ranks * chunks, given)
    kinds = kinds_of(model, optim, precision)
    found: dict[StageKind, int] = {}
    kind_of = []
    for stage, layers in enumerate(stages):
        counts: dict[int, int] = {}
        for layer in layers:
            counts[kinds[layer]] = counts.get(kinds[layer], 0) + 1
        kind = StageKind(tuple(counts.items()), stage == 0, stage == len(stages) - 1)
        kind_of.append(found.setdefault(kind, len(found)))
    home = [0] * len(stages)
    for rank in range(ranks):
        for stage in fold(rank, ranks) if folded else loop(rank, ranks, chunks):
            home[stage] = rank
    held = np.zeros((ranks, len(found)), dtype=np.int64)
    np.add.at(held, (home, kind_of), 1)
    return Cutting(tuple(found), np.array(kind_of), tuple(home), np.unique(held, axis=0), held.sum(axis=0))
