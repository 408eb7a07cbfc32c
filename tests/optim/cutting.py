"""A model whose gradients every rank can write down, cut as tensor parallelism and ZeRO cut them."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megacore.config.resolve import resolve_model
from megacore.config.schema import ModelConfig
from megacore.layout import BufferLayout, Layout
from megacore.layout.shards import Run, runs_of
from megacore.mesh.group import CommLog, Group
from megacore.mesh.mesh import ParallelMesh
from megacore.optim.norm import GlobalNorm
from megacore.spec import ModelSpec, ParamSpec

CPU = torch.device("cpu")
# Ragged vocabulary and MLP, one kv head for all ranks, weights without rows on some ranks, biases, norms of heads.
MODEL = resolve_model(
    ModelConfig(
        num_layers=2,
        hidden_size=10,
        ffn_hidden_size=7,
        num_heads=4,
        num_kv_heads=2,
        head_dim=2,
        vocab_size=3,
        qk_norm=True,
        qkv_bias=True,
        mlp_bias=True,
    ),
    seq_len=8,
)
SPECS = ModelSpec.of(MODEL).params
TIED = "embedding.tokens.weight"
LAYOUTS = (
    Layout(tp=2),
    Layout(tp=4),
    Layout(dp=2, dp_shard=2),
    Layout(dp=3, dp_shard=3),
    Layout(tp=2, dp=2, dp_shard=2),
    Layout(pp=2, dp=2, dp_shard=2),
    Layout(dp=4, dp_shard=2),
)
"""Shapes of up to four ranks; ``cut`` shares out buffers over dp_shard."""


def whole_tensor(place: int, spec: ParamSpec, seed: int = 0, scale: float = 1.0) -> Tensor:
    """Any tensor of the parameter's global shape; the parameters differ in size, too."""
    generator = torch.Generator().manual_seed(1000 * seed + place)
    return torch.randn(spec.shape, generator=generator, dtype=torch.float64) * (1 + place) * scale


@dataclass(frozen=True)
class Cut:
    """What one rank holds of the model."""

    mesh: ParallelMesh
    shards: Group
    runs: tuple[Run, ...]
    copies: tuple[str, ...]

    @property
    def norm(self) -> GlobalNorm:
        return GlobalNorm(self.runs, SPECS, self.mesh, self.shards, self.copies)

    def of(self, whole: Callable[[int, ParamSpec], Tensor], dtype: torch.dtype = torch.float64) -> list[Tensor]:
        """The rank's runs of the tensors that ``whole`` gives for each parameter."""
        locals_ = {spec.name: self.local(spec, whole(place, spec)) for place, spec in enumerate(SPECS)}
        return [locals_[run.name].reshape(-1)[run.start : run.stop].to(dtype, copy=True) for run in self.runs]

    def local(self, spec: ParamSpec, whole: Tensor) -> Tensor:
        """A whole tensor's part at this tp rank."""
        pieces = spec.pieces(self.mesh.tp.rank, self.mesh.tp.size)
        parts = [whole.narrow(spec.dim, piece.start, piece.size) for piece in pieces]
        return torch.cat(parts, spec.dim) if parts else whole.narrow(spec.dim, 0, 0)


def cut(rank: int, layout: Layout, log: CommLog | None = None) -> Cut:
    """The rank's part; with pp=2 the second stage begins in layer 1 and holds a copy of the (tied) embedding."""
    mesh = ParallelMesh.build(layout, rank, CPU, max(1, layout.tp // MODEL.num_kv_heads), log)
    held: list[ParamSpec] = list(SPECS)
    copies: tuple[str, ...] = ()
    if layout.pp == 2:
        second = [spec for spec in SPECS if not spec.name.startswith(("embedding", "layers.0"))]
        tied = [spec for spec in SPECS if spec.name == TIED]
        held = second + tied if mesh.pp.rank else [spec for spec in SPECS if spec not in second]
        copies = (TIED,) if mesh.pp.rank else ()
    shapes = [(spec.name, spec.local_shape(mesh.tp.rank, mesh.tp.size)) for spec in held]
    # two buckets: a rank has two pieces of the buffer, so that a parameter is cut where neither it nor a bucket ends
    third = len(shapes) // 3
    buffer = BufferLayout.in_buckets([shapes[:third], shapes[third:]], layout.dp_shard)
    runs = runs_of(buffer, mesh.dp_shard.rank, mesh.dp_shard.size)
    return Cut(mesh, mesh.dp_shard, runs, copies)


def alone() -> Cut:
    """Everything on one process."""
    return cut(0, Layout())
