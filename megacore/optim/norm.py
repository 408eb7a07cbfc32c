"""The global gradient norm: each element once, whatever ranks hold copies or other runs of its parameter."""

from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor

from megacore.kernels.fused import squares as squares_of_many
from megacore.layout.shards import Run
from megacore.mesh.collectives import all_reduce
from megacore.mesh.group import Group
from megacore.mesh.mesh import ParallelMesh
from megacore.optim.counted import Counted
from megacore.spec import ParamSpec

Squares = Callable[[Sequence[Tensor]], Tensor]
"""As ``kernels.reference.squares``."""


class GlobalNorm:
    """The norm of all gradients of the model, and of each parameter's.

    Squares are formed per parameter, placed by global order, summed over the ranks of one model copy and over those
    that share its tensors (``shards``), and then added in that order, so pipelines do not change a bit of it.
    ``specs`` are all parameters in global order, ``copies`` those here that another pipeline rank counts (a tied
    output matrix). What is frozen has no runs, and so no part in the norm. ``kernel`` sums the squares of tensors.
    """

    def __init__(
        self,
        runs: Sequence[Run],
        specs: Sequence[ParamSpec],
        mesh: ParallelMesh,
        shards: Group,
        copies: Collection[str] = (),
        kernel: Squares = squares_of_many,
    ) -> None:
        self.kernel = kernel
        self.mesh, self.shards, self.num_params = mesh, shards, len(specs)
        self.counted = Counted(runs, specs, mesh.tp, copies)
        places = [part.place for part in self.counted.parts]
        self.places = torch.tensor(places, dtype=torch.long, device=mesh.device)

    def __call__(self, grads: Sequence[Tensor]) -> Tensor:
        """The norm of ``grads`` (one 1-D tensor per run): a float64 scalar on the device, equal on all ranks."""
        return self.squares(grads).sum().sqrt()

    def squares(self, grads: Sequence[Tensor]) -> Tensor:
        """The squared norm of every parameter's gradient [num_params], float64 on the device, equal on all ranks."""
        squares = self.sums(self.counted.of(grads), self.places, self.num_params)
        others = self.counted.others_of(grads)
        if others:  # these add nothing, but NaN where a copy here is no number and the one that counts is
            squares += self.kernel(others).to(squares).sum() * 0.0
        return all_reduce(all_reduce(squares, self.mesh.model), self.shards)

    def sums(self, tensors: Sequence[Tensor], places: Tensor, size: int) -> Tensor:
        """Squared norms of ``tensors``, added up at their ``places`` of a float64 [size]; tensors may be in host
        memory."""
        sums = torch.zeros(size, dtype=torch.float64, device=places.device)
        if tensors:
            sums.index_add_(0, places, self.kernel(tensors).to(sums.device))
        return sums
