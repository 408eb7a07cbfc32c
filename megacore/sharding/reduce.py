"""Sums gradients over the ranks that each computed a part of them.

Three sums, each from the parameter specs: over tp for what only saw a shard of the sequence or of the heads; over the
copies of a kv head; over the data-parallel ranks for everything. Small tensors travel together in one message.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from megacore.mesh.collectives import all_reduce, all_reduce_start
from megacore.mesh.group import Group
from megacore.mesh.mesh import ParallelMesh
from megacore.sharding.flat import FlatBuffer
from megacore.spec import ParamSpec

BUCKET_BYTES = 1 << 25


class GradientReducer:
    """The sums of one stage's gradient buffer over ``mesh``."""

    def __init__(self, grads: FlatBuffer, specs: Mapping[str, ParamSpec], mesh: ParallelMesh) -> None:
        self.grads, self.mesh = grads, mesh
        views = grads.views()
        self.partial = [view for name, view in views.items() if "tp" in specs[name].partial]
        self.copied = [view for name, view in views.items() for view in copied_pieces(view, specs[name], mesh.tp)]
        self.buckets = grads.layout.buckets(BUCKET_BYTES // grads.data.element_size())

    def __call__(self) -> None:
        """Leaves every rank with the whole gradient of what it holds."""
        _sum_together(self.partial, self.mesh.tp)
        _sum_together(self.copied, self.mesh.kv)
        data = self.grads.data
        pending = [all_reduce_start(data[start:end], self.mesh.dp_cp) for start, end in self.buckets]
        for bucket in pending:
            bucket.wait()


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
