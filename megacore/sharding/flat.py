"""One contiguous buffer for a rank's parameters and one for their gradients; the modules' tensors are views of them."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megacore.layout.buffer import BufferLayout, groups_of_size

BUCKET_BYTES = 1 << 25
"""Gradients that travel in one message, about."""


@dataclass(frozen=True)
class FlatBuffer:
    """Storage laid out by ``layout``; gaps between slots are zero and stay so."""

    layout: BufferLayout
    data: Tensor

    @classmethod
    def zeros(cls, layout: BufferLayout, dtype: torch.dtype, device: torch.device) -> "FlatBuffer":
        return cls(layout, torch.zeros(layout.size, dtype=dtype, device=device))

    def views(self) -> dict[str, Tensor]:
        """Every parameter's part in its own shape, by global name."""
        return {
            slot.name: self.data[slot.offset : slot.offset + slot.numel].view(slot.shape) for slot in self.layout.slots
        }


@dataclass(frozen=True)
class FlatParameters:
    """A rank's parameters and their gradients, stage after stage."""

    params: FlatBuffer
    grads: FlatBuffer

    @classmethod
    @torch.no_grad()
    def adopt(cls, modules: Iterable[nn.Module]) -> "FlatParameters":
        """Move the modules' parameters into flat buffers and give each its gradient's view, where backward adds to it.

        A parameter that two modules share lies where the first of them has it. No bucket holds parameters of two.
        """
        named: dict[str, nn.Parameter] = {}
        groups = []
        for module in modules:
            new = {name: param for name, param in module.named_parameters() if name not in named}
            named.update(new)
            for param in list(new.values())[:1]:
                shapes = [(name, param.shape) for name, param in new.items()]
                groups += groups_of_size(shapes, BUCKET_BYTES // param.element_size())
        layout = BufferLayout.in_buckets(groups)
        first = next(iter(named.values()))
        params = FlatBuffer.zeros(layout, first.dtype, first.device)
        grads = FlatBuffer.zeros(layout, first.dtype, first.device)
        param_views, grad_views = params.views(), grads.views()
        for name, param in named.items():
            param_views[name].copy_(param)
            param.data = param_views[name]
            param.grad = grad_views[name]
        return cls(params, grads)
