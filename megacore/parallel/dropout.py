"""Dropout whose mask is a function of (seed, site, sample, position, feature), so no layout changes it.

A sample's ordinal is its own for the whole run, so masks differ from step to step without counting steps.
"""

import torch
from torch import Tensor

from megacore.kernels import counter


def keep_mask(key: int, index: Tensor, probability: float, dtype: torch.dtype) -> Tensor:
    """0 with ``probability``, else 1 / (1 - probability), per element of ``index`` (int64).

    In ``dtype`` or float32: rounded to 16 bits, the factor would be wrong for all elements alike.
    """
    wide = torch.promote_types(dtype, torch.float32)
    return (counter.uniform(key, index) >= probability).to(wide).div_(1 - probability)


def dropout(x_th: Tensor, row_t: Tensor, probability: float, key: int) -> Tensor:
    """x [t, h] with elements dropped.

    ``row_t`` [t] numbers each token within the run (sample ordinal * length + position).
    """
    num_features = x_th.shape[1]
    index = row_t[:, None] * num_features + torch.arange(num_features, device=x_th.device)
    return (x_th * keep_mask(key, index, probability, x_th.dtype)).to(x_th.dtype)
