"""The global gradient norm: each parameter once, whatever ranks hold copies of it."""

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from megacore.mesh.collectives import all_reduce
from megacore.mesh.mesh import ParallelMesh
from megacore.sharding.flat import FlatBuffer
from megacore.spec import ParamSpec


class GlobalNorm:
    """The norm of all gradients of the model.

    Squares are formed per parameter, placed by global order, summed over the ranks of one model copy and then added
    in that order, so pipelines do not change a bit of it. ``copies`` are parameters here that another pipeline rank
    counts (a tied output matrix).
    """

    def __init__(
        self, grads: FlatBuffer, params: Sequence[ParamSpec], mesh: ParallelMesh, copies: Collection[str] = ()
    ) -> None:
        self.mesh, self.num_params = mesh, len(params)
        self.owned: list[Tensor] = []
        places: list[int] = []
        views: Mapping[str, Tensor] = grads.views()
        for place, spec in enumerate(params):
            if spec.name not in views or spec.name in copies:
                continue
            for piece in spec.pieces(mesh.tp.rank, mesh.tp.size):
                if piece.copy == 0:
                    self.owned.append(views[spec.name].narrow(spec.dim, piece.local, piece.size))
                    places.append(place)
        self.places = torch.tensor(places, dtype=torch.long, device=grads.data.device)

    def __call__(self) -> Tensor:
        """The norm, a float64 scalar on the device, equal on all ranks."""
        squares = torch.zeros(self.num_params, dtype=torch.float64, device=self.places.device)
        if self.owned:
            norms = torch.stack(torch._foreach_norm(self.owned)).to(torch.float64)
            squares.index_add_(0, self.places, norms.square_())
        return all_reduce(squares, self.mesh.model).sum().sqrt()
