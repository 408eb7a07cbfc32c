"""A run of layers that one pipeline rank computes: the first begins with the embedding, the last ends in the loss."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from megacore.config.resolve import window_of
from megacore.config.schema import ModelConfig
from megacore.kernels import counter
from megacore.kernels.table import Kernels
from megacore.model.block import Block
from megacore.model.inputs import Inputs, Shared
from megacore.model.masks import Visible, attention_mask
from megacore.model.norm import make_norm
from megacore.model.positions import alibi_slopes, rope_angles
from megacore.parallel.cross_entropy import Vocabulary, linear_cross_entropy
from megacore.parallel.dropout import dropout
from megacore.parallel.embedding import PositionEmbedding, VocabParallelEmbedding, vocab_piece
from megacore.parallel.linear import ColumnParallelLinear, column_parallel
from megacore.parallel.parameters import ParameterMaker
from megacore.parallel.tensor import TensorParallel

TIED = "embedding.tokens.weight"
"""The parameter that a tied output matrix is."""


@dataclass(frozen=True)
class Objective:
    """What is minimised besides the cross-entropy itself."""

    label_smoothing: float = 0.0
    z_loss: float = 0.0


class Loss(NamedTuple):
    """Sums over a microbatch's targets. ``objective`` is what is differentiated, ``cross_entropy`` what is reported:
    smoothed in training where labels are, plain in evaluation, and without the z-loss."""

    objective: Tensor
    cross_entropy: Tensor
    num_targets: Tensor


class Embedding(nn.Module):
    """Tokens (and learned positions) to x [t, h]."""

    def __init__(
        self, model: ModelConfig, make: ParameterMaker, vocab: Vocabulary, tp: TensorParallel, seed: int
    ) -> None:
        super().__init__()
        self.tokens = VocabParallelEmbedding(make.below("tokens"), vocab.piece, tp)
        self.positions = PositionEmbedding(make.below("positions"), tp) if model.position == "learned" else None
        self.dropout, self.key = model.dropout, counter.key_of("dropout", seed, "embedding")
        self.tp = tp
        self.scale = 0.0
        if model.scale_embeddings:  # the factor is rounded to the format of what it multiplies, as in published code
            wide = torch.promote_types(make.dtype, torch.float32)
            self.scale = torch.tensor(model.hidden_size**0.5, dtype=wide).to(make.dtype).item()

    def forward(self, inputs: Inputs, shared: Shared) -> Tensor:
        x_th = self.tokens(inputs.token_bs.reshape(-1))
        if self.scale:
            x_th = x_th * self.scale
        if self.positions is not None:
            start, size = self.tp.shard_of_tokens(inputs.token_bs.numel())
            place_t = positions_of(inputs).expand(inputs.shape).reshape(-1)
            x_th = x_th + self.positions(place_t[start : start + size])
        if shared.training and self.dropout:
            x_th = dropout(x_th, shared.row_t, self.dropout, self.key)
        return x_th


class TiedTable(nn.Module):
    """The embedding's matrix where it only serves as the output matrix, under its global name."""

    def __init__(self, tokens: VocabParallelEmbedding) -> None:
        super().__init__()
        self.tokens = tokens


