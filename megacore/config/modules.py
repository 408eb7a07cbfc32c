"""What transformer-engine's linear layers ask of a run: ``kernels.use=linear=transformer-engine``."""

from collections.abc import Iterator

from megacore.config.fp8 import MULTIPLE, TRANSFORMER_ENGINE
from megacore.config.kernels import wanted
from megacore.config.schema import RunConfig


def uses_modules(config: RunConfig) -> bool:
    """Whether the blocks' linear layers are transformer-engine's."""
    return wanted(config.kernels.use).get("linear") == TRANSFORMER_ENGINE


def module_problems(config: RunConfig) -> Iterator[str]:
    """Lines about settings that those layers do not go with."""
    if not uses_modules(config):
        return
    what = f"kernels.use=linear={TRANSFORMER_ENGINE}"
    p, fp8, t = config.parallel, config.precision.fp8, config.train
    if p.recompute not in ("none", "selective"):
        yield (
            f"parallel.recompute={p.recompute} makes whole blocks again, or moves what they save, and {what} has "
            "layers that save what we do not know; use none or selective, or another linear"
        )
    if config.precision.dtype == "fp64":
        yield f"precision.dtype=fp64 with {what}, which multiplies 16 and 32 bits; use bf16, or another linear"
    if fp8 == "off":
        return
    if p.zero == 3:
        yield (
            f"parallel.zero=3 with precision.fp8={fp8} and {what}: its layers keep whole weights in FP8 from forward "
            "to backward, which ZeRO-3 is there to avoid; use zero=2, or another linear"
        )
    if p.zero == 2 and fp8 == "delayed":
        yield (
            f"parallel.zero=2 with precision.fp8=delayed and {what}: it makes all scales anew after every part of the "
            "model that is walked by itself; use zero=1, fp8=current, or another linear"
        )
    tokens = t.micro_batch_size * t.seq_len // p.tp
    if p.sequence_parallel and tokens % MULTIPLE:
        yield (
            f"train.micro_batch_size*seq_len/parallel.tp={tokens} tokens of a rank with "
            f"parallel.sequence_parallel=true, and {what} in FP8 wants a multiple of {MULTIPLE}; change train.seq_len, "
            "or use fp8=off"
        )
