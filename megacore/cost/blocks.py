"""How long one rank works at one block of a microbatch: forward, input gradient, weight gradient, waiting.

Seconds come apart by kind of work (`Parts`), so that a plan can say where a step goes. Products of matrices are priced
one by one in the shapes that a rank has of them (`cost/roofline.py`), collectives as the layers issue them
(`cost/collectives.py`): two pairs of gather and sum a block over tp forward, two backward (Shoeybi et al. 2019;
Korthikanti et al. 2022), keys and values around a ring of cp (Liu et al. 2023), tokens to their experts and back over
ep (Lepikhin et al. 2020).
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from megacore.config.resolve import GATED, window_of
from megacore.config.schema import ModelConfig
from megacore.cost.collectives import collective_s
from megacore.cost.practice import Practice
from megacore.cost.roofline import Device, attention_s, explicit_attention_s, gemm_s, moved_s
from megacore.spec.model import is_mixture

BACKWARD_TRAFFIC = 1.6
"""What memory-bound operations move in backward, to their forward."""


MIXTURE_LAUNCHES = 300.0
"""What routing, sorting, sending and gathering tokens takes the host in a forward, in launches: sizes are known only
while it runs, so that no graph holds it, and the host waits for them."""
EXPERT_LAUNCHES = 50.0
"""Likewise for each expert that a rank has: its products, and what prepares them. Both were set by published steps of
mixtures, most of them Megatron's."""


class Parts(NamedTuple):
    """Seconds by what they are spent at."""

    products: float = 0.0
    attention: float = 0.0
    memory: float = 0.0
    host: float = 0.0
    recompute: float = 0.0
    tp: float = 0.0
    cp: float = 0.0
    ep: float = 0.0
    hidden_tp: float = 0.0
    hidden_cp: float = 0.0
    hidden_ep: float = 0.0

    @property
    def seconds(self) -> float:
        """All that is not hidden behind other work."""
        return sum(self[:8])


class Work(NamedTuple):
    """Of one unit and microbatch; a backward in one piece is ``input_grad`` and ``weight_grad``."""

    forward: Parts
    input_grad: Parts
    weight_grad: Parts


@dataclass(frozen=True)
class Share:
    """What one rank computes at once: ``tokens`` inside the matrices (those of its cp part)."""

    device: Device
    practice: Practice
    seq_len: int
    tokens: int
    tp: int
    cp: int
    ep: int
    etp: int
    sequence: bool
    regather: bool
    recompute: str

    @property
    def outside(self) -> float:
        """Tokens outside of the matrices."""
        return self.tokens / self.tp if self.sequence else float(self.tokens)

    @property
    def routed(self) -> float:
        """Tokens whose experts a rank looks after: where experts are not split over tp, its part of the sequence."""
        return self.tokens if self.etp > 1 else self.tokens / self.tp


@lru_cache(maxsize=1 << 14)
def block_work(model: ModelConfig, layer: int, share: Share) -> Work:
    """Of block ``layer`` of a resolved model."""
    mixture = is_mixture(model, layer)
    shapes = _attention_shapes(model, share) + ([] if mixture else _mlp_shapes(model.ffn_hidden_size, model, share))
    shapes += _mixture_shapes(model, share) if mixture else []
    products = [_product(share.device, *shape) for shape in shapes]
    core, core_back = _core(model, layer, share)
    traffic = share.practice.traffic * moved_s(share.device, _traffic(model, mixture, share))
    tp, cp, ep = _collectives(model, mixture, share)
    hide_tp, hide_ep = share.practice.overlap_tp, share.practice.overlap_ep
    ring = max(0.0, cp - core)
    launches = share.practice.launches + (_mixture_launches(model, share) if mixture else 0.0)
    forward = _with_host(
        Parts(
            products=sum(each[0] for each in products),
            attention=core,
            memory=traffic,
            tp=tp * (1 - hide_tp),
            cp=ring,
            ep=ep * (1 - hide_ep),
            hidden_tp=tp * hide_tp,
            hidden_cp=cp - ring,
            hidden_ep=ep * hide_ep,
        ),
        share,
        launches,
    )
    again = _again(forward, core, share)
    back_ring = max(0.0, 2 * cp - core_back)
    regathered = tp / 2 if share.regather and share.sequence else 0.0
    back_tp = tp + regathered
    input_grad = _with_host(
        Parts(
            products=sum(each[1] for each in products),
            attention=core_back,
            memory=BACKWARD_TRAFFIC * traffic,
            recompute=again.seconds,
            tp=back_tp * (1 - hide_tp),
            cp=back_ring,
            ep=ep * (1 - hide_ep),
            hidden_tp=back_tp * hide_tp + again.hidden_tp,
            hidden_cp=2 * cp - back_ring + again.hidden_cp,
            hidden_ep=ep * hide_ep + again.hidden_ep,
        ),
        share,
        1.2 * launches,
    )
    weight_grad = _with_host(Parts(products=sum(each[2] for each in products)), share, 0.4 * launches)
    return Work(forward, input_grad, weight_grad)


