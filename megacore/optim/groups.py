"""What every optimizer is given: one stage's parameters and gradients, grouped by whether weight decay applies."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from megacore.sharding.flat import FlatBuffer, FlatParameters
from megacore.spec import ParamSpec


class Optimizer(Protocol):
    """An update rule over one stage's flat parameters."""

    def step(self, lr: float, skip: Tensor) -> None:
        """Update the weights from the gradients.

        Where ``skip`` (float32 scalar on the device) is 1, change nothing: the decision stays on the device and the
        host never waits for it.
        """


@dataclass(frozen=True)
class DecayGroup:
    """Parameters with one weight decay, by name."""

    weight_decay: float
    names: tuple[str, ...]

    def of(self, buffer: FlatBuffer) -> list[Tensor]:
        """The group's views of a buffer."""
        views = buffer.views()
        return [views[name] for name in self.names]


def decay_groups(flat: FlatParameters, specs: Mapping[str, ParamSpec], weight_decay: float) -> tuple[DecayGroup, ...]:
    """The stage's parameters in one or two groups; a rank's empty parts (of a tiny vocabulary, say) are left out."""
    names = [slot.name for slot in flat.params.layout.slots if slot.numel]
    decay_of = {name: weight_decay if specs[name].decay else 0.0 for name in names}
    values = dict.fromkeys(decay_of.values())
    return tuple(DecayGroup(value, tuple(name for name in names if decay_of[name] == value)) for value in values)
