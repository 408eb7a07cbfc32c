"""Resolved runs: a run's own config.toml trains again."""

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from megacore.config.load import load
from megacore.config.resolve import resolve, resolve_optim
from megacore.config.schema import OptimConfig
from megacore.config.supported import unsupported
from megacore.config.validate import check, validate
from megacore.config.write import to_toml

VALUES = {
    "model.num_layers": st.integers(1, 3),
    "model.hidden_size": st.sampled_from((8, 24, 48)),
    "model.num_heads": st.sampled_from((1, 2, 4)),
    "model.num_kv_heads": st.sampled_from((0, 1, 2)),
    "model.head_dim": st.sampled_from((0, 2, 6)),
    "model.activation": st.sampled_from(("swiglu", "gelu")),
    "model.position": st.sampled_from(("rope", "alibi", "learned", "none")),
    "model.family": st.sampled_from(("llama", "qwen3", "gpt2")),
    "model.rope_scaling.type": st.sampled_from(("none", "linear", "ntk", "yarn", "llama3")),
    "model.rope_scaling.original_seq_len": st.sampled_from((0, 16)),
    "parallel.tp": st.sampled_from((1, 2, 4)),
    "parallel.dp": st.sampled_from((0, 1, 2)),
    "parallel.pp": st.sampled_from((1, 2, 4)),
    "parallel.chunks": st.integers(0, 3),
    "parallel.schedule": st.sampled_from(("1f1b", "interleaved", "zb-v")),
    "parallel.sequence_parallel": st.booleans(),
    "train.steps": st.integers(1, 120),
    "train.seq_len": st.sampled_from((16, 30)),
    "train.global_batch_size": st.sampled_from((2, 4)),
    "optim.lr_schedule": st.sampled_from(("cosine", "constant", "wsd", "inverse_sqrt")),
    "optim.warmup_steps": st.integers(0, 120),
    "optim.decay_steps": st.sampled_from((0, 1, 50, 200)),
    "optim.wsd_decay_steps": st.integers(0, 60),
}


def written(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


@settings(max_examples=300)
@given(run=st.fixed_dictionaries({}, optional=VALUES), world_size=st.sampled_from((1, 2, 4)))
def test_a_resolved_run_is_legal_loads_again_and_is_resolved(run, world_size, tmp_path_factory):
    config = load(None, [f"{key}={written(value)}" for key, value in run.items()], "demo")
    assume(not validate(config, world_size) and not list(unsupported(config)))
    resolved = resolve(config, world_size)
    path = tmp_path_factory.getbasetemp() / "resolved.toml"
    path.write_text(to_toml(resolved), encoding="utf-8")
    again = load(str(path))
    check(again, world_size)
    assert again == resolved
    assert resolve(again, world_size) == again


@pytest.mark.parametrize(
    ("warmup", "length"), [(0, 10), (90, 10), (95, 5), (100, 0)], ids=["tenth", "just fits", "cut", "no room"]
)
def test_the_final_decay_of_wsd_begins_after_the_warm_up(warmup, length):
    resolved = resolve_optim(OptimConfig(lr_schedule="wsd", warmup_steps=warmup), 100)
    assert (resolved.decay_steps, resolved.wsd_decay_steps) == (100, length)
    given = resolve_optim(OptimConfig(lr_schedule="wsd", warmup_steps=3, wsd_decay_steps=7, decay_steps=50), 100)
    assert (given.decay_steps, given.wsd_decay_steps) == (50, 7)
