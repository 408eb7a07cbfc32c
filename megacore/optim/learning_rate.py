"""The learning rate of a step."""

import math

from megacore.config.schema import OptimConfig


def learning_rate(optim: OptimConfig, step: int) -> float:
    """The rate of 1-based ``step``: linear warm-up from 0, then the decay of ``optim.lr_schedule`` towards ``min_lr``.

    ``optim`` is resolved.
    cosine (Loshchilov and Hutter 2017), linear, constant, wsd: constant, then linear over the last
    ``wsd_decay_steps`` (Hu et al. 2024, MiniCPM), inverse_sqrt: lr * sqrt(warm-up / step), never below ``min_lr``
    (Vaswani et al. 2017). Schedules that decay to an end stay at ``min_lr`` after ``decay_steps``.
    """
    warmup, end = optim.warmup_steps, optim.decay_steps
    if step <= warmup:
        return optim.lr * step / warmup
    if optim.lr_schedule == "constant":
        return optim.lr
    if optim.lr_schedule == "inverse_sqrt":
        return max(optim.min_lr, optim.lr * math.sqrt(max(warmup, 1) / step))
    start = warmup
    if optim.lr_schedule == "wsd":
        start = max(warmup, end - optim.wsd_decay_steps)
    done = min(1.0, max(0.0, (step - start) / max(1, end - start)))
    share = 0.5 * (1 + math.cos(math.pi * done)) if optim.lr_schedule == "cosine" else 1 - done
    return optim.min_lr + (optim.lr - optim.min_lr) * share
