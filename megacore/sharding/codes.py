"""Weights that travel between ZeRO's shards in FP8, of which products in FP8 need nothing else.

Every rank brings its own runs of a matrix into FP8 and sends those: a byte per element instead of two or four. A matrix
has one scale, so its largest element is agreed on first; all of a step's are one small message. So codes do not depend
on who makes them, and products have the same bits as with weights that are gathered and brought into FP8 by all.

Codes lie in a bucket where the weights would (`layout.buffer`), so matrices are views of what was gathered. The rest
(norms, biases) travels beside them as it is, without gaps. The matrices themselves are nowhere whole.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol

import torch
from torch import Tensor, nn

from megacore.kernels.fp8.formats import E4M3, amax_of
from megacore.layout.buffer import BufferLayout, Slot
from megacore.layout.shards import Run, runs_of
from megacore.mesh.collectives import all_gather_start, all_reduce
from megacore.mesh.group import Group, Pending
from megacore.sharding.lending import Buffers

Scales = Callable[[Tensor], Tensor]
"""The largest elements of some weights [n] to their scales [n], both float32."""


class Coder(Protocol):
    """Who multiplies with codes."""

    def scales_of(self, names: Sequence[str]) -> Scales:
        """For these parameters, once a step."""

    def encode(self, x: Tensor, scale: Tensor) -> Tensor:
        """A part of a weight, flat, in E4M3."""

    def take(self, name: str, codes: Tensor, inverse: Tensor) -> None:
        """A whole weight [m, k] has come; its codes are to be multiplied with ``inverse``."""


@dataclass(frozen=True)
class Coded:
    """A bucket whose matrices travel in FP8."""

    start: int
    end: int
    matrices: tuple[Slot, ...]
    rest: tuple[tuple[Slot, int], ...]
    """With their offsets among each other."""
    own_rest: tuple[Tensor, ...]
    sizes: tuple[int, ...]
    """Elements of the rest that each shard has."""


class Codes:
    """The codes of a rank's own runs, and whole buckets of codes for as long as they are lent.

    ``names`` are each bucket's parameters; ``in_fp8`` those whose codes ``coder`` multiplies with. ``own`` has this
    rank's runs as views, by name. A bucket whose messages would not be shorter travels as it is.
    """

    def __init__(
        self,
        layout: BufferLayout,
        names: Sequence[Sequence[str]],
        in_fp8: Collection[str],
        parameters: Mapping[str, nn.Parameter],
        shards: Group,
        own: Mapping[str, tuple[Run, Tensor]],
        coder: Coder,
    ) -> None:
        self.parameters, self.shards, self.coder = parameters, shards, coder
        self.buckets = _coded(layout, names, in_fp8, shards.size, own)
        self.matrices = [slot.name for bucket in self.buckets.values() for slot in bucket.matrices]
        self.place = {name: number for number, name in enumerate(self.matrices)}
        self.own = [(self.place[name], *own[name]) for name in self.matrices if name in own]
        dtype, device = next((each.dtype, each.device) for each in parameters.values())
        self.codes = torch.zeros(layout.size // shards.size, dtype=torch.uint8, device=device)
        self.scales = coder.scales_of(self.matrices)
        self.inverse = torch.ones(len(self.matrices), device=device)
        self.of_codes, self.of_rest = Buffers(torch.uint8, device), Buffers(dtype, device)
        self.lent: dict[int, tuple[Tensor, Tensor]] = {}

    def make(self) -> None:
        """Bring the own runs into FP8: there are new weights. None of the old codes may be on their way. Collective."""
        if not self.matrices:
            return
        largest = torch.zeros_like(self.inverse)
        for place, _, values in self.own:
            largest[place] = amax_of(values)
        # nan may be lost among the largest, infinity is not, and leads to the same scale
        largest = all_reduce(torch.where(largest.isfinite(), largest, torch.inf), self.shards, "max")
        scales = self.scales(largest)
        self.inverse = 1 / scales
        for place, run, values in self.own:
            codes = self.coder.encode(values, scales[place])
            self.codes[run.offset : run.offset + run.numel].copy_(codes.view(torch.uint8))

    def gather(self, bucket: int) -> Pending:
        """Begin to bring a bucket; when it is waited for, all is in its place."""
        coded, size = self.buckets[bucket], self.shards.size
        whole, rest = self.lent[bucket] = self.lent.get(bucket) or self._take(coded)
        own = self.codes[coded.start // size : coded.end // size]
        codes_come = all_gather_start(own, self.shards, out=whole)
        rest_comes = None
        if rest.numel():
            own_rest = torch.cat(coded.own_rest) if coded.own_rest else rest.new_empty(0)
            rest_comes = all_gather_start(own_rest, self.shards, sizes=coded.sizes, out=rest)

        def arrived(codes: Tensor) -> Tensor:
            if rest_comes is not None:
                rest_comes.wait()
            self._arrive(coded, codes, rest)
            return codes

        return codes_come.then(arrived)

    def release(self, bucket: int) -> None:
        """Nobody uses a bucket any more."""
        whole, rest = self.lent.pop(bucket)
        self.of_codes.give(whole)
        self.of_rest.give(rest)

    def _take(self, coded: Coded) -> tuple[Tensor, Tensor]:
        return self.of_codes.take(coded.end - coded.start), self.of_rest.take(sum(coded.sizes))

    def _arrive(self, coded: Coded, codes: Tensor, rest: Tensor) -> None:
        for slot, offset in coded.rest:
            self.parameters[slot.name].data = rest[offset : offset + slot.numel].view(slot.shape)
        for slot in coded.matrices:
            matrix = slot.of(codes.view(E4M3.dtype), coded.start)
            self.coder.take(slot.name, matrix, self.inverse[self.place[slot.name]])


def _coded(
    layout: BufferLayout,
    names: Sequence[Sequence[str]],
    in_fp8: Collection[str],
    size: int,
    own: Mapping[str, tuple[Run, Tensor]],
) -> dict[int, Coded]:
    """The buckets that are shorter as codes and the rest."""
    slots = {slot.name: slot for slot in layout.slots}
    of_shards = [runs_of(layout, shard, size) for shard in range(size)]
    found: dict[int, Coded] = {}
    for bucket, group in enumerate(names):
        start, end = layout.buckets[bucket]
        matrices = tuple(slots[name] for name in group if name in in_fp8)
        others = [slots[name] for name in group if name not in in_fp8]
        offsets = [0, *accumulate(slot.numel for slot in others)]
        mine = {slot.name for slot in others}
        sizes = tuple(sum(run.numel for run in runs if run.name in mine) for runs in of_shards)
        item = next((values.element_size() for _, values in own.values()), 4)
        if matrices and end - start + item * sum(sizes) < item * (end - start):
            own_rest = tuple(own[slot.name][1] for slot in others if slot.name in own)
            found[bucket] = Coded(start, end, matrices, tuple(zip(others, offsets)), own_rest, sizes)
    return found
