"""What Adam and AdamW share: two moments, their bias correction, and torch's fused kernels where those apply."""

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from megacore.optim.elementwise import ElementWise
from megacore.optim.moments import Plain
from megacore.optim.rule import Share

Fused = Callable[..., None]


class AdamSteps(ElementWise):
    """m = beta1 m + (1 - beta1) g, v = beta2 v + (1 - beta2) g^2, and a step along m / sqrt(v), both freed of bias.

    Moments of the weights' dtype are updated by a fused kernel, which reads and writes everything once; other
    formats take the chunks of ``ElementWise``.
    """

    fused: Fused

    def __init__(self, share: Share, settings: Mapping[str, float]) -> None:
        super().__init__(share, settings)
        moments = [moment for moment in self.moments.values() if isinstance(moment, Plain)]
        plain = len(moments) == 2 and all(data.dtype == self.dtype for moment in moments for data in moment.data)
        self.groups = self._groups(*(moment.data for moment in moments)) if plain else None

    def _groups(self, first: Sequence[Tensor], second: Sequence[Tensor]) -> list["_Group"]:
        """Runs with one weight decay and one learning rate are updated in one call."""
        share = self.share
        kinds = list(zip(share.weight_decay, share.lr_scale))
        return [
            _Group(kind, [run for run, other in enumerate(kinds) if other == kind], share.weights, first, second)
            for kind in dict.fromkeys(kinds)
        ]

    @torch.no_grad()
    def update(self, grads: Sequence[Tensor], lr: float, taken: Tensor) -> None:
        """As ``Rule.update``."""
        if self.groups is None:
            super().update(grads, lr, taken)
            return
        self.clock += taken
        for group in self.groups:
            type(self).fused(
                group.weights,
                [grads[run] for run in group.runs],
                group.first,
                group.second,
                [],
                [self.clock] * len(group.runs),
                lr=lr * group.lr_scale,
                beta1=self.settings["beta1"],
                beta2=self.settings["beta2"],
                weight_decay=group.weight_decay,
                eps=self.settings["eps"],
                amsgrad=False,
                maximize=False,
                found_inf=1 - taken,
            )

    def move(self, weight: Tensor, grad: Tensor, moments: Sequence[Tensor], lr: float) -> tuple[Tensor, Tensor, Tensor]:
        """The new weight and moments, weight decay apart (Kingma and Ba 2015, algorithm 1)."""
        beta1, beta2 = self.settings["beta1"], self.settings["beta2"]
        first = torch.lerp(grad, moments[0], beta1)
        second = (moments[1] * beta2).addcmul_(grad, grad, value=1 - beta2)
        # scalars on the device, in float64: the host does not know how many steps were taken
        steps = self.clock.double()
        correction1, correction2 = 1 - beta1**steps, 1 - beta2**steps
        size = second.sqrt().div_(correction2.sqrt()).add_(self.settings["eps"])
        return weight - (first / size).mul_(lr / correction1), first, second

    @abstractmethod
    def step(
        self, weight: Tensor, grad: Tensor, moments: Sequence[Tensor], lr: float, weight_decay: float
    ) -> tuple[Tensor, ...]: ...


class _Group:
    """The runs of one (weight decay, learning-rate scale)."""

    def __init__(
        self,
        kind: tuple[float, float],
        runs: list[int],
        weights: Sequence[Tensor],
        first: Sequence[Tensor],
        second: Sequence[Tensor],
    ) -> None:
        self.weight_decay, self.lr_scale = kind
        self.runs = runs
        self.weights, self.first, self.second = ([of[run] for run in runs] for of in (weights, first, second))
