"""Which run is computed: its batch, its data, and the twin of a model that is too large."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megacore.config.errors import ConfigError
from megacore.config.load import load
from megacore.config.resolve import rotary_dims, window_of
from megacore.config.schema import RunConfig
from megacore.data.indexed import IndexedWriter
from megacore.spec import ModelSpec
from megacore.verify.machine import available_bytes, needed_bytes, too_large
from megacore.verify.plan import Plan, make_plan
from megacore.verify.twin import like
from tests.presets import trained

LAYOUTS = "tp=2,pp=2;dp=2;pp=3,schedule=zb-h1"


def demo(*overrides: str) -> RunConfig:
    return load(None, ["train.micro_batch_size=8", "train.global_batch_size=16", *overrides], "demo")


def plan_of(run: RunConfig, layouts: str | None = LAYOUTS, shrink: bool | None = False, as_run: bool = False) -> Plan:
    return make_plan(run, layouts, 8, shrink, as_run)


def test_all_compute_one_batch_in_float64() -> None:
    plan = plan_of(demo("train.global_batch_size=512"))
    assert {trial.config.train.global_batch_size for trial in plan.computed} == {6 * 8}
    assert [(trial.num_ranks, trial.num_microbatches) for trial in plan.trials] == [(2, 3), (3, 6), (4, 6)]
    assert {trial.config.precision.dtype for trial in plan.computed} == {"fp64"}
    assert [trial.role for trial in plan.computed] == ["exact", "tried", "tried", "tried"]
    assert plan.num_ranks == 4 and not plan.twin


def test_the_batch_is_never_larger_than_the_runs() -> None:
    assert plan_of(demo("train.global_batch_size=32")).num_microbatches == 4


def test_as_run_adds_one_process_in_the_runs_dtype() -> None:
    plan = plan_of(demo(), as_run=True)
    assert [(trial.role, trial.config.precision.dtype) for trial in plan.single] == [("exact", "fp64"), ("own", "fp32")]
    assert plan.dtype == "fp32"
    assert plan_of(demo("precision.dtype=fp64"), as_run=True).dtype == "fp64"


def test_fp8_is_left_out_of_float64_and_refused_as_run() -> None:
    plan = plan_of(demo("precision.fp8=current", "precision.fp8_skip_first=1"), "tp=2")
    assert {trial.config.precision.fp8 for trial in plan.computed} == {"off"}
    with pytest.raises(ConfigError, match="precision.fp8=current rounds so coarsely .* leave --as-run out"):
        plan_of(demo("precision.fp8=current"), "tp=2", as_run=True)


def test_one_step_of_sgd_without_what_comes_around_it() -> None:
    run = demo("optim.weight_decay=0.3", "optim.lr=0.5", "log.tensorboard=true", "train.eval_every=3")
    config = plan_of(run).trials[0].config
    assert (config.optim.name, config.optim.weight_decay, config.optim.lr) == ("sgd", 0.3, 0.5)
    assert (config.train.steps, config.train.eval_every, config.log.tensorboard) == (1, 0, False)


def test_the_runs_own_layout_is_among_those_chosen() -> None:
    run = demo("parallel.pp=2", "parallel.stage_layers=3,1", "train.global_batch_size=64")
    plan = make_plan(run, None, 2, True, False)
    assert "pp=2,stage_layers=[3,1]" in [trial.text for trial in plan.trials]
    assert plan.num_legal > len(plan.trials)


def test_own_data_if_it_is_here(tmp_path: Path) -> None:
    prefix = str(tmp_path / "corpus")
    missing = demo(f"data.blend={prefix}")
    assert "corpus.bin or .idx is not here" in plan_of(missing).data
    with IndexedWriter(prefix, np.uint16) as writer:
        writer.add_document(np.arange(5000) % 4096)
    plan = plan_of(missing)
    assert plan.data == "the first samples of the run's own data"
    assert plan.trials[0].config.data.blend == ((1.0, prefix),)
    assert "made-up" in plan_of(missing, shrink=True).data
    with pytest.raises(ConfigError, match=r"model.vocab_size=0 .* the run names no data; give"):
        plan_of(demo("model.vocab_size=0"))


def test_everything_wrong_is_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        make_plan(demo("model.vocab_size=0"), "tp=3;cp=2;pp=4,tp=4;x=1;pp=7", 8, None, False)
    problems = "\n".join(caught.value.problems)
    for part in (
        "layout x=1: x is not a key",
        "layout tp=3: parallel.tp=3 does not divide model.num_heads=4; use 2 or 4",
        "layout cp=2: parallel.cp=2 is not supported yet",
        "layout pp=4,tp=4: needs 16 ranks, more than --max-ranks=8; give --max-ranks=16",
        "layout pp=7: parallel.pp*chunks makes 7 stages",
        "model.vocab_size=0",
    ):
        assert part in problems
    with pytest.raises(ConfigError, match="--max-ranks=0 must be at least 1"):
        make_plan(demo(), None, 0, None, False)


def test_one_process_alone_can_be_laid_out_too() -> None:
    plan = make_plan(demo(), None, 1, False, False)
    assert {trial.num_ranks for trial in plan.trials} == {1}
    assert {trial.config.parallel.recompute for trial in plan.trials} == {"none", "selective", "full", "offload"}


def test_like_keeps_remainders() -> None:
    for size in range(1, 60):
        for every in (1, 2, 3, 8):
            new = like(size, every, 10)
            assert new % every == size % every and (10 <= new < 10 + every or new == size)


@pytest.mark.parametrize("preset", trained())
def test_twins_have_the_features_and_remainders_of_the_run(preset: str) -> None:
    run = load(None, ["train.global_batch_size=24", "train.micro_batch_size=3"], preset)
    layouts = "tp=2;pp=2,schedule=zb-v;dp=2;pp=3;pp=2,schedule=interleaved,chunks=2;dp=4"
    plan = plan_of(run, layouts, shrink=True)
    whole = plan.run.model
    for trial in plan.computed:
        twin, tp = trial.config.model, trial.config.parallel.tp
        assert ModelSpec.of(twin).num_params < 200_000
        assert twin.num_heads // twin.num_kv_heads == whole.num_heads // whole.num_kv_heads
        assert [size % tp for size in (twin.num_heads, twin.num_kv_heads, twin.vocab_size)] == [
            size % tp for size in (whole.num_heads, whole.num_kv_heads, whole.vocab_size)
        ]
        assert twin.num_layers % trial.num_stages == whole.num_layers % trial.num_stages
        sizes = {"num_layers", "hidden_size", "ffn_hidden_size", "num_heads", "num_kv_heads", "head_dim", "vocab_size"}
        sizes |= {"max_positions", "sliding_window", "rope_scaling"}
        assert replace(twin, **{key: getattr(whole, key) for key in sizes}) == whole
        assert bool(twin.sliding_window) == bool(whole.sliding_window)


def test_a_window_still_hides_something() -> None:
    plan = plan_of(demo("model.sliding_window=32"), shrink=True)
    assert {trial.config.model.sliding_window for trial in plan.computed} == {32 * 16 // 128}


def test_only_what_is_too_large_has_a_twin() -> None:
    assert "of state in float64" in plan_of(load(None, ["train.global_batch_size=4"], "llama3-70b"), shrink=None).twin
    assert not plan_of(demo("model.num_layers=3", "train.seq_len=8"), shrink=None).twin
    run = load(None, [], "gpt2-124m")
    layouts = [trial.config.parallel for trial in plan_of(run, "dp=1;pp=2").trials]
    run = plan_of(run, "dp=1;pp=2").run
    assert needed_bytes(run, layouts) == 2 * 16 * ModelSpec.of(run.model).num_params
    slow = replace(run, train=replace(run.train, global_batch_size=10**6))
    assert " cores" in too_large(slow, layouts)


def test_free_memory_is_read_where_linux_tells_it(tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 99 kB\nMemAvailable:      2048 kB\n")
    assert available_bytes(tmp_path / "meminfo") == 2048 * 1024
    assert available_bytes(tmp_path / "none") > 1e8


def test_a_twin_rotates_the_same_part_of_its_heads_and_has_layers_of_both_kinds() -> None:
    factors = [1 + pair / 10 for pair in range(36)]
    longrope = ("type=longrope", "factor=32", "original_seq_len=2048", f"short_factor={factors}")
    run = load(
        None,
        [
            *(f"model.rope_scaling.{each}" for each in (*longrope, f"long_factor={factors}")),
            "model.rotary_fraction=0.75",
            "model.full_attention_every=6",
            "model.sliding_window_from=30",
            "train.global_batch_size=4",
        ],
        "phi3-mini",
    )
    (twin, *_) = (trial.config for trial in plan_of(run, "tp=2", shrink=True).computed)
    m = twin.model
    assert 0 < rotary_dims(m) < m.head_dim and rotary_dims(m) == 2 * len(m.rope_scaling.long_factor)
    assert 1 < m.rope_scaling.original_seq_len < twin.train.seq_len
    assert {bool(window_of(m, layer)) for layer in range(m.num_layers)} == {True, False}
