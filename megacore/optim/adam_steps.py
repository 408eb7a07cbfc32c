"""What Adam and AdamW share: two moments, their bias correction, and kernels that pass over memory once."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from megacore.kernels import adamw
from megacore.kernels.adamw import Moments, Rates
from megacore.kernels.table import Choice
from megacore.optim.elementwise import ElementWise
from megacore.optim.moments import Plain
from megacore.optim.rule import Share


class AdamSteps(ElementWise):
    """m = beta1 m + (1 - beta1) g, v = beta2 v + (1 - beta2) g^2, and a step along m / sqrt(v), both freed of bias.

    ``coupled`` is whether weight decay is part of the gradient. A kernel reads and writes everything once; moments in
    formats that no kernel has take the chunks of ``ElementWise``.
    """

    coupled: bool

    def __init__(self, share: Share, settings: Mapping[str, float]) -> None:
        super().__init__(share, settings)
        first, second = self.moments.values()
        self.kernel: adamw.AdamW | None = None
        if not isinstance(first, Plain) or not isinstance(second, Plain) or first.by_chance:
            rejected: tuple[str, ...] = ("kernels keep moments in floating point, rounded to the nearest",)
        elif share.dtype != self.dtype:
            rejected = (f"kernels update weights as they are, and those of {share.dtype} are updated in {self.dtype}",)
        else:
            self.plain = Moments(first.data, second.data, self.clock)
            kernel, choice = adamw.choose(share.device, share.dtype, first.dtype, share.kernel)
            rejected = choice.rejected
            if share.kernel or kernel is not adamw.reference:  # whose temporaries would not stay in cache
                self.kernel = kernel
        if self.kernel is None:
            if share.kernel:
                raise ValueError(
                    f"kernels.use holds adamw={share.kernel}, but {rejected[0]}; leave it out, or choose other formats"
                )
            choice = Choice(type(self).__name__.lower(), "torch in chunks", rejected)
        self.kernels = (choice,)
        self.writes_copies = self.kernel is not None and any(copy.dtype == torch.bfloat16 for copy in share.copies)

    @torch.no_grad()
    def update(self, grads: Sequence[Tensor], lr: float, taken: Tensor) -> None:
        """As ``Rule.update``."""
        if self.kernel is None:
            super().update(grads, lr, taken)
            return
        self.clock += taken
        share, known = self.share, self.settings
        rates = Rates(
            [lr * scale for scale in share.lr_scale],
            share.weight_decay,
            known["beta1"],
            known["beta2"],
            known["eps"],
            self.coupled,
        )
        self.kernel(share.weights, grads, self.plain, rates, taken, share.copies if self.writes_copies else ())

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
