"""Bytes that one block keeps of a microbatch between its forward and its backward.

In elements per token, with h hidden, n query and m key/value heads of d dims, f ffn, s tokens per sample; what lies
inside the matrices (n, m, f) is divided by tp, what lies outside them by tp under sequence parallelism alone.

| kept                                         | none                        | selective  | full |
|----------------------------------------------|-----------------------------|------------|------|
| the block's input                            | h                           | h          | h    |
| attention_norm: 1 / rms (or mean and 1 / std)| 1 (2)                       | 1 (2)      | -    |
| qkv's input (1)                              | h                           | h          | -    |
| qkv's output, of which v is a view           | (n + 2m) d                  | (n + 2m) d | -    |
| norms of heads, if any: input and 1 / rms    | (n + m)(d + 1)              | -          | -    |
| norms over all heads, if any, instead (3)    | 2                           | -          | -    |
| q, k as rotated or normed, if they are       | (n + m) d                   | -          | -    |
| attention: log of the sums of exp            | n                           | -          | -    |
| attention dropout, if any, instead (2)       | 3 n s + 3 n d               | -          | -    |
| soft cap of scores, if any, instead (2)      | 2 n s + 3 n d               | -          | -    |
| out's input                                  | n d                         | n d        | -    |
| dropout's mask, if any                       | h                           | h          | -    |
| mlp_norm: its input, and as above            | h + 1 (2)                   | h + 1 (2)  | -    |
| gate_up's (up's) input (1)                   | h                           | h          | -    |
| its output: swiglu; geglu; gelu, relu2       | 2f; 3f; f                   | the same   | -    |
| down's input                                 | f                           | f          | -    |
| dropout's mask, if any                       | h                           | h          | -    |

(1) Whole on every rank, gathered, unless ``regather_inputs`` keeps the shard. (2) Masks of our own need the explicit
path: probabilities, mask and their product, and q, k, v laid out by head (k and v copied for each query head) in place
of qkv's output and the rotated q, k; and, unless documents, a window or ALiBi bring a mask, one of s^2 bytes. So do
soft caps, with the bounded scores in place of mask and product, and beside them where there is dropout. In 16-bit runs
probabilities, all masks and bounded scores have 32 bits, and the probabilities are there in 16 bits, too. (3) Their
input is a part of qkv's output, which stays for it also where (2) would let it go.

This is the block with norms before its halves. With norms after them, their inputs are what the halves give and the
matrices' inputs the residual stream: as many numbers. With both, two more norms keep their inputs and statistics. With
a parallel residual the halves have one input, so that what both keep of it is there once.

With `offload` all of it waits in host memory but tensors below 4 KiB; where units are walked one at a time (ZeRO stages
2 and 3) the block's input is here, too. What is sent are tensors as they were saved, so that it differs from `none`'s
bytes: of qkv's output only v, which is a view of it, but attention's output (and relu2's inner one, and all else that
two operations keep) twice.

Korthikanti et al. 2022, equations 1, 2 and 4 (s b h (34 + 5 a s / h) bytes for GPT in 16 bits) count another block:
attention explicit (5 a s / h, which the fused kernel replaces by one number per row and head), masks of one byte (ours
have 32 bits), dropout always, f = 4h. Ours adds what they leave out: the norms' statistics, and qkv's output
beside the rotated q and k.
"""

from dataclasses import dataclass

from megacore.config.resolve import GATED, window_of
from megacore.config.schema import ModelConfig
from megacore.spec.model import is_mixture

STATISTIC_BYTES = 4
"""Logarithms of sums and a layer norm's statistics are at least single precision."""

MASK_BYTES = 36
"""What making the mask of one element takes for a moment."""


