"""Copies that several ranks hold must be the same bits: where they are not, memory or a processor has failed.

Looked at is all that lasts from step to step: weights, frozen ones too, moments, and numbers such as the loss scale. A
digest is the sum of a tensor's words as integers: any single flipped bit changes it. Each rank sends one number; only
where they differ does each tensor get its own, so that the rank and the tensor can be named: the rank that differs from
most. Of two, nobody knows which one is wrong.

What this cannot see. A wrong gradient after the sum over copies makes that rank's weights differ, and is blamed; before
the sum it is in all copies alike. Shards that one rank alone owns (ZeRO over all copies) have nothing to be compared
with, and what they publish is the same everywhere. What is made anew each step (activations, rotary angles, gathered
weights) has gone when the comparison comes.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from types import MappingProxyType
from typing import TypeVar

import torch
from torch import Tensor

from megacore.mesh.collectives import gather_objects
from megacore.train.step import Trainer

WORDS = MappingProxyType({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64})
PIECE = 1 << 22
"""Elements that are copied at once."""
T = TypeVar("T")


@dataclass(frozen=True)
class Difference:
    """Ranks whose copies of some tensor differ from the others', or all that hold one, where there is no majority."""

    name: str
    ranks: tuple[int, ...]
    certain: bool

    @property
    def text(self) -> str:
        """For people."""
        ranks = ", ".join(map(str, self.ranks))
        if self.certain:
            return (
                f"{self.name} of rank {ranks} differs from its copies on most other ranks: suspect its memory or device"
            )
        return f"{self.name} differs between ranks {ranks}, one of which has failed"


Place = tuple[int, ...]
"""Where a rank stands: ranks at the same place hold the same."""


def copies_of(trainer: Trainer) -> Iterator[tuple[Place, dict[str, Tensor]]]:
    """What other ranks must hold too: parameters where they are whole on each, what the optimizer updates and
    remembers, and numbers that all ranks or all of a pipeline stage share."""
    storage, rule = trainer.storage, trainer.rule
    at = storage.mesh.layout.coordinate(storage.mesh.rank)
    trained = {} if storage.policy.params else storage.parameters
    named = {name: param for stage in trainer.stages.values() for name, param in stage.named_parameters()}
    frozen = {name: param for name, param in named.items() if name not in storage.parameters}
    yield (0, at["pp"], at["tp"]), {name: param.data for name, param in (*trained.items(), *frozen.items())}
    shard = at["dp_shard"] if storage.policy.optimizer else 0
    updated = {f"{run.name} (as updated)": weight for run, weight in zip(storage.runs, storage.weights)}
    updated |= {f"{run.name} (lower half)": low for run, low in zip(storage.runs, storage.lower or ())}
    yield (1, at["pp"], at["tp"], shard), updated | moments_of(trainer)
    of_fp8 = {} if trainer.fp8 is None else {f"fp8 {name}": each for name, each in trainer.fp8.state().items()}
    everywhere = trainer.fp8 is None or trainer.fp8.everywhere
    yield (2,), {"the optimizer's clock": rule.clock, **numbers_of(trainer), **(of_fp8 if everywhere else {})}
    yield (3, at["pp"]), {} if everywhere else of_fp8


def moments_of(trainer: Trainer) -> dict[str, Tensor]:
    """What the optimizer remembers, by names for people."""
    owners = [run.name for run in trainer.storage.runs]
    matrices = [f"{matrix.name} {matrix.segment}" for matrix in trainer.rule.state_matrices]
    found: dict[str, Tensor] = {}
    for moment, tensors in trainer.rule.state().items():
        names = owners if len(tensors) == len(owners) else matrices
        found |= {f"the optimizer's {moment} of {name}": tensor for name, tensor in zip(names, tensors, strict=True)}
    return found


def numbers_of(trainer: Trainer) -> dict[str, Tensor]:
    """What the loss scale and clipping remember, equal on all ranks."""
    return {
        **{f"the loss scale's {name}": tensor for name, tensor in trainer.loss_scale.state().items()},
        **{f"clipping's {name}": tensor for name, tensor in trainer.clip.state().items()},
    }


def digest(tensor: Tensor) -> Tensor:
    """A scalar of int64, on the tensor's device: the sum of words of 8 bytes, which nothing must convert (a CPU sums
    them a hundred times as fast as words of 4), and of the elements that fill none. Wherever the elements lie, it is
    the same: what does not begin at a whole word is copied, piece by piece."""
    flat = tensor.detach().contiguous().view(-1)
    size = flat.element_size()
    full = flat.numel() - flat.numel() % (8 // size)
    aligned = flat.storage_offset() * size % 8 == 0
    words = flat[:full].split(PIECE) if full and not aligned else [flat[:full]]
    total = reduce(torch.add, ((each if aligned else each.clone()).view(torch.int64).sum() for each in words))
    return total if full == flat.numel() else total + flat[full:].view(WORDS[size]).sum(dtype=torch.int64)


def differences(trainer: Trainer) -> tuple[Difference, ...]:
    """What differs among ranks that hold the same; collective over the world, the same on all ranks."""
    trainer.storage.arrive()
    world = trainer.mesh.world
    own = {place: digests(tensors) for place, tensors in copies_of(trainer)}
    mixed = {place: hash(tuple(each.values())) for place, each in own.items()}  # of integers: the same everywhere
    if all(len(set(values.values())) == 1 for values in by_place(gather_objects(mixed, world)).values()):
        return ()
    found: list[Difference] = []
    for ranks in by_place(gather_objects(own, world)).values():
        for name in next(iter(ranks.values())):
            if odd := odd_ones({rank: values[name] for rank, values in ranks.items()}):
                found.append(Difference(name, *odd))
    return tuple(found)


def digests(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """By name; one wait for each device, of which one may be the host."""
    there = {name: tensor for name, tensor in tensors.items() if tensor.numel()}
    found: dict[str, int] = {}
    for device in dict.fromkeys(tensor.device for tensor in there.values()):
        here = {name: digest(tensor) for name, tensor in there.items() if tensor.device == device}
        found |= dict(zip(here, torch.stack(list(here.values())).tolist()))
    return {name: found[name] for name in there}


def by_place(everyone: Sequence[Mapping[Place, T]]) -> dict[Place, dict[int, T]]:
    """What the ranks at each place have, by rank."""
    found: dict[Place, dict[int, T]] = {}
    for rank, places in enumerate(everyone):
        for place, value in places.items():
            found.setdefault(place, {})[rank] = value
    return found


def odd_ones(values: Mapping[int, int]) -> tuple[tuple[int, ...], bool] | None:
    """(ranks whose value is not that of most, whether that is certain); None where all are equal."""
    (usual, number), *others = Counter(values.values()).most_common()
    if not others:
        return None
    if number * 2 <= len(values):
        return tuple(values), False
    return tuple(rank for rank, value in values.items() if value != usual), True
