"""How a run differs from the one that a checkpoint was saved by, and whether it may go on from there."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from megacore.config.errors import ConfigError
from megacore.config.parse import show
from megacore.config.schema import ModelConfig, RunConfig
from megacore.config.secrets import without_secrets
from megacore.config.write import flatten

SAFE, MATHS, REFUSED = "safe", "changes the maths", "refused"

RULES: Mapping[str, str] = MappingProxyType(
    {
        # who computes what, and what is shown or kept: the same numbers, up to the order of summation
        "parallel": SAFE,
        "checkpoint": SAFE,
        "kernels": SAFE,
        "log": SAFE,
        "guard": SAFE,
        "out": SAFE,
        "train.steps": SAFE,  # where it moves the learning rate, optim.decay_steps differs, too
        "train.micro_batch_size": SAFE,
        "train.device": SAFE,
        "train.deterministic": SAFE,
        "train.eval_every": SAFE,
        "train.eval_steps": SAFE,
        "model.init_std": SAFE,  # weights are there
        "model.init_scale_residual": SAFE,
        "precision.fp8_gather": SAFE,
        "optim.offload": SAFE,
        "optim.offload_folder": SAFE,
        "data.cache": SAFE,
        # where the data lie; what they are is compared by content
        "data.blend": SAFE,
        "data.eval_blend": SAFE,
        "data.tokenizer": SAFE,
        # what is computed from now on
        "train": MATHS,
        "optim": MATHS,
        "precision": MATHS,
        "model.dropout": MATHS,
        "model.attention_dropout": MATHS,
        "model.rope_theta": MATHS,
        "model.rope_scaling": MATHS,
        "model.sliding_window": MATHS,
        "data.reset_positions": MATHS,
        "data.reset_attention": MATHS,
        "data.mask_eod_loss": MATHS,
        # what state or the order of samples was made for
        "model": REFUSED,
        "optim.name": REFUSED,
        "optim.state_dtype": REFUSED,
        "optim.freeze": REFUSED,
        "train.seed": REFUSED,
        "train.seq_len": REFUSED,
        "data": REFUSED,
    }
)
"""By key or by section; the longest name that fits counts."""


@dataclass(frozen=True)
class Change:
    """A key with its value in the checkpoint and in the run."""

    key: str
    saved: object
    wanted: object
    kind: str

    def __str__(self) -> str:
        return f"{self.key}: {show(self.saved)} -> {show(self.wanted)} ({self.kind})"


SET_THE_ORDER = frozenset({"train.steps", "train.global_batch_size", "train.batch_ramp"})
"""Keys on which the order of samples depends where it is Megatron's, whose epochs are shuffled together."""


def changes(saved: RunConfig, wanted: RunConfig) -> list[Change]:
    """Every key that differs, in the schema's order; both runs are resolved. Of secrets only whether there are some."""
    before, after = flatten(without_secrets(saved)), flatten(without_secrets(wanted))
    ordered = SET_THE_ORDER if wanted.data.index == "megatron" else ()
    return [
        Change(key, before[key], after[key], REFUSED if key in ordered else kind_of(key))
        for key in after
        if before[key] != after[key]
    ]


def kind_of(key: str) -> str:
    """What a difference of a key means."""
    names = key.split(".")
    return next(RULES[name] for name in _longest_first(names) if name in RULES)


def model_problems(stored: ModelConfig, wanted: ModelConfig, what: str) -> list[str]:
    """What keeps a model from taking the weights of ``what``: a line for each key that must not differ."""
    before, after = flatten(stored, "model."), flatten(wanted, "model.")
    names = {"model.family", "model.max_positions"} if wanted.position != "learned" else {"model.family"}
    return [
        f"{key}={show(after[key])}, but {what} has {show(before[key])}; set it so, or leave the [model] section out"
        for key in after
        if before[key] != after[key] and kind_of(key) == REFUSED and key not in names
    ]


def refuse(found: list[Change], what: str) -> None:
    """Raise ConfigError with every change that keeps a run from going on from ``what``."""
    problems = [
        f"{change.key}={show(change.wanted)}, but {what} was saved with {show(change.saved)}, which its state or the "
        "order of its samples depends on; set it back, or start anew from its weights with checkpoint.init_from"
        for change in found
        if change.kind == REFUSED
    ]
    if problems:
        raise ConfigError(problems)


def _longest_first(names: list[str]) -> Iterator[str]:
    for length in range(len(names), 0, -1):
        yield ".".join(names[:length])
