"""What a tensor-parallel layer needs to know of its surroundings."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from torch import nn

from megacore.kernels.linear import REFERENCE, LinearKernel
from megacore.mesh.group import Group
from megacore.parallel.parameters import ParameterMaker
from megacore.parallel.wgrad import WeightGradients


class LinearModules(Protocol):
    """Makes linear layers that are somebody else's, to the contract of those in ``linear``."""

    def column(self, make: ParameterMaker, tp: "TensorParallel") -> nn.Module: ...

    def row(self, make: ParameterMaker, tp: "TensorParallel") -> nn.Module: ...


@dataclass(frozen=True)
class TensorParallel:
    """The group, and how activations outside the matrices lie over it.

    With ``sequence`` each rank holds a run of the microbatch's tokens there, not all of them; with ``regather`` a
    column-parallel layer keeps only its shard of the input for backward and gathers it once more. ``linear`` is the
    matrix product that the layers use but for those that have their own in ``linears``, by their global names;
    ``wgrad`` takes their weights' gradients. ``modules`` makes the layers of blocks instead, if it is there.
    """

    group: Group
    sequence: bool = False
    regather: bool = False
    linear: LinearKernel = REFERENCE
    wgrad: WeightGradients = field(default_factory=WeightGradients, repr=False)
    linears: Mapping[str, LinearKernel] = field(default_factory=dict, repr=False)
    modules: LinearModules | None = field(default=None, repr=False)

    @classmethod
    def single(cls) -> "TensorParallel":
        """One process: nothing is split."""
        return cls(Group.single("tp"))

    def __post_init__(self) -> None:
        if self.group.size == 1 and self.sequence:  # one shard of the sequence is the whole
            object.__setattr__(self, "sequence", False)

    def kernel_of(self, layer: str) -> LinearKernel:
        """The matrix product of a layer."""
        return self.linears.get(layer, self.linear)

    def shard_of_tokens(self, num_tokens: int) -> tuple[int, int]:
        """(first token, number of tokens) that this rank holds outside the matrices, of ``num_tokens``."""
        if not self.sequence:
            return 0, num_tokens
        size = num_tokens // self.group.size
        return self.group.rank * size, size
