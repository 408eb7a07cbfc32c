"""Makes a rank's own part of each parameter, filled as every layout would fill it.

Initialisation is keyed by global element: element i of parameter ``name`` is a function of (seed, name, i) alone, so
every layout starts from the same weights and no rank ever makes a tensor larger than what it holds.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from megacore.kernels import counter
from megacore.mesh.group import Group
from megacore.spec import ParamSpec

CHUNK = 1 << 18
"""Elements drawn at once: the 64-bit workspace of a chunk stays in cache."""


@dataclass(frozen=True)
class ParameterMaker:
    """Makes parameters by name below ``prefix``; names that the spec does not have give None (a bias that is off)."""

    specs: Mapping[str, ParamSpec]
    group: Group
    device: torch.device
    dtype: torch.dtype
    seed: int
    prefix: str = ""
    filled: bool = True
    """Whether parameters are initialised at once; else they have no memory, for somebody who gives them some."""

    def below(self, name: str) -> "ParameterMaker":
        """The maker for the parameters of part ``name``."""
        return replace(self, prefix=f"{self.prefix}{name}.")

    def __call__(self, name: str) -> nn.Parameter:
        """Parameter ``name`` of local shape, initialised (not on the meta device); if not ``filled``, only a shape."""
        spec = self.specs[self.prefix + name]
        shape = spec.local_shape(self.group.rank, self.group.size)
        if not self.filled:  # all of a stage's at once may be more than there is room for
            nan = torch.full((), torch.nan, dtype=self.dtype, device=self.device)
            return nn.Parameter(nan.expand(shape))
        tensor = torch.empty(shape, dtype=self.dtype, device=self.device)
        fill(tensor, spec, self.group, self.seed)
        return nn.Parameter(tensor)

    def optional(self, name: str) -> nn.Parameter | None:
        """Parameter ``name``, or None if the model has none of this name."""
        return self(name) if self.prefix + name in self.specs else None


@torch.no_grad()
def fill(tensor: Tensor, spec: ParamSpec, group: Group, seed: int) -> None:
    """Write this rank's part of a parameter's initial value into ``tensor`` (local shape; on meta there is nothing)."""
    if tensor.is_meta:
        return
    if spec.init != "normal":
        tensor.fill_({"ones": 1.0, "zeros": 0.0}[spec.init])
        return
    key = counter.key_of("weights", seed, spec.name)
    for piece in spec.pieces(group.rank, group.size):
        part = tensor.narrow(spec.dim, piece.local, piece.size)
        starts = [piece.start if dim == spec.dim else 0 for dim in range(2)]
        for row, count in _row_chunks(part):
            rows = torch.arange(starts[0] + row, starts[0] + row + count, device=tensor.device)
            columns = torch.arange(starts[1], starts[1] + part.shape[1], device=tensor.device)
            index = rows[:, None] * spec.shape[1] + columns
            part[row : row + count] = counter.normal(key, index).mul_(spec.std)


def _row_chunks(part: Tensor) -> Iterator[tuple[int, int]]:
    """(first row, number of rows) runs of at most about CHUNK elements."""
    step = max(1, CHUNK // max(1, part.shape[1]))
    for row in range(0, part.shape[0], step):
        yield row, min(step, part.shape[0] - row)
