"""Time and money of a whole run, with the failures that a large one meets.

A machine of n devices fails every M = (hours between failures of one device) / n. What was computed since the last save
is then lost, and the run starts again. Saving more often loses less and stalls more: Young (1974) found the interval
sqrt(2 d M) for a stall d, Daly (2006, equations 20 and 37) its higher orders and the expected time.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from megacore.cost.estimate import Estimate
from megacore.spec.memory import ITEM_BYTES

MTBF_HOURS = 54 * 24 * 16384 / 466
"""Hours between failures of one device with its share of all else: 466 interruptions of Llama 3's training on 16,384
H100s in 54 days (Grattafiori et al. 2024, section 3.3.4)."""
RESTART_S = 600.0
"""From a failure to the first new step: noticing it, new processes, reading the checkpoint."""
COPY_GB_PER_S = 20.0
"""Of one device to its host over PCIe: what an asynchronous save stalls for."""
WRITE_GB_PER_S = 0.25
"""Of one device's share to storage: what a save stalls for otherwise (2 GB/s a node of 8)."""
DAY = 86400.0


@dataclass(frozen=True)
class Failures:
    """Seconds, but for ``interval_steps``; ``goodput`` is the share of time that makes progress that stays."""

    mtbf_s: float
    save_s: float
    restart_s: float
    interval_s: float
    interval_steps: int
    goodput: float


@dataclass(frozen=True)
class Bill:
    """Of ``tokens``, failures included."""

    tokens: float
    steps: int
    days: float
    gpu_hours: float
    price_per_gpu_hour: float
    cost: float


def failures(found: Estimate, mtbf_hours: float = MTBF_HOURS, save_s: float = 0.0, restart_s: float = 0.0) -> Failures:
    """What failures cost a layout; a 0 is estimated or the default. Raises ValueError for what is below 0."""
    for name, value in (("mtbf-hours", mtbf_hours), ("save-seconds", save_s), ("restart-seconds", restart_s)):
        if value < 0 or math.isnan(value):
            raise ValueError(f"--{name}={value:g} must not be negative; leave it out for the default")
    mtbf = (mtbf_hours or MTBF_HOURS) * 3600 / found.layout.world
    stall, restart = save_s or saving_time(found), restart_s or RESTART_S
    step = found.step.seconds
    steps = max(1, round(interval(stall, mtbf) / step))
    return Failures(mtbf, stall, restart, steps * step, steps, goodput(steps * step, stall, restart, mtbf))


def saving_time(found: Estimate) -> float:
    """Seconds that a save stalls the run: every device's share of weights and optimizer state is copied or written.

    Replicas share the work; master weights are part of the optimizer's state.
    """
    layout, masters = found.layout, ITEM_BYTES[found.config.precision.dtype] == 2
    worst = max(rank.optimizer + rank.host + (0 if masters else rank.params) for rank in found.memory)
    replicas = layout.dp_replicate if layout.zero else layout.dp
    rate = COPY_GB_PER_S if found.config.checkpoint.async_save else WRITE_GB_PER_S
    return worst / replicas / rate / 1e9


def interval(stall: float, mtbf: float) -> float:
    """Seconds of work between saves that lose least (Daly 2006, equation 37)."""
    if stall >= 2 * mtbf:
        return mtbf
    x = stall / (2 * mtbf)
    return max(stall, math.sqrt(2 * stall * mtbf) * (1 + math.sqrt(x) / 3 + x / 9) - stall)


def goodput(work: float, stall: float, restart: float, mtbf: float) -> float:
    """The share of time that is lasting work, saving every ``work`` seconds (Daly 2006, equation 20)."""
    try:
        whole = mtbf * math.exp(restart / mtbf) * math.expm1((work + stall) / mtbf)
    except OverflowError:
        return 0.0
    return work / whole


def bill(found: Estimate, tokens: float, price: float, lasting: Failures) -> Bill:
    """Time and money for ``tokens``. Raises ValueError where there is nothing to pay for."""
    if not 0 < tokens < math.inf:
        raise ValueError(f"--tokens={tokens:g} must be more than 0, such as 1e12 or 15T")
    if not 0 <= price < math.inf:
        raise ValueError(f"--price={price:g} must be 0 or more: what a device costs an hour")
    seconds = tokens / found.tokens_per_s / lasting.goodput if lasting.goodput else math.inf
    hours = seconds / 3600 * found.layout.world
    return Bill(tokens, math.ceil(tokens / found.tokens), seconds / DAY, hours, price, hours * price)


def gpus_for(
    days: float, tokens: float, unit: int, most: int, days_of: Callable[[int], float]
) -> tuple[int, dict[int, float]]:
    """The fewest devices, in multiples of ``unit`` up to ``most``, that are done within ``days``; 0: none.

    ``days_of`` plans for a number of devices. More devices are tried by doubling, then the gap is halved (fewer devices
    are taken to be slower, which holds but for what cannot be dealt out evenly). Also returns what was tried.
    """
    if not 0 < days < math.inf:
        raise ValueError(f"--deadline={days:g} must be more than 0 days")
    tried: dict[int, float] = {}

    def late(number: int) -> bool:
        tried[number] = days_of(number)
        return tried[number] > days

    low, high = 0, unit
    while late(high):
        low, high = high, 2 * high
        if high > most:
            return 0, tried
    while high - low > max(unit, high // 8):
        middle = (low + high) // 2 // unit * unit
        if late(middle):
            low = middle
        else:
            high = middle
    return high, tried


def as_json(thing: Failures | Bill) -> dict[str, Any]:
    """Its fields; what is endless is null."""
    return {name: value if math.isfinite(value) else None for name, value in asdict(thing).items()}
