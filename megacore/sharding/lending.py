"""Whole parameters and gradients of a unit for as long as it needs them, in memory that is used again.

Under ZeRO-3 a unit's parameters are gathered ahead of use and freed after it; under ZeRO-2 and 3 its gradients are
whole only from the start of its backward until their sum has begun. Buffers of one size go round, so that their
addresses stay few.
"""

from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from heapq import heappop, heappush
from typing import Protocol

import torch
from torch import Tensor, nn

from megacore.layout.buffer import BufferLayout, Slot
from megacore.mesh.collectives import all_gather_start
from megacore.mesh.group import Group, Pending


def set_gradient(param: nn.Parameter, grad: Tensor | None) -> None:
    """Where backward adds a parameter's gradient: ``main_grad``, which is ``grad`` itself unless it is of another
    dtype, which autograd would refuse."""
    own = grad is None or grad.dtype == param.dtype
    param.grad, param.main_grad = grad if own else None, grad  # type: ignore[attr-defined]


def add_to_main_grad(param: Tensor) -> None:
    """Moves a gradient that autograd made on its own (of a norm's weight, say) to where all are added."""
    if param.grad is not None:
        param.main_grad.add_(param.grad)  # type: ignore[attr-defined]
        param.grad = None


class Buffers:
    """Tensors that come back: ``take`` one of a size, ``give`` it back.

    Of those that are free the first that was made is taken: so a step that takes and gives in the order of the one
    before gets the same memory in the same places.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.device = dtype, device
        self.made: dict[int, list[Tensor]] = {}
        self.spare: dict[int, list[int]] = {}
        """By size, the numbers of those that are free, as a heap."""

    def take(self, size: int) -> Tensor:
        made, spare = self.made.setdefault(size, []), self.spare.setdefault(size, [])
        if not spare:
            made.append(torch.empty(size, dtype=self.dtype, device=self.device))
            return made[-1]
        return made[heappop(spare)]

    def give(self, buffer: Tensor) -> None:
        number = next(place for place, each in enumerate(self.made[len(buffer)]) if each is buffer)
        heappush(self.spare[len(buffer)], number)


class Elsewhere(Protocol):
    """Who brings some buckets in another form."""

    @property
    def buckets(self) -> Container[int]:
        """Which."""

    def gather(self, bucket: int) -> Pending:
        """Begin to bring one; when it is waited for, all is in its place."""

    def release(self, bucket: int) -> None:
        """Nobody uses it any more."""


class Lending:
    """The buckets of a layout, each lent as a whole while somebody uses it."""

    def __init__(
        self,
        layout: BufferLayout,
        names: Sequence[Sequence[str]],
        parameters: Mapping[str, nn.Parameter],
        shards: Group,
        params: Tensor,
        grad_dtype: torch.dtype,
        codes: Elsewhere | None = None,
    ) -> None:
        """``names`` are each bucket's parameters, ``params`` this rank's pieces of all buckets, end to end. ``codes``
        brings the buckets that it has."""
        self.layout, self.parameters, self.shards, self.params = layout, parameters, shards, params
        self.codes = codes
        slots = {slot.name: slot for slot in layout.slots}
        self.slots: list[list[Slot]] = [[slots[name] for name in group] for group in names]
        self.param_buffers = Buffers(params.dtype, params.device)
        self.grad_buffers = Buffers(grad_dtype, params.device)
        self.users = [0] * len(names)
        self.coming: dict[int, Pending] = {}
        self.here: dict[int, Tensor] = {}
        self.grads: dict[int, Tensor] = {}
        self.on_free: Callable[[Iterable[str]], None] = lambda names: None
        """Told the parameters that have no memory any more."""
        self.owing: list[set[tuple[int, int]]] = [set() for _ in names]

    def gather(self, bucket: int) -> None:
        """Begin to bring a bucket's parameters; each call is answered by one of ``free``."""
        self.users[bucket] += 1
        if self.users[bucket] == 1 and self.codes is not None and bucket in self.codes.buckets:
            self.coming[bucket] = self.codes.gather(bucket)
        elif self.users[bucket] == 1:
            start, end = self.layout.buckets[bucket]
            own = self.params[start // self.shards.size : end // self.shards.size]
            buffer = self.here[bucket] = self.param_buffers.take(end - start)
            self.coming[bucket] = all_gather_start(own, self.shards, out=buffer)

    def arrive(self, bucket: int) -> None:
        """Wait for them, and put them in their places."""
        if bucket not in self.coming:
            return
        self.coming.pop(bucket).wait()
        if bucket not in self.here:  # codes, which are in their places
            return
        start, _ = self.layout.buckets[bucket]
        for slot in self.slots[bucket]:
            self.parameters[slot.name].data = slot.of(self.here[bucket], start)

    def free(self, bucket: int) -> None:
        """One user less; with the last one the parameters go."""
        self.users[bucket] -= 1
        if self.users[bucket] == 0:
            self.arrive(bucket)
            if bucket in self.here:
                self.param_buffers.give(self.here.pop(bucket))
            elif self.codes is not None:
                self.codes.release(bucket)
            for slot in self.slots[bucket]:
                hide(self.parameters[slot.name], slot)
            self.on_free(slot.name for slot in self.slots[bucket])

    def open_grads(self, bucket: int, unit: tuple[int, int]) -> None:
        """Zeros for a unit's backward to add to, unless they are there for another unit, or for weight gradients that
        were put off."""
        self.owing[bucket].add(unit)
        if bucket in self.grads:
            return
        start, end = self.layout.buckets[bucket]
        buffer = self.grads[bucket] = self.grad_buffers.take(end - start).zero_()
        for slot in self.slots[bucket]:
            set_gradient(self.parameters[slot.name], slot.of(buffer, start))

    def are_complete(self, bucket: int, unit: tuple[int, int]) -> bool:
        """Take note that nothing of a unit is outstanding; whether that is so of all that share the bucket, as the two
        ends of a model with tied weights do."""
        self.owing[bucket].discard(unit)
        return not self.owing[bucket]

    def close_grads(self, bucket: int) -> Tensor:
        """The whole bucket's gradients, to be summed and then given back to ``grad_buffers``."""
        for slot in self.slots[bucket]:
            set_gradient(self.parameters[slot.name], None)
        return self.grads.pop(bucket)


def hide(param: nn.Parameter, slot: Slot) -> None:
    """Leave a parameter its shape but no memory: nan, should anybody use it."""
    param.data = torch.full((), torch.nan, dtype=param.dtype, device=param.device).expand(slot.shape)
