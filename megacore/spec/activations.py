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
| q, k as rotated or normed, if they are       | (n + m) d                   | -          | -    |
| attention: log of the sums of exp            | n                           | -          | -    |
| attention dropout, if any, instead (2)       | 3 n s + 3 n d               | -          | -    |
| out's input                                  | n d                         | n d        | -    |
| dropout's mask, if any                       | h                           | h          | -    |
| mlp_norm: its input, and as above            | h + 1 (2)                   | h + 1 (2)  | -    |
| gate_up's (up's) input (1)                   | h                           | h          | -    |
| its output: swiglu; geglu; gelu, relu2       | 2f; 3f; f                   | the same   | -    |
| down's input                                 | f                           | f          | -    |
| dropout's mask, if any                       | h                           | h          | -    |

(1) Whole on every rank, gathered, unless ``regather_inputs`` keeps the shard. (2) Masks of our own need the explicit
path: probabilities, mask and their product, and q, k, v laid out by head (k and v copied for each query head) in place
of qkv's output and the rotated q, k; and, unless documents, a window or ALiBi bring a mask, one of s^2 bytes.

With `offload` all of it waits in host memory but tensors below 4 KiB; where units are walked one at a time (ZeRO stages
2 and 3) the block's input is here, too. What is sent are tensors as they were saved, so that it differs from `none`'s
bytes: of qkv's output only v, which is a view of it, but attention's output (and relu2's inner one) twice.

Korthikanti et al. 2022, equations 1, 2 and 4 (s b h (34 + 5 a s / h) bytes for GPT in 16 bits) count another block:
attention explicit (5 a s / h, which the fused kernel replaces by one number per row and head), masks of one byte (ours
have the dtype of x), dropout always, f = 4h. Ours adds what they leave out: the norms' statistics, and qkv's output
beside the rotated q and k.
"""

from dataclasses import dataclass

from megacore.config.schema import ModelConfig

STATISTIC_BYTES = 4
"""Logarithms of sums and a layer norm's statistics are at least single precision."""


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
) -> int:
    """Bytes on one of ``tp`` ranks of one microbatch, in one block of a resolved model; see the table above.

    While a block goes through backward, what recompute made again, or offload brings back, is there too: `none`'s
    bytes, once (with offload those of the block that comes next as well). ``by_unit``: whether stages are walked unit
    by unit. What is offloaded is in host memory (``host_activation_bytes``): on the CPU, in the same one.
    """
    block = _Block(model, seq_len, micro_batch_size, tp, sequence_parallel, regather_inputs, dtype_bytes)
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
) -> int:
    """As ``activation_bytes``: what one block of one microbatch sends to host memory with recompute=offload."""
    block = _Block(model, seq_len, micro_batch_size, tp, sequence_parallel, regather_inputs, dtype_bytes)
    return block.around() + block.sent_core() + block.sent_twice()


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

    @property
    def num_tokens(self) -> int:
        return self.seq_len * self.micro_batch_size

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
        n, _, d = self.heads
        f = m.ffn_hidden_size // self.tp
        widened = {"swiglu": 2 * f, "geglu": 3 * f}.get(m.activation, f)
        statistics = 2 * self.statistic_bytes if m.norm == "layernorm" else size
        masks = 2 if m.dropout else 0
        outside = self.num_outside * ((2 + masks) * m.hidden_size * size + 2 * statistics)
        inputs = 2 * m.hidden_size * (self.num_outside if self.regather_inputs else self.num_tokens)
        return outside + (inputs + self.num_tokens * (n * d + widened + f)) * size

    def core_input(self) -> int:
        """The projected queries, keys and values."""
        n, m, d = self.heads
        return self.num_tokens * (n + 2 * m) * d * self.dtype_bytes

    def core(self) -> int:
        """What lies between the projections, keys and values included."""
        model, (n, m, d), size = self.model, self.heads, self.dtype_bytes
        moved = model.qk_norm or model.position == "rope"
        normed = self.normed()
        if not model.attention_dropout:
            turned = self.num_tokens * (n + m) * d * size if moved else 0
            return normed + self.core_input() + turned + self.num_tokens * n * self.statistic_bytes
        # batched products copy q by head; of a single sample they take it as it lies, with what lies beside it
        queries = n if self.micro_batch_size > 1 else n + m if moved else n + 2 * m
        per_token = 3 * n * self.seq_len + (queries + 2 * n) * d
        return normed + self.num_tokens * per_token * size + self.causal_bytes

    def sent_core(self) -> int:
        """The core's tensors one by one, not what they are views of."""
        n, m, d = self.heads
        size, normed = self.dtype_bytes, self.normed()
        if self.model.attention_dropout:
            return normed + self.num_tokens * (3 * n * self.seq_len + 3 * n * d) * size + self.causal_bytes
        return normed + self.num_tokens * ((n + 2 * m + n) * d * size + n * self.statistic_bytes)

    def sent_twice(self) -> int:
        """What two operations save each for itself, one of them counted elsewhere."""
        twice = self.model.ffn_hidden_size // self.tp if self.model.activation == "relu2" else 0
        return self.num_tokens * twice * self.dtype_bytes

    def normed(self) -> int:
        """Inputs and statistics of norms of heads."""
        n, m, d = self.heads
        return self.num_tokens * (n + m) * (d + 1) * self.dtype_bytes if self.model.qk_norm else 0

    @property
    def causal_bytes(self) -> int:
        """The mask that the explicit path makes where there is no other."""
        m = self.model
        return 0 if m.position == "alibi" or 0 < m.sliding_window < self.seq_len else self.seq_len**2
