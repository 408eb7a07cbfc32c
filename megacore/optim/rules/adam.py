"""Adam (Kingma and Ba 2015, algorithm 1), weight decay being part of the gradient (L2), with the paper's defaults."""

from collections.abc import Sequence
from types import MappingProxyType

import torch
from torch import Tensor

from megacore.kernels.adamw import fused_adam
from megacore.kernels.table import Choice
from megacore.optim.adam_steps import AdamSteps, OnePass, one_pass

DEFAULTS = MappingProxyType({"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.0})
STATE = MappingProxyType({"first": "moment", "second": "square"})


class Adam(AdamSteps):
    """g = gradient + decay * w enters both moments."""

    kinds = STATE

    def choose(self, moments: torch.dtype) -> tuple[OnePass | None, Choice]:
        """AdamW's where nothing decays, which makes them one and the same; else torch's."""
        share = self.share
        if not any(share.weight_decay):
            return one_pass(share.device, share.dtype, moments)
        if moments != share.dtype:
            return None, Choice("adam", "", (f"torch: its moments are {share.dtype}, not {moments}",))
        return fused_adam, Choice("adam", "torch", ())

    def step(
        self, weight: Tensor, grad: Tensor, moments: Sequence[Tensor], lr: float, weight_decay: float
    ) -> tuple[Tensor, ...]:
        return self.move(weight, grad.add(weight, alpha=weight_decay) if weight_decay else grad, moments, lr)
