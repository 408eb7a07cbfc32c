"""Storage laid out in slots: one contiguous tensor, of which parameters are views."""

from dataclasses import dataclass

import torch
from torch import Tensor

from megacore.layout.buffer import BufferLayout


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
        return {slot.name: slot.of(self.data) for slot in self.layout.slots}
