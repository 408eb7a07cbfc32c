"""How long one device computes: products of matrices, attention, and what memory bounds.

A product [m, k] x [k, n] is cut into tiles that the device's multiprocessors share. It takes whole tiles' waves: with
w = m n / (tile x units) waves, a share `TAIL` of one more is idle at the end, and a tile spends `RAMP` elements of k to
fill and to drain:

    seconds = 2 m n k / (peak x reached) x (1 + TAIL / w) x (1 + RAMP / k)

but no less than its operands take through memory. Attention is fused (FlashAttention, Dao 2022): its share of the peak
grows with the width of a head and the length of the sequence; or explicit: two batched products over the whole square
and passes over the scores. In FP8 the products are faster, and their inputs are quantised first by passes of memory.
"""

from dataclasses import dataclass
from functools import cached_property, lru_cache

from megacore.cost.machine import Machine

TILE = 128 * 256
TAIL = 0.2
RAMP = 120.0
HEAD_HALF = 24.0
"""Width of a head at which fused attention reaches half of what it can."""
SEQ_HALF = 350.0
"""Likewise the length of a sequence."""
BACKWARD_ATTENTION = 0.85
"""Speed of attention's backward to its forward's."""
QUANTISE_BYTES = 4.5
"""What quantising one element for a product in FP8 moves: its largest one is found, it is read, written, transposed."""


@dataclass(frozen=True)
class Device:
    """One device with the format that it multiplies in; ``item`` is bytes of an element."""

    machine: Machine
    dtype: str
    fp8: bool = False
    item: int = 2

    @cached_property
    def _hash(self) -> int:
        return hash((self.machine.name, self.dtype, self.fp8, self.machine.reached))

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def rate(self) -> float:
        """FLOP/s of large products."""
        of, reached = self.machine.accelerator, self.machine.reached
        if self.fp8 and of.fp8:
            return of.fp8 * 1e12 * reached.fp8
        return (of.peak_tflops(self.dtype) or of.bf16) * 1e12 * reached.gemm

    @cached_property
    def memory(self) -> float:
        """Bytes/s."""
        return self.machine.accelerator.memory_gb_per_s * 1e9 * self.machine.reached.memory


def gemm_s(device: Device, m: float, n: float, k: float, batch: float = 1.0, out_bytes: float = 0.0) -> float:
    """Seconds of ``batch`` products [m, k] x [k, n]; ``out_bytes`` of a result, if not as the inputs'."""
    if min(m, n, k) <= 0:
        return 0.0
    waves = batch * m * n / TILE / device.machine.reached.units
    compute = 2 * batch * m * n * k / device.rate * (1 + TAIL / waves) * (1 + RAMP / k)
    item = 1 if device.fp8 else device.item
    moved = batch * ((m * k + k * n) * item + m * n * (out_bytes or device.item)) / device.memory
    quantised = QUANTISE_BYTES * (m * k) * batch / device.memory if device.fp8 else 0.0
    return max(compute, moved) + quantised


@lru_cache(maxsize=1 << 14)
def attention_s(
    device: Device, queries: float, keys: float, heads: float, dim: float, of_values: float, backward: bool = False
) -> float:
    """Seconds of fused attention of ``queries`` tokens, each seeing ``keys`` tokens on average."""
    peak = (device.machine.accelerator.peak_tflops(device.dtype) or 1.0) * 1e12
    width = dim / (dim + HEAD_HALF)
    length = keys / (keys + SEQ_HALF / 2)
    rate = peak * device.machine.reached.attention * width * length
    flops = 2.0 * queries * keys * heads * (dim + of_values)
    return 2.5 * flops / rate / BACKWARD_ATTENTION if backward else flops / rate


def explicit_attention_s(
    device: Device, samples: float, seq_len: float, heads: float, dim: float, passes: float, backward: bool = False
) -> float:
    """Seconds of attention by products and passes over all scores; ``passes`` are a score's bytes that a forward
    moves."""
    number = samples * heads
    plain = Device(device.machine, device.dtype, False, device.item)
    products = gemm_s(plain, seq_len, seq_len, dim, number) + gemm_s(plain, seq_len, dim, seq_len, number)
    moved = passes * number * seq_len * seq_len / device.memory
    return (2 * products if backward else products) + moved


def moved_s(device: Device, num_bytes: float) -> float:
    """Seconds of an operation that memory bounds."""
    return num_bytes / device.memory
