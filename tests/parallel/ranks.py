"""What the tests of parallel layers share: a rank's surroundings, and numbers that all ranks agree on."""

import torch
from torch import Tensor

from megacore.layout import Layout
from megacore.mesh.group import CommLog
from megacore.mesh.mesh import ParallelMesh
from megacore.parallel.parameters import ParameterMaker
from megacore.parallel.tensor import TensorParallel
from megacore.spec import ParamSpec

CPU = torch.device("cpu")


def surroundings(
    rank: int, size: int, sequence: bool = False, regather: bool = False, log: CommLog | None = None
) -> TensorParallel:
    """The tensor-parallel group of all ``size`` ranks."""
    return TensorParallel(ParallelMesh.build(Layout(tp=size), rank, CPU, log=log).tp, sequence, regather)


def maker(tp: TensorParallel, *specs: ParamSpec, dtype: torch.dtype = torch.float64, seed: int = 7) -> ParameterMaker:
    return ParameterMaker({spec.name: spec for spec in specs}, tp.group, CPU, dtype, seed)


def numbers(seed: int, *shape: int) -> Tensor:
    """The same on every rank."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def own(whole: Tensor, spec: ParamSpec, tp: TensorParallel) -> Tensor:
    """A rank's part of a global tensor."""
    pieces = spec.pieces(tp.group.rank, tp.group.size)
    parts = [whole.narrow(spec.dim, piece.start, piece.size) for piece in pieces]
    return torch.cat(parts, spec.dim) if parts else whole.narrow(spec.dim, 0, 0)


def own_tokens(whole: Tensor, tp: TensorParallel) -> Tensor:
    """A rank's part of what lies outside the matrices, tokens first: a shard, or all of it."""
    return whole.narrow(0, *tp.shard_of_tokens(whole.shape[0])).clone()


def close(got: Tensor | None, want: Tensor, what: str) -> None:
    assert got is not None, what
    torch.testing.assert_close(got.detach(), want.detach(), rtol=1e-12, atol=1e-12, msg=lambda text: f"{what}: {text}")