class Stage(nn.Module):
    """Layers ``layers`` of the model, with the embedding if ``first`` and the head if ``last``.

    Parameters keep their global names. Input and output are x [t, h] (a run of the tokens under sequence parallelism).
    A tied output matrix is the embedding's; where the last stage is not the first, it is that of ``tied_to`` (the first
    stage, on the same rank) or a copy of its own. ``recompute``: see ``model/recompute.py``.
    """

    embedding: Embedding | TiedTable

    def __init__(
        self,
        model: ModelConfig,
        make: ParameterMaker,
        tp: TensorParallel,
        kernels: Kernels,
        objective: Objective,
        layers: range,
        first: bool = True,
        last: bool = True,
        tied_to: "Stage | None" = None,
        recompute: str = "none",
    ) -> None:
        super().__init__()
        self.model, self.tp, self.objective, self.first, self.last = model, tp, objective, first, last
        rows = make.specs[TIED].pieces(tp.group.rank, tp.group.size)
        self.vocab = Vocabulary(model.vocab_size, vocab_piece(rows), kernels.logit_statistics)
        self.dtype, self.device = make.dtype, make.device
        if first:
            self.embedding = Embedding(model, make.below("embedding"), self.vocab, tp, make.seed)
        self.layers = nn.ModuleDict(
            {
                str(i): Block(model, make.below(f"layers.{i}"), tp, kernels, make.seed, recompute, window_of(model, i))
                for i in layers
            }
        )
        self.windows = {window_of(model, i) for i in layers}
        self.blocks = tuple(self.layers.values())
        if last:
            self.final_norm = make_norm(model, make.below("final_norm"), kernels)
            self.head = None if model.tie_embeddings else ColumnParallelLinear(make.below("head"), tp)
            if model.tie_embeddings and not first:
                self.embedding = TiedTable(
                    VocabParallelEmbedding(make.below("embedding.tokens"), self.vocab.piece, tp)
                    if tied_to is None
                    else tied_to.embedding.tokens
                )

    def forward(self, inputs: Inputs, x_th: Tensor | None = None, logits: bool = False) -> Tensor | Loss:
        """x [t, h] for the next stage; on the last one the loss or, if asked for, this rank's ``logits`` [t, v].

        ``x_th``: what the stage before gave (None: first).
        """
        shared = self.shared(inputs)
        out: Tensor | Loss | None = x_th
        for unit in range(self.num_units):
            out = self.unit(unit, inputs, shared, out, logits)
        assert out is not None, "a stage has units"
        return out

    def unit(
        self, unit: int, inputs: Inputs, shared: Shared, x_th: Tensor | Loss | None, logits: bool = False
    ) -> Tensor | Loss:
        """One of the stage's units: its embedding, a block or its head, in this order. As ``forward``."""
        if self.first and unit == 0:
            return self.embedding(inputs, shared)
        assert isinstance(x_th, Tensor)
        block = unit - self.first
        if block < len(self.layers):
            return self.blocks[block](x_th, shared)
        return self.logits(x_th) if logits else self.loss(inputs, x_th)

    @property
    def num_units(self) -> int:
        """Embedding, blocks and head, as far as they are here."""
        return self.first + len(self.layers) + self.last

    def unit_parameters(self) -> list[dict[str, nn.Parameter]]:
        """The parameters that each unit uses, by their global names."""
        units: list[dict[str, nn.Parameter]] = [{} for _ in range(self.num_units)]
        place = {f"layers.{name}": self.first + number for number, name in enumerate(self.layers)}
        if self.first:
            place["embedding"] = 0
        for name, param in self.named_parameters():
            parts = name.split(".")
            module = ".".join(parts[:2]) if parts[0] == "layers" else parts[0]
            units[place.get(module, -1)][name] = param
        if self.last and self.head is None:
            units[-1][TIED] = self.embedding.tokens.weight
        return units

    def boundary_shape(self, inputs: Inputs) -> tuple[int, int]:
        """The shape of x [t, h] between stages, known to both of its ends."""
        return self.tp.shard_of_tokens(inputs.token_bs.numel())[1], self.model.hidden_size

    def logits(self, x_th: Tensor) -> Tensor:
        """This rank's part of the vocabulary, [t, v] (all tokens, also under sequence parallelism)."""
        logits_tv = column_parallel(self.final_norm(x_th), self.output_vh, self.tp)
        cap = self.model.logit_softcap
        return (logits_tv / cap).tanh() * cap if cap else logits_tv

    def loss(self, inputs: Inputs, x_th: Tensor) -> Loss:
        """The microbatch's loss sums."""
        label_t, smoothing = inputs.label_bs.reshape(-1), self.objective.label_smoothing if inputs.training else 0.0
        x_th = self.final_norm(x_th)
        loss_t, z_t = linear_cross_entropy(
            x_th, self.output_vh, label_t, self.vocab, self.tp, smoothing, self.model.logit_softcap
        )
        cross_entropy = loss_t.sum()
        total = cross_entropy + self.objective.z_loss * z_t.sum() if self.objective.z_loss else cross_entropy
        return Loss(total, cross_entropy.detach(), inputs.num_targets)

    @property
    def output_vh(self) -> Tensor:
        """This rank's rows of the output matrix; the embedding's where they are tied."""
        return self.embedding.tokens.weight if self.head is None else self.head.weight

    def shared(self, inputs: Inputs) -> Shared:
        """What the blocks share of this microbatch."""
        m, (_, s), device = self.model, inputs.shape, inputs.token_bs.device
        token_t = inputs.token_numbers()
        start, size = self.tp.shard_of_tokens(token_t.numel())
        cos = sin = slope_n = None
        if m.position == "rope":
            cos, sin = rope_angles(m, positions_of(inputs), self.dtype)
        if m.position == "alibi":
            num_local = m.num_heads // self.tp.group.size
            slope_n = alibi_slopes(m.num_heads)[self.tp.group.rank * num_local :][:num_local]
        visible: dict[int, Visible] = {}
        for window in sorted(self.windows, reverse=True):
            # a window as wide as the sample hides nothing: such layers share the mask of those without
            same = next((made for wide, made in visible.items() if min(wide or s, s) == min(window or s, s)), None)
            visible[window] = same or attention_mask(s, window, inputs.document_bs, slope_n, device, self.dtype)
        row_t = token_t[start : start + size]
        return Shared(inputs.shape, cos, sin, visible, token_t, row_t, inputs.training, self.dtype)


def positions_of(inputs: Inputs) -> Tensor:
    """Positions [b, s], or [1, s] where every sample counts from 0."""
    if inputs.position_bs is not None:
        return inputs.position_bs
    return torch.arange(inputs.shape[1], device=inputs.token_bs.device)[None]
