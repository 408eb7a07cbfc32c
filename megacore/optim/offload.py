"""State kept elsewhere than beside the weights: in host memory, or in files (ZeRO-Offload, Ren et al. 2021;
ZeRO-Infinity, Rajbhandari et al. 2021, section 5).

A rule is not asked to know: each bucket of parameters gets a rule of its own, made by the same file, whose state comes
from a memory that is told which bucket is in use. Where the weights that are updated are copies in host memory,
gradients come to the host ahead of a bucket's update and new weights leave behind it, both while other buckets are
updated.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from megacore.config.schema import OptimConfig
from megacore.optim.rule import Rule, Share
from megacore.optim.rules import make_rule
from megacore.sharding import mapped
from megacore.spec.matrices import Matrix


class Memory(Protocol):
    """Where the state of buckets lies."""

    def zeros(self, bucket: int, numel: int, dtype: torch.dtype) -> Tensor:
        """[numel] on the CPU."""

    def fetch(self, bucket: int) -> None:
        """Called some time before a bucket is updated; past the last one, it does nothing."""

    def release(self, bucket: int) -> None:
        """Called when it has been."""


class HostMemory:
    """Ordinary memory."""

    def zeros(self, bucket: int, numel: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(numel, dtype=dtype)

    def fetch(self, bucket: int) -> None:
        pass

    def release(self, bucket: int) -> None:
        pass


class Offloaded(Rule):
    """The rule that ``make`` gives, a bucket at a time: every number is that of the rule over the whole share.

    share: weights in host memory, and groups that carry such tensors. buckets: the names of each bucket's parameters,
    the same on all ranks of those groups, so that collectives meet; parameters that are not cut (a tied matrix) may
    have a bucket to themselves. transfer: where gradients come from and weights go to, if those in use are others.
    """

    def __init__(
        self,
        share: Share,
        settings: Mapping[str, float],
        make: Callable[[Share, Mapping[str, float]], Rule],
        buckets: Sequence[Collection[str]],
        memory: Memory,
        transfer: "Transfer | None" = None,
    ) -> None:
        super().__init__(share, settings)
        assert share.device.type == "cpu", share.device
        self.memory, self.transfer = memory, transfer
        place = {name: bucket for bucket, names in enumerate(buckets) for name in names}
        self.runs: list[list[int]] = [[] for _ in buckets]
        for number, run in enumerate(share.runs):
            self.runs[place[run.name]].append(number)
        copies = transfer.staged if transfer else share.copies
        self.rules = [make(self._part(bucket, own, copies), settings) for bucket, own in enumerate(self.runs)]
        self.kernels = tuple(dict.fromkeys(choice for rule in self.rules for choice in rule.kernels))
        writers = [rule.writes_copies for rule in self.rules if rule.share.runs]
        self.writes_copies = transfer is not None or all(writers)

    def _part(self, bucket: int, own: Sequence[int], copies: Sequence[Tensor]) -> Share:
        """The share of one bucket."""
        share = self.share

        def of(values: Sequence[Any]) -> tuple[Any, ...]:
            return tuple(values[number] for number in own)

        return replace(
            share,
            runs=of(share.runs),
            specs=of(share.specs),
            weights=of(share.weights),
            lower=share.lower and of(share.lower),
            copies=of(copies) if copies else (),
            weight_decay=of(share.weight_decay),
            lr_scale=of(share.lr_scale),
            allocate=lambda numel, dtype, device: self.memory.zeros(bucket, numel, dtype),
        )

    @torch.no_grad()
    def update(self, grads: Sequence[Tensor], lr: float, taken: Tensor) -> None:
        """As ``Rule.update``. With a transfer, gradients and ``taken`` are on its device, and this waits for them."""
        if self.transfer:
            grads, taken = self.transfer.start(grads, self.runs, taken)
            if not taken:  # the host has waited for it already
                self.transfer.finish()
                return
        self.clock += taken
        self.memory.fetch(0)
        for bucket, (rule, own) in enumerate(zip(self.rules, self.runs, strict=True)):
            self.memory.fetch(bucket + 1)
            if self.transfer:
                self.transfer.wait(bucket)
            rule.update([grads[run] for run in own], lr, taken)
            if self.transfer:
                self.transfer.send(own, rounded=rule.writes_copies)
            self.memory.release(bucket)
        if self.transfer:
            self.transfer.finish()

    def set_clock(self, clock: Tensor) -> None:
        """Count on from ``clock``, as after a checkpoint."""
        for rule in (self, *self.rules):
            rule.clock.copy_(clock)

    @property
    def state_matrices(self) -> Sequence[Matrix]:
        """As ``Rule.state_matrices``."""
        return [matrix for rule in self.rules for matrix in rule.state_matrices]

    def state(self) -> Mapping[str, Sequence[Tensor]]:
        """All buckets' state; with files behind it, reading it brings it into memory."""
        states = [rule.state() for rule in self.rules]
        return {name: [tensor for state in states for tensor in state[name]] for name in states[0]} if states else {}


