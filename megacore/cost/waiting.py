"""What one block keeps of a microbatch: our engine's bytes (``spec/activations.py``), or those of another practice."""

from dataclasses import dataclass, replace
from functools import cache
from typing import NamedTuple

from megacore.config.schema import ModelConfig
from megacore.spec.activations import (
    STATISTIC_BYTES,
    activation_bytes,
    host_activation_bytes,
    late_bytes,
    working_bytes,
)


class Waiting(NamedTuple):
    """Bytes of one microbatch in one block: what waits for backward, for weight gradients, in host memory; and what it
    takes more while it goes through backward."""

    kept: int
    late: int
    host: int
    working: int


@dataclass(frozen=True)
class Way:
    """How a block computes: its sample, its layout, and the practice."""

    seq_len: int
    micro_batch_size: int
    tp: int
    sequence: bool
    recompute: str
    item: int
    regather: bool
    by_unit: bool
    cp: int
    etp: int
    attention: str = "fused"
    selective: str = "core"
    codes_only: bool = False

    @property
    def tokens(self) -> int:
        """On one rank, inside the matrices."""
        return self.seq_len * self.micro_batch_size // self.cp

    @property
    def outside(self) -> int:
        """On one rank, outside of them."""
        return self.tokens // self.tp if self.sequence else self.tokens

    def kept(self, model: ModelConfig, layer: int, recompute: str) -> int:
        """Our engine's bytes."""
        return activation_bytes(
            model,
            self.seq_len,
            self.micro_batch_size,
            self.tp,
            self.sequence,
            recompute,
            self.item,
            self.regather,
            self.by_unit,
            layer,
            self.cp,
            self.etp,
        )

    def working(self, model: ModelConfig, layer: int, recompute: str) -> int:
        """Our engine's."""
        sample = (self.seq_len, self.micro_batch_size, self.tp)
        return working_bytes(model, *sample, self.sequence, recompute, self.item, layer, self.cp, self.etp)

    def late(self, model: ModelConfig, layer: int) -> int:
        """Our engine's."""
        sample = (self.seq_len, self.micro_batch_size, self.tp)
        return late_bytes(model, *sample, self.item, layer, self.cp, self.etp)

    def host(self, model: ModelConfig, layer: int) -> int:
        """Our engine's."""
        if self.recompute != "offload":
            return 0
        sample = (self.seq_len, self.micro_batch_size, self.tp)
        return host_activation_bytes(model, *sample, self.sequence, self.item, self.regather, layer, self.cp, self.etp)


@cache
def waiting(model: ModelConfig, layer: int, way: Way) -> Waiting:
    """Of block ``layer`` of a resolved model."""
    late, host = way.late(model, layer), way.host(model, layer)
    if way.attention != "fused":
        kept, working = _with_small_masks(model, layer, way)
        return Waiting(kept, late, host, working)
    kept, working = way.kept(model, layer, way.recompute), way.working(model, layer, way.recompute)
    if way.recompute == "selective" and way.selective == "matmuls":
        kept = _every_other_product(model, way)
        working += way.kept(model, layer, "none") - kept
    if way.codes_only and way.recompute in ("none", "selective"):
        kept -= _saved_by_codes(model, way)
    return Waiting(kept, late, host, working + host)  # of what is offloaded, the block that comes next is on its way


def _with_small_masks(model: ModelConfig, layer: int, way: Way) -> tuple[int, int]:
    """(kept, working) as software before fused attention, or before fused dropout, has it: masks of one byte, and of
    each score the softmax and what dropout leaves (Korthikanti et al. 2022, equation 1)."""
    plain = replace(model, dropout=0.0, attention_dropout=0.0)
    masks = 2 * way.outside * model.hidden_size if model.dropout else 0
    scores = way.tokens * way.seq_len * (model.num_heads // way.tp) if way.attention == "explicit" else 0
    of_scores = scores * (way.item + (way.item + 1 if model.attention_dropout else 0))
    whole = way.kept(plain, layer, "none") + masks + of_scores
    kept = {"none": whole, "selective": way.kept(plain, layer, "selective") + masks}.get(
        way.recompute, way.kept(plain, layer, way.recompute)
    )
    remade = of_scores if way.recompute == "selective" else whole - kept
    return kept, remade + max(way.working(plain, layer, "none"), 2 * scores * way.item)


def _every_other_product(model: ModelConfig, way: Way) -> int:
    """The block's input, queries, values, attention's output, one of the two wide products and the narrow one."""
    heads, kv = model.num_heads // way.tp, max(1, model.num_kv_heads // way.tp)
    inside = ((2 * heads + kv) * model.head_dim + model.ffn_hidden_size // way.tp) * way.item + heads * STATISTIC_BYTES
    return way.tokens * inside + way.outside * 2 * model.hidden_size * way.item


def _saved_by_codes(model: ModelConfig, way: Way) -> int:
    """What the four inputs of a block's products take less in 8 bits."""
    inside = (model.num_heads * model.head_dim + model.ffn_hidden_size) // way.tp
    gathered = way.outside if way.regather else way.tokens
    return (way.tokens * inside + gathered * 2 * model.hidden_size) * (way.item - 1)