def _with_host(parts: Parts, share: Share, launches: float) -> Parts:
    """The device waits where the host launches slower than it computes."""
    practice = share.practice
    host = launches * practice.host_share * share.device.machine.reached.host_us * 1e-6
    own = parts.seconds - parts.recompute
    return parts._replace(host=max(0.0, host - own))


def _mixture_launches(model: ModelConfig, share: Share) -> float:
    """Those of a forward's routing and of a rank's own experts."""
    return MIXTURE_LAUNCHES + EXPERT_LAUNCHES * max(1.0, model.num_experts / share.ep)


def _again(forward: Parts, core: float, share: Share) -> Parts:
    """What is computed a second time."""
    if share.recompute == "full":
        return forward
    if share.recompute != "selective":
        return Parts()
    if share.practice.selective == "matmuls":
        return Parts(products=forward.products / 2, memory=forward.memory)
    return Parts(attention=core)


Shape = tuple[float, float, float, float]
"""(tokens, outputs, inputs, how many)."""


def _attention_shapes(model: ModelConfig, share: Share) -> list[Shape]:
    tokens, tp, m = share.tokens, share.tp, model
    if not m.kv_lora_rank:
        kv = max(m.num_kv_heads / tp, 1.0)
        wide = (m.num_heads / tp + 2 * kv) * m.head_dim
        return [(tokens, wide, m.hidden_size, 1), (tokens, m.hidden_size, m.num_heads * m.head_dim / tp, 1)]
    queries = m.num_heads * m.head_dim / tp
    down = share.outside
    shapes: list[Shape] = [(down, m.kv_lora_rank + m.qk_rope_head_dim, m.hidden_size, 1)]
    if m.q_lora_rank:
        shapes += [(down, m.q_lora_rank, m.hidden_size, 1), (tokens, queries, m.q_lora_rank, 1)]
    else:
        shapes += [(tokens, queries, m.hidden_size, 1)]
    shapes += [(tokens, m.num_heads * (m.qk_nope_head_dim + m.v_head_dim) / tp, m.kv_lora_rank, 1)]
    return [*shapes, (tokens, m.hidden_size, m.num_heads * m.v_head_dim / tp, 1)]


def _mlp_shapes(width: float, model: ModelConfig, share: Share) -> list[Shape]:
    inner = width / share.tp
    up = 2 * inner if model.activation in GATED else inner
    return [(share.tokens, up, model.hidden_size, 1), (share.tokens, model.hidden_size, inner, 1)]


def _mixture_shapes(model: ModelConfig, share: Share) -> list[Shape]:
    experts = max(1.0, model.num_experts / share.ep)
    rows = share.routed * model.top_k / experts * share.practice.imbalance
    inner = model.moe_ffn_hidden_size / share.etp
    up = 2 * inner if model.activation in GATED else inner
    shapes: list[Shape] = [(rows, up, model.hidden_size, experts), (rows, model.hidden_size, inner, experts)]
    if model.num_shared_experts:
        shapes += _mlp_shapes(model.shared_ffn_hidden_size, model, share)
    return shapes


