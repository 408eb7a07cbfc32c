"""Moments of a share in the format that the run asks for: element-wise rules read them, and write them back."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from megacore.kernels import counter
from megacore.kernels.halves import join, split
from megacore.optim.quantise import BLOCK, codebook, decode, encode, lookup
from megacore.optim.rounding import GlobalIndex, to_bf16
from megacore.optim.rule import Share

DTYPES = (("auto", None), ("fp32", torch.float32), ("bf16", torch.bfloat16))


class Moment(ABC):
    """One number per element. Parts are slices of a run that start at a multiple of ``quantise.BLOCK``."""

    @abstractmethod
    def read(self, run: int, part: slice, dtype: torch.dtype) -> Tensor:
        """A part of run number ``run`` in ``dtype``. It may be the storage itself: not to be written to."""

    @abstractmethod
    def write(self, run: int, part: slice, value: Tensor, taken: Tensor) -> None:
        """Keep ``value``; where ``taken`` (bool scalar on the device) is false, leave every bit as it is."""

    @abstractmethod
    def tensors(self) -> Mapping[str, Sequence[Tensor]]:
        """What is stored, one tensor per run: "" for the moment itself, and what else it takes."""


class Plain(Moment):
    """In floating point: ``data`` (1-D, one per run) in ``dtype``. ``clock`` keys the rounding to bf16 by chance."""

    def __init__(
        self,
        share: Share,
        name: str,
        clock: Tensor,
        dtype: torch.dtype,
        data: Sequence[Tensor],
        by_chance: bool | None = None,
    ) -> None:
        self.share, self.clock, self.dtype, self.data = share, clock, dtype, data
        self.by_chance = (share.format.stochastic if by_chance is None else by_chance) and dtype == torch.bfloat16
        if self.by_chance:
            self.index = [GlobalIndex(spec, share.tp, share.device) for spec in share.specs]
            self.keys = [counter.key_of("rounding", share.format.seed, name, spec.name) for spec in share.specs]

    def read(self, run: int, part: slice, dtype: torch.dtype) -> Tensor:
        return self.data[run][part].to(dtype)

    def write(self, run: int, part: slice, value: Tensor, taken: Tensor) -> None:
        data = self.data[run][part]
        if self.by_chance:
            start = self.share.runs[run].start + part.start
            index = self.index[run](start, start + data.numel())
            value = to_bf16(value, self.keys[run], index, self.clock)
        torch.where(taken, value.to(data.dtype), data, out=data)

    def tensors(self) -> Mapping[str, Sequence[Tensor]]:
        return {"": self.data}


class Halves(Moment):
    """The weights of a share that has them in two halves: read and written as float32, every bit of it."""

    def __init__(self, share: Share) -> None:
        assert share.lower is not None
        self.upper, self.lower = share.weights, share.lower

    def read(self, run: int, part: slice, dtype: torch.dtype) -> Tensor:
        return join(self.upper[run][part], self.lower[run][part]).to(dtype)

    def write(self, run: int, part: slice, value: Tensor, taken: Tensor) -> None:
        for half, new in zip((self.upper, self.lower), split(value.to(torch.float32)), strict=True):
            torch.where(taken, new, half[run][part], out=half[run][part])

    def tensors(self) -> Mapping[str, Sequence[Tensor]]:
        return {"": self.upper, ".lower": self.lower}


class Blocks(Moment):
    """In 8 bits, with a scale for every block of 64 elements of the local tensor.

    No cut of ZeRO goes through a block. Under tp a block is one of the local tensor: it is one of the whole parameter,
    too, where the pieces of its flattened rows are multiples of 64.
    """

    def __init__(self, share: Share, signed: bool) -> None:
        assert all(run.start % BLOCK == 0 for run in share.runs), "a shard is cut inside a block"
        codes = codebook(signed, torch.device("cpu"))
        self.codes, self.table = codes.to(share.device), lookup(codes).to(share.device)
        zero = int((codes == 0).nonzero())
        self.data = share.zeros(torch.uint8)
        for data in self.data:
            data.fill_(zero)
        self.scales = [torch.zeros(-(-run.numel // BLOCK), device=share.device) for run in share.runs]

    def read(self, run: int, part: slice, dtype: torch.dtype) -> Tensor:
        return decode(self.data[run][part], self.scales[run][_blocks(part)], self.codes, dtype)

    def write(self, run: int, part: slice, value: Tensor, taken: Tensor) -> None:
        data, scales = self.data[run][part], self.scales[run][_blocks(part)]
        new_data, new_scales = encode(value, self.table)
        torch.where(taken, new_data, data, out=data)
        torch.where(taken, new_scales, scales, out=scales)

    def tensors(self) -> Mapping[str, Sequence[Tensor]]:
        return {"": self.data, ".scale": self.scales}


def make_moment(share: Share, name: str, clock: Tensor, signed: bool = True) -> Moment:
    """A moment of zeros in the share's format; ``signed`` is whether it can be negative."""
    if share.format.kind == "int8":
        return Blocks(share, signed)
    dtype = dict(DTYPES)[share.format.kind] or share.updated
    return Plain(share, name, clock, dtype, share.zeros(dtype))


def weights_of(share: Share, clock: Tensor) -> Moment:
    """The weights that are updated, as moments are read and written."""
    if share.lower is not None:
        return Halves(share)
    by_chance = share.format.stochastic or share.format.stochastic_weights
    return Plain(share, "weight", clock, share.dtype, share.weights, by_chance)


def _blocks(part: slice) -> slice:
    assert part.start % BLOCK == 0, part
    return slice(part.start // BLOCK, -(-part.stop // BLOCK))
