"""What a run may change when it goes on: every key is of a class, and somebody has thought about it."""

import re

import pytest

from megacore.config.changes import MATHS, REFUSED, RULES, SAFE, changes, kind_of, refuse
from megacore.config.errors import ConfigError
from megacore.config.load import all_keys
from megacore.config.schema import RunConfig
from tests.engine.common import run_config

BY_SECTION = {
    "parallel": SAFE,
    "checkpoint": SAFE,
    "kernels": SAFE,
    "log": SAFE,
    "train": MATHS,
    "optim": MATHS,
    "precision": MATHS,
    "model": REFUSED,
    "data": REFUSED,
}
"""A key that has no rule of its own is what its section is. A new one goes into this list, after some thought: what
does a run do that goes on with another value?"""
LISTED = {
    "train": {"global_batch_size", "batch_ramp", "label_smoothing", "z_loss"},
    "optim": {
        *("lr", "min_lr", "warmup_steps", "lr_schedule", "decay_steps", "wsd_decay_steps", "weight_decay", "beta1"),
        *("beta2", "eps", "momentum", "options", "state_rounding", "clip", "clip_grad", "adagc_ratio", "adagc_beta"),
        *("adagc_warmup_steps", "groups"),
    },
    "precision": {
        *("dtype", "fp8", "master", "loss_scale", "loss_scale_start", "loss_scale_every", "loss_scale_min"),
        *("grad_reduce_dtype", "fp8_skip_first", "fp8_skip_last", "fp8_history", "fp8_margin"),
    },
    "data": {"split", "index", "temperature", "fim_rate", "fim_spm_rate", "fim_tokens"},
}
"""What sections that are not all of one kind hold beside keys with a rule of their own."""


def test_every_key_has_a_class() -> None:
    for key in all_keys(RunConfig):
        assert kind_of(key) in (SAFE, MATHS, REFUSED)
    for name in RULES:
        assert any(f"{key}.".startswith(f"{name}.") for key in all_keys(RunConfig)), f"{name} is no key"


@pytest.mark.parametrize("section", LISTED)
def test_keys_of_mixed_sections_are_listed(section: str) -> None:
    keys = {key.removeprefix(f"{section}.") for key in all_keys(RunConfig) if key.startswith(f"{section}.")}
    own = {name.removeprefix(f"{section}.") for name in RULES if name.startswith(f"{section}.")}
    rest = {key for key in keys if not any(f"{key}.".startswith(f"{name}.") for name in own)}
    assert rest == LISTED[section], "think about the new key: a rule of its own, or this list"


def test_sections_are_what_they_are() -> None:
    for section, kind in BY_SECTION.items():
        assert RULES[section] == kind
    for key in all_keys(RunConfig):
        if key.startswith(("parallel.", "checkpoint.", "log.")):
            assert kind_of(key) == SAFE
        if key.startswith("model.") and not any(f"{key}.".startswith(f"{n}.") for n in RULES if n != "model"):
            assert kind_of(key) == REFUSED


def test_changes_are_told_whole_and_in_order() -> None:
    saved = run_config(1, "optim.lr=0.001", "train.seed=1")
    wanted = run_config(2, "optim.lr=0.002", "train.seed=2", "parallel.tp=2", "model.num_layers=4")
    found = changes(saved, wanted)
    assert [change.key for change in found] == sorted((c.key for c in found), key=list(all_keys(RunConfig)).index)
    kinds = {change.key: change.kind for change in found}
    assert kinds == {
        "model.num_layers": REFUSED,
        "parallel.tp": SAFE,
        "parallel.etp": SAFE,  # follows tp
        "train.seed": REFUSED,
        "optim.lr": MATHS,
    }
    assert "optim.lr: 0.001 -> 0.002 (changes the maths)" in map(str, found)
    with pytest.raises(ConfigError) as caught:
        refuse(found, "the checkpoint X")
    assert len(re.findall("the checkpoint X was saved with", str(caught.value))) == 2
    assert "model.num_layers=4" in str(caught.value) and "train.seed=2" in str(caught.value)
    refuse([change for change in found if change.kind != REFUSED], "the checkpoint X")


@pytest.mark.parametrize("key", ["train.steps=9", "train.global_batch_size=4"])
def test_an_order_that_hangs_on_the_length(key: str) -> None:
    """Megatron's index shuffles as many epochs together as the run has: another length is another order."""
    (change,) = [c for c in changes(run_config(1), run_config(1, key)) if c.key == key.partition("=")[0]]
    assert change.kind != REFUSED
    saved, wanted = run_config(1, "data.index=megatron"), run_config(1, "data.index=megatron", key)
    (change,) = [c for c in changes(saved, wanted) if c.key == key.partition("=")[0]]
    assert change.kind == REFUSED
