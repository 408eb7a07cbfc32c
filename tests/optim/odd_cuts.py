"""A small model with all that a decoder may have, dealt to tp ranks and cut between ZeRO's ranks at odd places."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from megacore.config.resolve import resolve_model
from megacore.config.schema import ModelConfig
from megacore.layout import Layout
from megacore.layout.shards import Run
from megacore.mesh.group import CommLog
from megacore.mesh.mesh import ParallelMesh
from megacore.optim.rule import Share
from megacore.spec import ModelSpec, ParamSpec

CPU = torch.device("cpu")
# At tp=4: copied kv heads, a ragged vocabulary and MLP. Fused query, key and value, gate and up; biases; head norms.
MODEL = resolve_model(
    ModelConfig(
        num_layers=1,
        hidden_size=12,
        ffn_hidden_size=9,
        num_heads=4,
        num_kv_heads=2,
        head_dim=3,
        vocab_size=11,
        position="learned",
        norm="layernorm",
        tie_embeddings=False,
        qk_norm=True,
        qkv_bias=True,
        attention_out_bias=True,
        mlp_bias=True,
    ),
    seq_len=5,
)
SPECS = ModelSpec.of(MODEL).params
BY_NAME = {spec.name: spec for spec in SPECS}
LAYOUTS = (
    Layout(),
    Layout(tp=2),
    Layout(tp=4),
    Layout(dp=2, dp_shard=2),
    Layout(dp=3, dp_shard=3),
    Layout(tp=2, dp=2, dp_shard=2),
)
UNSEEN = 4
"""A token that has no gradient, ever."""


def whole_weight(spec: ParamSpec) -> Tensor:
    """Biases begin at zero, where relative steps are hardest."""
    if spec.name.endswith(".bias"):
        return torch.zeros(spec.shape, dtype=torch.float64)
    return torch.randn(spec.shape, generator=_generator(spec, 0), dtype=torch.float64)


def whole_grad(spec: ParamSpec, step: int) -> Tensor:
    """Of very different sizes from parameter to parameter, row to row and column to column."""
    make = _generator(spec, step)
    grad = torch.randn(spec.shape, generator=make, dtype=torch.float64) * 10.0 ** -(SPECS.index(spec) % 5)
    for dim, size in enumerate(spec.shape):
        sizes = 10 ** torch.randn(size, generator=_generator(spec, -dim - 1), dtype=torch.float64)
        grad *= sizes.view([-1 if dim == i else 1 for i in range(len(spec.shape))])
    if spec.name == "embedding.tokens.weight":
        grad[UNSEEN] = 0
    return grad


def _generator(spec: ParamSpec, seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(1000 * (seed + 10) + SPECS.index(spec))


def local_of(spec: ParamSpec, whole: Tensor, index: int, num: int) -> Tensor:
    """A whole tensor's part at member ``index`` of ``num`` on tp."""
    parts = [whole.narrow(spec.dim, piece.start, piece.size) for piece in spec.pieces(index, num)]
    return torch.cat(parts, spec.dim) if parts else whole.narrow(spec.dim, 0, 0)


def odd_runs(numels: Mapping[str, int], shard: int, num: int) -> tuple[Run, ...]:
    """A shard's runs where parameters lie one behind the other and all cuts are at odd numbers."""
    cuts = [0, *(sum(numels.values()) * i // num | 1 for i in range(1, num)), sum(numels.values())]
    start, stop = cuts[shard], cuts[shard + 1]
    runs, begin = [], 0
    for name, numel in numels.items():
        first, last = max(begin, start), min(begin + numel, stop)
        if first < last:
            runs.append(Run(name, first - begin, last - begin, first - start))
        begin += numel
    return tuple(runs)


def share_of(rank: int, layout: Layout, dtype: torch.dtype = torch.float64, log: CommLog | None = None) -> Share:
    """What a rank has to update, from the same whole weights on every layout."""
    mesh = ParallelMesh.build(layout, rank, CPU, max(1, layout.tp // MODEL.num_kv_heads), log)
    numels = {spec.name: spec.local_numel(mesh.tp.rank, mesh.tp.size) for spec in SPECS}
    runs = odd_runs(numels, mesh.dp_shard.rank, mesh.dp_shard.size)
    specs = tuple(BY_NAME[run.name] for run in runs)
    weights = cut({spec.name: whole_weight(spec) for spec in specs}, runs, mesh.tp.rank, mesh.tp.size, dtype)
    decay = tuple(0.1 if spec.decay else 0.0 for spec in specs)
    scales = tuple(lr_scale(spec) for spec in specs)
    return Share(runs, specs, tuple(weights), decay, scales, mesh.tp, mesh.dp_shard, dtype, CPU)


def lr_scale(spec: ParamSpec) -> float:
    return 0.5 if spec.name.startswith(("embedding", "layers.0.mlp")) else 1.0


def grads_of(share: Share, step: int) -> list[Tensor]:
    """A rank's gradients of a step."""
    whole = {spec.name: whole_grad(spec, step) for spec in share.specs}
    return cut(whole, share.runs, share.tp.rank, share.tp.size, share.dtype)


def cut(
    whole: Mapping[str, Tensor], runs: Sequence[Run], index: int, num: int, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    """The runs of whole tensors at a tp rank."""
    locals_ = {name: local_of(BY_NAME[name], tensor, index, num).reshape(-1) for name, tensor in whole.items()}
    return [locals_[run.name][run.start : run.stop].to(dtype, copy=True) for run in runs]


Held = list[tuple[int, Run, Tensor]]
"""A rank's runs with what is in them, each with the rank's place in tp."""


def held_by(share: Share, tensors: Sequence[Tensor]) -> Held:
    return [(share.tp.rank, run, tensor) for run, tensor in zip(share.runs, tensors, strict=True)]


def assembled(of_ranks: Sequence[Held], tp: int) -> dict[str, Tensor]:
    """The whole tensors again; copies must agree bit for bit."""
    locals_ = {
        (index, spec.name): torch.full([spec.local_numel(index, tp)], torch.nan, dtype=torch.float64)
        for index in range(tp)
        for spec in SPECS
    }
    for held in of_ranks:
        for index, run, tensor in held:
            locals_[index, run.name][run.start : run.stop] = tensor
    whole = {spec.name: torch.full(spec.shape, torch.nan, dtype=torch.float64) for spec in SPECS}
    for (index, name), flat in locals_.items():
        spec = BY_NAME[name]
        local = flat.view(spec.local_shape(index, tp))
        for piece in spec.pieces(index, tp):
            place = whole[name].narrow(spec.dim, piece.start, piece.size)
            own = local.narrow(spec.dim, piece.local, piece.size)
            assert place.isnan().all() or torch.equal(place, own), f"{name}: copies differ"
            place.copy_(own)
    assert not any(tensor.isnan().any() for tensor in whole.values())
    return whole


def logical(spec: ParamSpec, whole: Tensor) -> list[Tensor]:
    """The matrices or vectors that a whole parameter consists of: views."""
    if spec.split is None:
        return [whole]
    return list(whole.split([segment.size for segment in spec.split.segments], spec.dim))