def _product(device: Device, tokens: float, outputs: float, inputs: float, many: float) -> tuple[float, float, float]:
    """Seconds of (forward, input gradient, weight gradient added to sums in fp32)."""
    return (
        gemm_s(device, tokens, outputs, inputs, many),
        gemm_s(device, tokens, inputs, outputs, many),
        gemm_s(device, outputs, inputs, tokens, many, 8.0),
    )


def _core(model: ModelConfig, layer: int, share: Share) -> tuple[float, float]:
    """Attention proper, forward and backward."""
    device, practice, heads = share.device, share.practice, model.num_heads / share.tp
    if practice.attention == "explicit":
        samples = share.tokens * share.cp / share.seq_len
        given = (device, samples / share.cp, share.seq_len, heads, model.head_dim, practice.passes)
        return explicit_attention_s(*given), explicit_attention_s(*given, True)
    window = window_of(model, layer)
    keys = share.seq_len / 2 if not 0 < window < share.seq_len else window * (1 - window / (2 * share.seq_len))
    values = model.v_head_dim if model.kv_lora_rank else model.head_dim
    forward, backward = (
        attention_s(device, share.tokens, keys, heads, model.head_dim, values, back) / practice.flash
        for back in (False, True)
    )
    return forward, backward


def _traffic(model: ModelConfig, mixture: bool, share: Share) -> float:
    """Bytes of a forward's norms, residuals, rotations and activations."""
    m, item = model, share.device.item
    outside = (10 + 4 * (m.norm_placement == "both") + 3 * (m.dropout > 0)) * m.hidden_size
    rotated = 2 * (m.num_heads + m.num_kv_heads) * m.head_dim / share.tp if m.position == "rope" else 0.0
    per = 3 if m.activation in GATED else 2
    if not mixture:
        wide = share.tokens * per * m.ffn_hidden_size / share.tp
    else:
        wide = share.routed * m.top_k * (per * m.moe_ffn_hidden_size / share.etp + 8 * m.hidden_size)
        wide += share.tokens * per * m.shared_ffn_hidden_size / share.tp
    return item * (share.outside * outside + share.tokens * rotated + wide)


def _collectives(model: ModelConfig, mixture: bool, share: Share) -> tuple[float, float, float]:
    """(tp, cp, ep) of a forward; backward has as many over tp and ep, and twice the ring."""
    machine, item, h = share.device.machine, share.device.item, model.hidden_size
    kind = "all_gather" if share.sequence else "all_reduce"
    size = share.tokens * h * item
    one = collective_s(machine, kind, size, share.tp)
    one += collective_s(machine, "reduce_scatter", size, share.tp) if share.sequence else 0.0
    halves = 2 if not mixture or share.etp > 1 or model.num_shared_experts else 1
    ring = 0.0
    if share.cp > 1:
        kv = 2 * share.tokens * max(1.0, model.num_kv_heads / share.tp) * model.head_dim * item
        ring = collective_s(machine, "all_gather", kv * share.cp, share.cp, share.tp)
    there = share.routed * model.top_k * h * item if mixture else 0.0
    expert = 2 * collective_s(machine, "all_to_all", there, share.ep, share.etp)
    return halves * one, ring, expert


@lru_cache(maxsize=1 << 12)
def ends_work(model: ModelConfig, share: Share) -> tuple[Work, Work]:
    """Of the embedding, and of the head with its loss."""
    device, machine, item, h = share.device, share.device.machine, share.device.item, model.hidden_size
    plain = Device(machine, device.dtype, False, item)
    size = share.tokens * h * item
    summed = collective_s(machine, "reduce_scatter" if share.sequence else "all_reduce", size, share.tp)
    looked = Parts(memory=moved_s(plain, 3 * size), tp=summed)
    embedding = Work(looked, Parts(tp=summed if share.sequence else 0.0), Parts(memory=moved_s(plain, 3 * size)))
    forward, back, weight = _product(plain, share.tokens, model.vocab_size / share.tp, h, 1)
    logits = share.tokens * model.vocab_size / share.tp
    loss = moved_s(plain, share.practice.loss_bytes * logits) / 2 * share.practice.traffic
    head = Work(
        Parts(products=forward, memory=loss, tp=summed if share.sequence else 0.0),
        Parts(products=back, memory=loss, tp=summed),
        Parts(products=weight),
    )
    return embedding, head
