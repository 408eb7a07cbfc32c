"""Which global batches can be dealt out: the one statement of the rule, for a run file and for a batch plan."""

from collections.abc import Iterator, Sequence

from megacore.config.near import multiples


def batch_problems(global_size: int, micro_size: int, ramp: Sequence[int], dp: int) -> Iterator[str]:
    """What keeps every size that the batch passes from being dealt out in whole microbatches, one line each.

    Args:
        global_size: samples per step, after the ramp; positive.
        micro_size: samples that a rank computes at once; positive.
        ramp: [start, increment, samples] as train.batch_ramp; empty: none.
        dp: replicas that share a batch.
    """
    unit = micro_size * dp
    at_once = f"train.micro_batch_size*dp={micro_size}*{dp}={unit}"
    if global_size % unit:
        near = multiples(unit, global_size)
        yield f"train.global_batch_size={global_size} is not a multiple of {at_once}; use {near}"
    if not ramp:
        return
    what = f"train.batch_ramp={list(ramp)}"
    if len(ramp) != 3 or min(ramp) < 1:
        yield f"{what} must be three positive numbers [start, increment, samples], such as [32, 32, 10000]"
        return
    start, increment, _ = ramp
    for name, size in (("a start", start), ("an increment", increment)):
        if size % unit:
            yield f"{what} has {name} of {size}, not a multiple of {at_once}; use {multiples(unit, size)}"
    if start > global_size or (global_size - start) % increment:
        yield (
            f"{what} does not lead to train.global_batch_size={global_size} in whole increments; "
            f"the size must be {start} + n*{increment}"
        )
