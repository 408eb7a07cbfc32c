"""Sums gradients over the ranks that each computed a part of them.

Three sums, each from the parameter specs: over tp for what only saw a shard of the sequence or of the heads; over the
copies of a kv head; over the data-parallel ranks for everything. Small tensors travel together in one message.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from megacore.mesh.collectives import all_reduce, all_reduce_start
from megacore.mesh.group import Group, Pending
from megacore.mesh.mesh import ParallelMesh
from megacore.sharding.flat import FlatBuffer
from megacore.spec import ParamSpec


class GradientReducer:
    """The sums of gradients over ``mesh``, for each of a rank's stages by itself.

    ``stages`` gives the parameters of every stage, in the order of the buffer; one that two stages share belongs to the
    first, whose backward ends last. No bucket of the buffer holds parameters of two stages.
    """

    def __init__(
        self, grads: FlatBuffer, specs: Mapping[str, ParamSpec], mesh: ParallelMesh, stages: Mapping[int, Iterable[str]]
    ) -> None:
        self.mesh = mesh
        self.pending: list[Pending] = []
        self.stages: dict[int, _StageGradients] = {}
        views, offsets = grads.views(), {slot.name: slot.offset for slot in grads.layout.slots if slot.numel}
        for stage, names in stages.items():
            own = {name: offsets.pop(name) for name in names if name in offsets}
            held = {name: views[name] for name in own}
            starts = set(own.values())
            self.stages[stage] = _StageGradients(
                partial=[view for name, view in held.items() if "tp" in specs[name].partial],
                copied=[piece for name, view in held.items() for piece in copied_pieces(view, specs[name], mesh.tp)],
                # backward finishes the last layers first
                buckets=[grads.data[start:end] for start, end in reversed(grads.layout.buckets) if start in starts],
            )

    def start(self, stage: int) -> None:
        """Begin to sum a stage's gradients, which its backward is done with."""
        own = self.stages[stage]
        _sum_together(own.partial, self.mesh.tp)
        _sum_together(own.copied, self.mesh.kv)
        self.pending += [all_reduce_start(bucket, self.mesh.dp_cp) for bucket in own.buckets]

    def finish(self) -> None:
        """Leaves every rank with the whole gradient of what it holds."""
        for bucket in self.pending:
            bucket.wait()
        self.pending.clear()


@dataclass(frozen=True)
class _StageGradients:
    """What is summed over tp, over copies of kv heads, and over data-parallel ranks."""

    partial: list[Tensor]
    copied: list[Tensor]
    buckets: list[Tensor]


def copied_pieces(view: Tensor, spec: ParamSpec, tp: Group) -> Iterable[Tensor]:
    """The parts of a split parameter's local tensor of which other tp ranks hold copies."""
    if spec.split is None:
        return
    for piece in spec.pieces(tp.rank, tp.size):
        if piece.copies > 1:
            yield view.narrow(spec.dim, piece.local, piece.size)


def _sum_together(tensors: list[Tensor], group: Group) -> None:
    if group.size == 1 or not tensors:
        return
    packed = all_reduce(torch.cat([tensor.reshape(-1) for tensor in tensors]), group)
    for tensor, part in zip(tensors, packed.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(part.view(tensor.shape))
