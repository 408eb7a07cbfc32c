"""What optimizers have in common that treat every element by itself: they say the maths of a step, this does the rest.

Weights are updated in chunks whose temporaries stay in cache, so that a step moves little more than weights, gradients
and moments through memory. Where a shard is cut does not matter.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from megacore.config.optimizers import kept
from megacore.optim.moments import make_moment, weights_of
from megacore.optim.rule import Rule, Share

CHUNKS = (("cpu", 1 << 16), ("cuda", 1 << 24), ("meta", 1 << 24))
"""Elements updated at once, multiples of a block: of a cache, or so that launches do not count."""


class ElementWise(Rule):
    """A rule whose ``STATE`` holds moments alone (``kinds``, a class attribute, is that table)."""

    kinds: Mapping[str, str]

    def __init__(self, share: Share, settings: Mapping[str, float]) -> None:
        super().__init__(share, settings)
        self.moments = {
            name: make_moment(share, name, self.clock, signed=kind != "square")
            for name, kind in kept(self.kinds, settings).items()
        }
        # weights that are bf16 themselves are rounded as moments are
        self.weights = weights_of(share, self.clock)
        self.chunk = dict(CHUNKS)[share.device.type]
        # 16-bit weights are updated in float32
        self.dtype = torch.promote_types(share.dtype, torch.float32)

    @abstractmethod
    def step(
        self, weight: Tensor, grad: Tensor, moments: Sequence[Tensor], lr: float, weight_decay: float
    ) -> tuple[Tensor, ...]:
        """The new weight and the new moments, in the order of ``kinds``, all 1-D and of one size.

        Inputs may be storage: they are read only. ``clock`` already counts this step.
        """

    @torch.no_grad()
    def update(self, grads: Sequence[Tensor], lr: float, taken: Tensor) -> None:
        """As ``Rule.update``."""
        self.clock += taken
        really = taken != 0
        share = self.share
        for run, (weights, grad) in enumerate(zip(share.weights, grads)):
            for start in range(0, weights.numel(), self.chunk):
                part = slice(start, min(start + self.chunk, weights.numel()))
                new_weight, *new = self.step(
                    self.weights.read(run, part, self.dtype),
                    grad[part].to(self.dtype),
                    [moment.read(run, part, self.dtype) for moment in self.moments.values()],
                    lr * share.lr_scale[run],
                    share.weight_decay[run],
                )
                for moment, value in zip(self.moments.values(), new, strict=True):
                    moment.write(run, part, value, really)
                self.weights.write(run, part, new_weight, really)

    def state(self) -> Mapping[str, Sequence[Tensor]]:
        """The moments by name; one in 8 bits has its scales beside it."""
        return {
            name + part: tensors for name, moment in self.moments.items() for part, tensors in moment.tensors().items()
        }