def place_rule(
    optim: OptimConfig,
    share: Share,
    settings: Mapping[str, float],
    buckets: Sequence[Collection[str]],
    folder: Path,
    transfer: "Transfer | None" = None,
) -> Rule:
    """The optimizer of a run, its state where ``optim.offload`` says.

    Under cpu and nvme ``share`` must have its weights in host memory, and under cpu ``transfer`` must be given, which
    ties them to those that are trained; ``folder`` is used unless ``optim.offload_folder`` names another. See
    ``Offloaded`` for buckets. Raises ValueError where this machine cannot do it.
    """

    def make(part: Share, known: Mapping[str, float]) -> Rule:
        return make_rule(optim.name, part, known)

    if optim.offload == "none":
        return make(share, settings)
    if optim.offload == "cpu":
        assert transfer is not None, "state in host memory belongs to weights there"
        return Offloaded(share, settings, make, buckets, HostMemory(), transfer)
    if reason := mapped.unavailable():
        raise ValueError(f"optim.offload=nvme: {reason}; use none or cpu")
    memory = mapped.MappedMemory(Path(optim.offload_folder) if optim.offload_folder else folder, len(buckets))
    return Offloaded(share, settings, make, buckets, memory, transfer)


class Transfer:
    """Gradients to the host, where ``weights`` are, and new weights back into ``targets`` on ``device``.

    All are lists with a 1-D tensor per run; ``grads`` says of what size and dtype gradients will be. On CUDA both ways
    use pinned memory and a stream each, so that they run beside the updates of other buckets; on the CPU the same
    copies are made one after the other.
    """

    def __init__(
        self, weights: Sequence[Tensor], targets: Sequence[Tensor], grads: Sequence[Tensor], device: torch.device
    ) -> None:
        self.weights, self.targets, self.device = weights, targets, device
        self.on_gpu = device.type == "cuda"
        self.grads = [self._like(grad) for grad in grads]
        # what leaves in the format of the weights leaves from where they are
        changed = any(target.dtype != weight.dtype for target, weight in zip(targets, weights))
        self.staged = tuple(map(self._like, targets)) if changed else ()
        self.down = torch.cuda.Stream(device) if self.on_gpu else None
        self.up = torch.cuda.Stream(device) if self.on_gpu else None
        self.arrived: list[torch.cuda.Event] = []

    def _like(self, tensor: Tensor) -> Tensor:
        return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=self.on_gpu)

    @property
    def nbytes(self) -> int:
        """Host memory that it takes for what is on its way."""
        return sum(tensor.nbytes for tensor in (*self.grads, *self.staged))

    def start(
        self, grads: Sequence[Tensor], buckets: Sequence[Sequence[int]], taken: Tensor
    ) -> tuple[list[Tensor], Tensor]:
        """Begin to bring all gradients, bucket after bucket; returns where they will be, and ``taken`` on the host."""
        self.arrived.clear()
        if self.down is not None:
            self.down.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.down) if self.down is not None else nullcontext():
            for own in buckets:
                for run in own:
                    self.grads[run].copy_(grads[run], non_blocking=True)
                if self.on_gpu:
                    self.arrived.append(torch.cuda.Event())
                    self.arrived[-1].record()
        return self.grads, taken.to("cpu")

    def wait(self, bucket: int) -> None:
        """Until a bucket's gradients are here."""
        if self.on_gpu:
            self.arrived[bucket].synchronize()

    def send(self, own: Sequence[int], rounded: bool = False) -> None:
        """Begin to send the new weights of these runs; ``rounded``: they are in ``staged`` already."""
        with torch.cuda.stream(self.up) if self.up is not None else nullcontext():
            for run in own:
                if self.staged and not rounded:
                    self.staged[run].copy_(self.weights[run])
                self.targets[run].copy_(self.staged[run] if self.staged else self.weights[run], non_blocking=True)

    def finish(self) -> None:
        """What is computed from now on waits for the weights, and for gradients to have left; before the next step
        reads them, the host has waited for both."""
        for stream in (self.down, self.up):
            if stream is not None:
                torch.cuda.current_stream(self.device).wait_stream(stream)