def activation_bytes(
    model: ModelConfig,
    seq_len: int,
    micro_batch_size: int,
    tp: int = 1,
    sequence_parallel: bool = False,
    recompute: str = "none",
    dtype_bytes: int = 2,
    regather_inputs: bool = False,
    by_unit: bool = False,
    layer: int = 0,
    cp: int = 1,
    etp: int = 1,
) -> int:
    """Bytes on one of ``tp`` ranks of one microbatch, in block ``layer`` of a resolved model; see the table above.

    While a block goes through backward, what recompute made again, or offload brings back, is there too: `none`'s
    bytes, once (with offload those of the block that comes next as well). ``by_unit``: whether stages are walked unit
    by unit. What is offloaded is in host memory (``host_activation_bytes``): on the CPU, in the same one.
    """
    cut = (tp, sequence_parallel, regather_inputs, dtype_bytes, layer, cp, etp)
    block = _Block(model, seq_len, micro_batch_size, *cut)
    if recompute == "full" or (recompute == "offload" and by_unit):
        return block.num_outside * model.hidden_size * dtype_bytes
    if recompute == "offload":
        return 0
    core = block.core_input() if recompute == "selective" else block.core()
    return block.around() + core


def host_activation_bytes(
    model: ModelConfig,
    seq_len: int,
    micro_batch_size: int,
    tp: int = 1,
    sequence_parallel: bool = False,
    dtype_bytes: int = 2,
    regather_inputs: bool = False,
    layer: int = 0,
    cp: int = 1,
    etp: int = 1,
) -> int:
    """As ``activation_bytes``: what one block of one microbatch sends to host memory with recompute=offload."""
    cut = (tp, sequence_parallel, regather_inputs, dtype_bytes, layer, cp, etp)
    block = _Block(model, seq_len, micro_batch_size, *cut)
    return block.around() + block.sent_core() + block.sent_twice()


def late_bytes(
    model: ModelConfig,
    seq_len: int,
    micro_batch_size: int,
    tp: int = 1,
    dtype_bytes: int = 2,
    layer: int = 0,
    cp: int = 1,
    etp: int = 1,
) -> int:
    """What one block keeps of a microbatch, instead of all else, once its weight gradients alone are outstanding (I has
    run, W has not): input and gradient of the output of each matrix, whole on every rank."""
    block = _Block(model, seq_len, micro_batch_size, tp, True, False, dtype_bytes, layer, cp, etp)
    return block.late()


def working_bytes(
    model: ModelConfig,
    seq_len: int,
    micro_batch_size: int,
    tp: int = 1,
    sequence_parallel: bool = False,
    recompute: str = "none",
    dtype_bytes: int = 2,
    layer: int = 0,
    cp: int = 1,
    etp: int = 1,
) -> int:
    """The most that one block takes beyond what waits for its backward, while it goes through it: gradients of
    activations less what is done with, and what is made again.

    The worst moment is one of three: the MLP's non-linearity has given the gradient of its input; the scores that the
    explicit path makes have theirs (and what belongs to the MLP is gone); dropout's mask is made of 64-bit counters.
    """
    block = _Block(model, seq_len, micro_batch_size, tp, sequence_parallel, False, dtype_bytes, layer, cp, etp)
    kept = activation_bytes(
        model, seq_len, micro_batch_size, tp, sequence_parallel, recompute, dtype_bytes, False, False, layer, cp, etp
    )
    remade = block.around() + block.core() - kept
    of_mlp = block.mlp_working() + (0 if recompute == "selective" else remade)
    of_core = remade + block.core_working()
    of_mask = (0 if recompute == "selective" else remade) + block.mask_working()
    return max(of_mlp, of_core, of_mask)


