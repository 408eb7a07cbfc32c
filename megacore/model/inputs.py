"""What a stage computes on: one microbatch, and what all its blocks share."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megacore.data.documents import IGNORE
from megacore.model.masks import Visible
from megacore.model.offload import Kept


@dataclass(frozen=True)
class Inputs:
    """A microbatch of whole samples, as tensors.

    token, label: int64 [b, s], label IGNORE where there is no target. position: int64 [b, s] or None (0, 1, 2, ...).
    document: int64 [b, s] or None; tokens of different numbers do not see each other. ordinal: int64 [b], each
    sample's number within the run. training: whether dropout applies.
    """

    token_bs: Tensor
    label_bs: Tensor
    ordinal_b: Tensor
    position_bs: Tensor | None = None
    document_bs: Tensor | None = None
    training: bool = True

    @property
    def shape(self) -> tuple[int, int]:
        """(b, s)"""
        return self.token_bs.shape[0], self.token_bs.shape[1]

    @property
    def num_targets(self) -> Tensor:
        """How many tokens count in the loss: a scalar on the device."""
        return (self.label_bs != IGNORE).sum()

    def token_numbers(self) -> Tensor:
        """A number for each token [t] that no other token of the run has: the key of its dropout masks."""
        num_samples, length = self.shape
        offset_s = torch.arange(length, device=self.token_bs.device)
        return (self.ordinal_b[:, None] * length + offset_s).reshape(num_samples * length)


@dataclass(frozen=True)
class Shared:
    """What every block of a stage needs of a microbatch, computed once.

    cos, sin [1 or b, s, 1, half of the dims that rotate] (None without RoPE); visible: by a layer's sliding window (0:
    none), which tokens see which. token_t: the numbers of all tokens (``Inputs.token_numbers``); row_t: of those that
    this rank holds outside the matrices.
    """

    shape: tuple[int, int]
    cos: Tensor | None
    sin: Tensor | None
    visible: Mapping[int, Visible]
    token_t: Tensor
    row_t: Tensor
    training: bool
    dtype: torch.dtype
    kept: list[Kept] = field(default_factory=list)
    """What the last block has offloaded (``model.offload``)."""

    def tensors(self) -> Iterator[Tensor]:
        """What blocks use and none of them owns."""
        masks = [visible.mask for visible in self.visible.values()]
        yield from (tensor for tensor in (self.cos, self.sin, *masks) if tensor is not None)
