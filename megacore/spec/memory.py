"""Bytes of state that a rank holds for training: parameters, gradients and what the optimizer remembers.

They follow from the specs alone (gaps of at most 63 elements per parameter in flat buffers are left out). Activations
depend on kernels and schedule and are not counted here yet.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from types import MappingProxyType

from megacore.config.schema import OptimConfig
from megacore.spec.params import ParamSpec

ITEM_BYTES = MappingProxyType({"fp64": 8, "fp32": 4, "bf16": 2, "fp16": 2})


@dataclass(frozen=True)
class StateBytes:
    """Bytes on one rank."""

    params: int
    grads: int
    optimizer: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.params + self.grads + self.optimizer


def state_bytes(
    params: Iterable[ParamSpec], optim: OptimConfig, dtype: str, tp_rank: int = 0, tp: int = 1
) -> StateBytes:
    """What member ``tp_rank`` of ``tp`` holds of ``params``, everything in ``dtype`` (no ZeRO, no master weights).

    AdamW remembers two moments per parameter; SGD one velocity if it has momentum.
    """
    numel = sum(param.local_numel(tp_rank, tp) for param in params)
    slots = 2 if optim.name == "adamw" else int(optim.momentum > 0)
    size = numel * ITEM_BYTES[dtype]
    return StateBytes(size, size, slots * size)
