"""Copies that several ranks hold must be the same bits: where they are not, memory or a processor has failed.

A digest is the sum of a tensor's words as integers: any single flipped bit changes it. Each rank sends one number; only
where they differ does each parameter get its own, so that the rank and the parameter can be named: the rank that
differs from most. Of two, nobody knows which one is wrong.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TypeVar

import torch
from torch import Tensor

from megacore.mesh.collectives import gather_objects
from megacore.sharding.storage import Storage

WORDS = MappingProxyType({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64})
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


def copies_of(storage: Storage) -> Iterator[tuple[Place, dict[str, Tensor]]]:
    """What other ranks must hold too: parameters where they are whole on each, and what the optimizer updates."""
    at = storage.mesh.layout.coordinate(storage.mesh.rank)
    if not storage.policy.params:
        yield (0, at["pp"], at["tp"]), {name: param.data for name, param in storage.parameters.items()}
    shard = at["dp_shard"] if storage.policy.optimizer else 0
    updated = {f"{run.name} (as updated)": weight for run, weight in zip(storage.runs, storage.weights)}
    yield (1, at["pp"], at["tp"], shard), updated


def digest(tensor: Tensor) -> Tensor:
    """A scalar of int64, on the tensor's device."""
    flat = tensor.detach().contiguous().view(-1)
    return flat.view(WORDS[flat.element_size()]).sum(dtype=torch.int64)


def differences(storage: Storage) -> tuple[Difference, ...]:
    """What differs among ranks that hold the same; collective over the world, the same on all ranks."""
    storage.arrive()
    world = storage.mesh.world
    own = {place: digests(tensors) for place, tensors in copies_of(storage)}
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
    """By name; one wait for the device."""
    there = {name: tensor for name, tensor in tensors.items() if tensor.numel()}
    if not there:
        return {}
    return dict(zip(there, torch.stack([digest(tensor) for tensor in there.values()]).tolist()))


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
