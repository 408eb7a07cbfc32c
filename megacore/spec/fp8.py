"""Which layers multiply in FP8, and the memory that takes."""

from collections import Counter
from collections.abc import Iterable

from megacore.config.schema import PrecisionConfig
from megacore.spec.model import ModelSpec
from megacore.spec.params import ParamSpec

COPIES = 2
"""Of a weight in FP8: as it is for forward, transposed for backward."""

ROLES = 3
"""Tensors of a layer whose largest elements are remembered: input, weight, gradient."""


def fp8_layers(spec: ModelSpec, precision: PrecisionConfig) -> tuple[str, ...]:
    """The layers by their global names, in order: the matrices of blocks, without those that are skipped. Embedding
    and head, which are the most sensitive ones, stay in the format of training, and so do norms."""
    if precision.fp8 == "off":
        return ()
    blocks = spec.blocks[precision.fp8_skip_first : len(spec.blocks) - precision.fp8_skip_last]
    matrices = (param for block in blocks for param in block.params if param.is_matmul)
    return tuple(param.name.removesuffix(".weight") for param in matrices)


def fp8_weight_bytes(
    layers: Iterable[str], params: Iterable[ParamSpec], tp_rank: int = 0, tp: int = 1, by_unit: bool = False
) -> int:
    """Codes of the weights among ``params`` that member ``tp_rank`` of ``tp`` keeps from a step's first microbatch to
    its end; those of the largest block if only one at a time is there (``by_unit``: ZeRO-3). Scales are left out:
    4 bytes, or 8 per 128 x 128."""
    names = {f"{layer}.weight" for layer in layers}
    of_blocks: Counter[str] = Counter()
    for param in params:
        if param.name in names:
            of_blocks[".".join(param.name.split(".")[:2])] += COPIES * param.local_numel(tp_rank, tp)
    return max(of_blocks.values(), default=0) if by_unit else of_blocks.total()


def fp8_history_bytes(num_layers: int, precision: PrecisionConfig) -> int:
    """What every rank remembers of all layers that multiply in FP8."""
    return 4 * ROLES * precision.fp8_history * num_layers if precision.fp8 == "delayed" else 0
