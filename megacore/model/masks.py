"""Which tokens see which: causality, sliding windows, documents, and ALiBi's distances."""

from typing import NamedTuple

import torch
from torch import Tensor


class Visible(NamedTuple):
    """Which tokens see which, as ``kernels.reference.attention`` takes it: ``causal`` comes on top of the mask."""

    mask: Tensor | None
    causal: bool


def attention_mask(
    length: int,
    window: int,
    document_bs: Tensor | None,
    slope_n: Tensor | None,
    device: torch.device,
    dtype: torch.dtype,
) -> Visible:
    """The mask of a layer with this ``window`` (0: none); none where plain causality is all there is.

    mask [1 or b, 1, s, s], with ALiBi slopes [n] [1 or b, n, s, s], is added to the scores. Also where it only hides:
    of booleans the fused kernel makes such floats itself, in every block, and keeps them for backward.
    """
    if not (0 < window < length) and document_bs is None and slope_n is None:
        return Visible(None, True)
    place = torch.arange(length, device=device)
    distance_ss = place[:, None] - place  # query minus key
    visible = distance_ss >= 0
    if window:
        visible &= distance_ss < window
    visible = visible[None, None]
    if document_bs is not None:
        visible = visible & (document_bs[:, None, :, None] == document_bs[:, None, None, :])
    bias = torch.zeros((), device=device) if slope_n is None else -slope_n.to(device)[:, None, None] * distance_ss
    return Visible(torch.where(visible, bias, -torch.inf).to(dtype), False)
