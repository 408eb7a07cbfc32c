"""Adam with decoupled weight decay (Loshchilov and Hutter 2019, algorithm 2), in torch's fused kernel."""

from collections.abc import Mapping

import torch
from torch import Tensor

from megacore.config.schema import OptimConfig
from megacore.config.settings import settings
from megacore.optim.groups import decay_groups
from megacore.sharding.flat import FlatBuffer, FlatParameters
from megacore.spec import ParamSpec


class AdamW:
    """Moments in the dtype of the parameters; a step moves 7 numbers per parameter through memory."""

    def __init__(self, flat: FlatParameters, specs: Mapping[str, ParamSpec], optim: OptimConfig) -> None:
        self.settings = settings(optim)
        data = flat.params.data
        self.first = FlatBuffer.zeros(flat.params.layout, data.dtype, data.device)
        self.second = FlatBuffer.zeros(flat.params.layout, data.dtype, data.device)
        self.clock = torch.zeros((), dtype=torch.float32, device=data.device)
        self.work = [
            (
                group.weight_decay,
                group.of(flat.params),
                group.of(flat.grads),
                group.of(self.first),
                group.of(self.second),
            )
            for group in decay_groups(flat, specs, self.settings["weight_decay"])
        ]

    @torch.no_grad()
    def step(self, lr: float, skip: Tensor) -> None:
        """As ``Optimizer.step``; the clock of the bias correction stands still on a skipped step."""
        self.clock += 1 - skip
        for weight_decay, params, grads, first, second in self.work:
            torch._fused_adamw_(
                params,
                grads,
                first,
                second,
                [],
                [self.clock] * len(params),
                lr=lr,
                beta1=self.settings["beta1"],
                beta2=self.settings["beta2"],
                weight_decay=weight_decay,
                eps=self.settings["eps"],
                amsgrad=False,
                maximize=False,
                found_inf=skip,
            )
