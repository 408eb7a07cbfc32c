"""The range of every number that has one: the simplest rules, as a table."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any


@dataclass(frozen=True)
class Bound:
    """Numbers from ``low`` to ``high``; an open end is not itself allowed, -1 is where it means ``own``."""

    low: float
    high: float = math.inf
    low_open: bool = False
    high_open: bool = False
    own: str = ""

    def __contains__(self, value: float) -> bool:
        if self.own and value == -1:
            return True
        above = self.low < value if self.low_open else self.low <= value
        below = value < self.high if self.high_open else value <= self.high
        return above and below

    def __str__(self) -> str:
        low = f"more than {self.low:g}" if self.low_open else f"at least {self.low:g}"
        high = f" and {'less than' if self.high_open else 'at most'} {self.high:g}" if self.high != math.inf else ""
        return low + high + (f", or -1 for {self.own}" if self.own else "")


COUNT = Bound(1)
NATURAL = Bound(0)
POSITIVE = Bound(0, low_open=True)
SHARE = Bound(0, 1)
DECAY = Bound(0, 1, high_open=True)
OPTIMIZERS_OWN = "the optimizer's own"

BOUNDS: Mapping[str, Bound] = MappingProxyType(
    {
        **dict.fromkeys(
            (
                "parallel.tp",
                "parallel.pp",
                "parallel.cp",
                "parallel.ep",
                "train.steps",
                "train.seq_len",
                "train.micro_batch_size",
                "train.global_batch_size",
                "train.eval_steps",
                "log.every",
                "log.sample_tokens",
                "optim.adagc_ratio",
                "precision.fp8_history",
                "guard.spike_window",
                "precision.loss_scale_every",
                "model.rope_scaling.factor",
                "model.moe_every",
            ),
            COUNT,
        ),
        **dict.fromkeys(
            (
                "model.ffn_hidden_size",
                "model.num_kv_heads",
                "model.head_dim",
                "model.vocab_size",
                "model.max_positions",
                "model.sliding_window",
                "model.sliding_window_from",
                "model.full_attention_every",
                "model.attention_scale_dim",
                "model.attention_softcap",
                "model.logit_softcap",
                "model.init_std",
                "model.num_experts",
                "model.top_k",
                "model.moe_ffn_hidden_size",
                "model.num_shared_experts",
                "model.shared_ffn_hidden_size",
                "model.num_dense_layers",
                "model.kv_lora_rank",
                "model.q_lora_rank",
                "model.qk_nope_head_dim",
                "model.qk_rope_head_dim",
                "model.v_head_dim",
                "model.rope_scaling.original_seq_len",
                "model.rope_scaling.attention_factor",
                "parallel.dp",
                "parallel.dp_shard",
                "parallel.etp",
                "parallel.chunks",
                "train.seed",
                "train.eval_every",
                "train.z_loss",
                "optim.lr",
                "optim.min_lr",
                "optim.warmup_steps",
                "optim.decay_steps",
                "optim.wsd_decay_steps",
                "optim.clip_grad",
                "optim.adagc_warmup_steps",
                "precision.fp8_skip_first",
                "precision.fp8_skip_last",
                "data.temperature",
                "checkpoint.save_every",
                "checkpoint.export_hf_every",
                "checkpoint.keep",
                "checkpoint.keep_every",
                "checkpoint.keep_best",
                "log.console_every",
                "log.sample_every",
                "log.sample_temperature",
                "log.statistics_every",
                "log.timeline_step",
                "log.communication",
                "log.gpu_every",
                "guard.step_limit_s",
                "guard.max_rewinds",
                "guard.replicas_every",
                "guard.stragglers_every",
            ),
            NATURAL,
        ),
        **dict.fromkeys(
            (
                "model.norm_eps",
                "model.rope_theta",
                "model.rope_scaling.low_freq_factor",
                "model.rope_scaling.high_freq_factor",
                "model.rope_scaling.beta_fast",
                "model.rope_scaling.beta_slow",
                "precision.loss_scale_start",
                "precision.loss_scale_min",
                "guard.silent_s",
                "guard.abort_s",
                "guard.spike_sigma",
            ),
            POSITIVE,
        ),
        **dict.fromkeys(("data.fim_rate", "data.fim_spm_rate"), SHARE),
        # far beyond any model, and still few enough to be laid out and cut up in an instant
        **dict.fromkeys(("model.num_layers", "model.num_heads"), Bound(0, 1 << 14)),
        "model.hidden_size": Bound(0, 1 << 24),
        "log.prometheus_port": Bound(0, 65535),
        **dict.fromkeys(
            (
                "model.dropout",
                "model.attention_dropout",
                "train.label_smoothing",
                "optim.adagc_beta",
            ),
            DECAY,
        ),
        **dict.fromkeys(("optim.beta1", "optim.beta2", "optim.momentum"), replace(DECAY, own=OPTIMIZERS_OWN)),
        "model.rotary_fraction": Bound(0, 1, low_open=True),
        "optim.eps": replace(POSITIVE, own=OPTIMIZERS_OWN),
        "optim.weight_decay": replace(NATURAL, own=OPTIMIZERS_OWN),
        "parallel.zero": Bound(0, 3),
        "precision.fp8_margin": Bound(0, 10),
    }
)


def out_of_bounds(flat: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(key, what is wrong) for every number of ``flat`` (key -> value) outside its range."""
    for key, bound in BOUNDS.items():
        if flat[key] not in bound:
            yield key, f"{key}={flat[key]} is out of range; it must be {bound}"