@dataclass(frozen=True)
class _Block:
    """One block's sizes on one rank."""

    model: ModelConfig
    seq_len: int
    micro_batch_size: int
    tp: int
    sequence_parallel: bool
    regather_inputs: bool
    dtype_bytes: int
    layer: int = 0
    cp: int = 1
    etp: int = 1

    @property
    def num_tokens(self) -> int:
        return self.seq_len * self.micro_batch_size // self.cp

    @property
    def num_outside(self) -> int:
        """Tokens that a rank holds outside the matrices."""
        return self.num_tokens // self.tp if self.sequence_parallel else self.num_tokens

    @property
    def heads(self) -> tuple[int, int, int]:
        """Query heads, key/value heads and their dims."""
        m = self.model
        return m.num_heads // self.tp, max(1, m.num_kv_heads // self.tp), m.head_dim

    @property
    def statistic_bytes(self) -> int:
        return max(self.dtype_bytes, STATISTIC_BYTES)

    def around(self) -> int:
        """Everything but the core of attention."""
        m, size = self.model, self.dtype_bytes
        statistics = self.statistic_bytes * (2 if m.norm == "layernorm" else 1)
        masks = 2 if m.dropout else 0
        num_norms = 4 if m.norm_placement == "both" else 2
        of_masks = masks * m.hidden_size * self.statistic_bytes
        outside = self.num_outside * (num_norms * (m.hidden_size * size + statistics) + of_masks)
        inputs = m.hidden_size * (self.num_outside if self.regather_inputs else self.num_tokens)
        mixed = self.num_tokens * self.heads[0] * (m.v_head_dim if m.kv_lora_rank else m.head_dim)
        fed = self.mixture() if is_mixture(m, self.layer) else inputs * size + self.widened(m.ffn_hidden_size, self.tp)
        return outside + (inputs + mixed) * size + fed - self.shared_input()

    def widened(self, width: int, num: int) -> int:
        """Outputs of the wide matrix of an MLP over ``num`` ranks, and inputs of the narrow one."""
        f = width // num
        kept = {"swiglu": 2 * f, "geglu": 3 * f}.get(self.model.activation, f)
        return self.num_tokens * (kept + f) * self.dtype_bytes

    def mixture(self) -> int:
        """A router and its experts, to which tokens go evenly: each of them is once in the model's ranks, whatever tp;
        the experts' inputs are copies, one for each expert that a token is sent to."""
        m, size, own = self.model, self.dtype_bytes, self.num_tokens // self.tp
        routed = own * (m.hidden_size * size + m.num_experts * STATISTIC_BYTES)
        sent = own * m.top_k * (self.etp * m.hidden_size * size + STATISTIC_BYTES)
        inside = self.widened(m.moe_ffn_hidden_size, 1) * m.top_k // self.tp
        shared = 0
        if m.num_shared_experts:
            gathered = self.num_tokens if self.tp > 1 else 0  # else it is the router's
            shared = gathered * m.hidden_size * size + self.widened(m.shared_ffn_hidden_size, self.tp)
        return routed + sent + inside + shared

    def mlp_working(self) -> int:
        """Gradients of what the non-linearity took, and of a token."""
        m = self.model
        wide = 2 if m.activation in GATED else 1
        gathered = m.hidden_size * (self.num_tokens if self.tp > 1 else self.num_outside)
        if not is_mixture(m, self.layer):
            return (self.num_tokens * wide * (m.ffn_hidden_size // self.tp) + gathered) * self.dtype_bytes
        sent = self.num_tokens // self.tp * m.top_k
        inside = wide * m.moe_ffn_hidden_size + self.etp * m.hidden_size
        return (sent * inside + gathered) * self.dtype_bytes

    def core_working(self) -> int:
        """Gradients of scores, of as many bits as these, less what the MLP has let go."""
        if not self.explicit:
            return 0
        m, (n, kv, d) = self.model, self.heads
        gone = 3 * (m.ffn_hidden_size // self.tp) + 2 * m.hidden_size + 2 * n * d - 3 * kv * d
        scores = 5 * self.num_tokens * n * self.seq_len * self.statistic_bytes
        return scores - self.num_tokens * gone * self.dtype_bytes

    def mask_working(self) -> int:
        """Of each element, counters and their products, and what was dropped."""
        return MASK_BYTES * self.num_outside * self.model.hidden_size if self.model.dropout else 0

    def late(self) -> int:
        """Inputs of all matrices, and gradients of their outputs."""
        m, (n, kv, d), t = self.model, self.heads, self.num_tokens
        wide = 2 if m.activation in GATED else 1
        h, of_mlp = m.hidden_size, lambda width: 2 * h + (wide + 1) * width
        attention = 2 * h + (2 * n + 2 * kv) * d
        if m.kv_lora_rank:
            q = m.q_lora_rank or h
            made = n * d + n * (m.qk_nope_head_dim + m.v_head_dim)
            attention = 2 * h + 2 * q + 2 * m.kv_lora_rank + m.qk_rope_head_dim + made + n * m.v_head_dim
        if not is_mixture(m, self.layer):
            return t * (attention + of_mlp(m.ffn_hidden_size // self.tp)) * self.dtype_bytes
        experts = m.top_k * self.etp * of_mlp(m.moe_ffn_hidden_size // self.etp) // self.tp
        shared = of_mlp(m.shared_ffn_hidden_size // self.tp) if m.num_shared_experts else 0
        return t * (attention + experts + shared + (h + m.num_experts) // self.tp) * self.dtype_bytes

    def shared_input(self) -> int:
        """What both halves keep of the one input that a parallel residual gives them; they gather it each."""
        gathered = self.sequence_parallel and not self.regather_inputs and self.model.norm_placement == "post"
        shared = self.model.parallel_residual and not gathered
        return self.num_outside * self.model.hidden_size * self.dtype_bytes if shared else 0

    def core_input(self) -> int:
        """The projected queries, keys and values; of latent attention also what they were made of, and its norms."""
        n, m, d = self.heads
        model = self.model
        if model.kv_lora_rank:
            latents = 2 * (model.q_lora_rank + model.kv_lora_rank) + model.qk_rope_head_dim
            heads = n * (d + model.qk_nope_head_dim + model.v_head_dim)
            return self.num_tokens * (latents + heads) * self.dtype_bytes
        return self.num_tokens * (n + 2 * m) * d * self.dtype_bytes

    def core(self) -> int:
        """What lies between the projections, keys and values included."""
        model, (n, m, d), size = self.model, self.heads, self.dtype_bytes
        moved = model.qk_norm or model.position == "rope"
        across = model.qk_norm and model.qk_norm_over == "all"
        normed = self.num_tokens * 2 * self.statistic_bytes if across else self.normed()
        if not self.explicit:
            turned = self.num_tokens * (n + m) * d * size if moved else 0
            return normed + self.core_input() + turned + self.num_tokens * n * self.statistic_bytes
        # batched products copy q by head; of a single sample they take it as it lies, with what lies beside it
        queries = n if self.micro_batch_size > 1 else n + m if moved else n + 2 * m
        kept = self.core_input() if across else 0
        copies = self.num_tokens * (queries + 2 * n) * d * size
        return normed + kept + copies + self.scores(self.probabilities_bytes) + self.causal_bytes

    @property
    def explicit(self) -> bool:
        """Whether attention's scores are made one by one."""
        return bool(self.model.attention_dropout or self.model.attention_softcap)

    @property
    def probabilities_bytes(self) -> int:
        """What the product with the values keeps of one probability that is not kept anyhow."""
        return self.dtype_bytes if self.model.attention_dropout or self.dtype_bytes < STATISTIC_BYTES else 0

    def scores(self, of_product: int) -> int:
        """What the explicit path keeps of all scores, with ``of_product`` bytes of each for the product."""
        wide = 1 + bool(self.model.attention_softcap) + bool(self.model.attention_dropout)
        return self.num_tokens * self.heads[0] * self.seq_len * (wide * self.statistic_bytes + of_product)

    def sent_core(self) -> int:
        """The core's tensors one by one, not what they are views of."""
        n, m, d = self.heads
        size, normed = self.dtype_bytes, self.normed()
        if self.explicit:
            return normed + self.num_tokens * 3 * n * d * size + self.scores(size) + self.causal_bytes
        return normed + self.num_tokens * ((n + 2 * m + n) * d * size + n * self.statistic_bytes)

    def sent_twice(self) -> int:
        """What two operations save each for itself, one of them counted elsewhere."""
        twice = self.model.ffn_hidden_size // self.tp if self.model.activation == "relu2" else 0
        return self.num_tokens * twice * self.dtype_bytes + self.shared_input()

    def normed(self) -> int:
        """Inputs and statistics of norms of heads."""
        if not self.model.qk_norm:
            return 0
        n, m, d = self.heads
        num_norms = 2 if self.model.qk_norm_over == "all" else n + m
        return self.num_tokens * ((n + m) * d * self.dtype_bytes + num_norms * self.statistic_bytes)

    @property
    def causal_bytes(self) -> int:
        """The mask that the explicit path makes where there is no other."""
        masked = self.model.position == "alibi" or 0 < window_of(self.model, self.layer) < self.seq_len
        return 0 if masked else self.seq_len**2
