"""Activations that wait for backward in host memory (Rhu et al. 2016, vDNN; Rajbhandari et al. 2021, section 5.1.2).

What a block saves leaves the GPU on a stream of its own, behind the block's forward; when backward reaches the block
above, it comes back on another, so that both trips run beside computation. Host memory is pinned. On a CPU the same
copies are made, in the same memory, which saves nothing and serves tests.

A block's parameters are not activations: of them it is noted which they are, and backward sees those of its own time.
Under ZeRO-3 they are elsewhere by then, and where they were may be another block's.
"""

from collections.abc import Callable, Collection
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

MIN_BYTES = 1 << 12
"""Smaller tensors are not worth a trip."""


def offloaded(
    run: Callable[[], Tensor], params: Collection[Tensor], kept: list["Kept"], stays: Collection[Tensor] = ()
) -> Tensor:
    """``run()``, of which everything saved for backward waits in host memory except ``params``, ``stays`` and views of
    them.

    ``kept`` holds what the block before saved, if any, and afterwards what this one did.
    """
    if not torch.is_grad_enabled():
        return run()
    own = Kept(params, stays, kept[-1] if kept else None)
    kept[:] = [own]
    with saved_tensors_hooks(own.pack, own.unpack):
        return run()


class View(NamedTuple):
    """A parameter, or a part of it, wherever it is when somebody looks."""

    param: Tensor
    size: torch.Size
    stride: tuple[int, ...]
    offset: int

    def now(self) -> Tensor:
        """The numbers as they are."""
        return self.param.detach().as_strided(self.size, self.stride, self.param.storage_offset() + self.offset)


class Kept:
    """What one block saved, on its way to the host and back."""

    def __init__(self, params: Collection[Tensor], stays: Collection[Tensor], before: "Kept | None") -> None:
        self.before = before
        self.params = tuple(param for param in params if param.numel())
        self.stays = {tensor.untyped_storage().data_ptr() for tensor in stays}
        self.trips: list[_Trip | None] = []
        self.fetched = False

    def pack(self, tensor: Tensor) -> Tensor | View | int:
        """Send a tensor away; what is left is its number, or itself where it stays."""
        for param in self.params:
            if (place := _place_in(param, tensor)) is not None:
                return View(param, tensor.shape, tensor.stride(), place)
        if tensor.nbytes < MIN_BYTES or tensor.untyped_storage().data_ptr() in self.stays:
            return tensor
        self.trips.append(_Trip(tensor.detach()))
        return len(self.trips) - 1

    def unpack(self, packed: Tensor | View | int) -> Tensor:
        """The tensor again, once; the block that comes next in backward is called back, too."""
        if isinstance(packed, View):
            return packed.now()
        if isinstance(packed, Tensor):
            return packed
        self.fetch()
        if self.before is not None:
            self.before.fetch()
        trip, self.trips[packed] = self.trips[packed], None
        assert trip is not None, f"saved tensor {packed} is wanted twice"
        return trip.arrive()

    def fetch(self) -> None:
        """Begin to bring everything back, once; does not wait."""
        if not self.fetched:
            self.fetched = True
            for trip in self.trips:
                if trip is not None:
                    trip.turn()


def _place_in(param: Tensor, tensor: Tensor) -> int | None:
    """At which element of a contiguous parameter a tensor begins; None if it lies elsewhere."""
    if param.dtype != tensor.dtype or param.device != tensor.device:
        return None
    place, rest = divmod(tensor.data_ptr() - param.data_ptr(), param.itemsize)
    return place if 0 <= place < param.numel() and not rest else None


class _Trip:
    """One tensor's way: ``turn`` begins the way back, ``arrive`` ends it."""

    def __init__(self, tensor: Tensor) -> None:
        self.device, self.streams = tensor.device, _streams(tensor.device)
        self.host = torch.empty_like(tensor, device="cpu", pin_memory=self.streams is not None)
        self.back: Tensor | None = None
        if self.streams is None:
            self.host.copy_(tensor)
            return
        away = self.streams[0]
        away.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(away):
            self.host.copy_(tensor, non_blocking=True)
        tensor.record_stream(away)  # its memory is not given away before it has left

    def turn(self) -> None:
        if self.streams is None:
            self.back = self.host
            return
        away, home = self.streams
        home.wait_stream(away)
        with torch.cuda.stream(home):
            self.back = self.host.to(self.device, non_blocking=True)
            self.arrived = torch.cuda.Event()
            self.arrived.record()

    def arrive(self) -> Tensor:
        assert self.back is not None, "it was not called back"
        if self.streams is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_event(self.arrived)
            self.back.record_stream(current)
        return self.back


@cache
def _streams(device: torch.device) -> tuple[torch.cuda.Stream, torch.cuda.Stream] | None:
    """To the host and back, for all blocks; None where there is nowhere to go."""
    return (torch.cuda.Stream(device), torch.cuda.Stream(device)) if device.type == "cuda" else None
