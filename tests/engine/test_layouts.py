"""Every layout computes what one process computes: gradients per parameter, and 20 steps of loss and gradient norm."""

import pytest
from torch import Tensor

from megacore.config.schema import RunConfig
from tests.engine.common import Part, assemble, built_rank, parts, run_config, step_of, worst_difference
from tests.pool import WorkerPool

LAYOUTS = {
    "tp2": (2, "parallel.tp=2"),
    "tp4": (4, "parallel.tp=4"),
    "dp2": (2,),
    "dp4": (4,),
    "tp2 dp2": (4, "parallel.tp=2"),
    "tp2 sequence": (2, "parallel.tp=2", "parallel.sequence_parallel=true"),
    "tp4 sequence": (4, "parallel.tp=4", "parallel.sequence_parallel=true"),
    "tp2 sequence regather dp2": (
        4,
        "parallel.tp=2",
        "parallel.sequence_parallel=true",
        "parallel.regather_inputs=true",
    ),
}
MODELS = {
    "llama": (),
    "multi-query, qk norm, smoothing": (
        "model.num_kv_heads=1",
        "model.qk_norm=true",
        "train.label_smoothing=0.1",
        "train.z_loss=0.01",
    ),
    "gpt2 with dropout": ("model.family=gpt2", "model.dropout=0.1", "model.attention_dropout=0.2"),
    "alibi, window, documents": (
        "model.position=alibi",
        "model.sliding_window=7",
        "data.reset_attention=true",
        "model.activation=relu2",
    ),
    "fewer rows than ranks": ("model.vocab_size=3", "model.tie_embeddings=true", "model.activation=geglu"),
}
FAMILIES = {
    "neox": ("model.family=gpt-neox", "model.head_dim=8", "model.dropout=0.1"),
    "olmo2, fewer kv heads than ranks": ("model.family=olmo2", "model.num_kv_heads=1", "model.dropout=0.1"),
    "gemma2": (
        "model.family=gemma2",
        "model.sliding_window=5",
        "model.attention_softcap=1.5",
        "model.logit_softcap=6",
        "model.attention_dropout=0.1",
        "train.label_smoothing=0.1",
        "train.z_loss=0.01",
    ),
    "phi3": (
        "model.family=phi3",
        "model.head_dim=8",
        "model.rotary_fraction=0.75",
        "model.sliding_window=9",
        "model.sliding_window_from=1",
        "data.reset_positions=true",
        "model.rope_scaling.type=longrope",
        "model.rope_scaling.factor=4",
        "model.rope_scaling.original_seq_len=12",
        "model.rope_scaling.short_factor=[1.0, 1.1, 1.3]",
        "model.rope_scaling.long_factor=[1.5, 2.5, 5.0]",
    ),
}
FAMILY_LAYOUTS = {
    "tp2 sequence, full recompute": (*LAYOUTS["tp2 sequence"], "parallel.recompute=full"),
    "tp2 pp2, selective recompute": (4, "parallel.tp=2", "parallel.pp=2", "parallel.recompute=selective"),
    "tp4 sequence": LAYOUTS["tp4 sequence"],
    "pp2 dp2 zb-h1 zero2": (4, "parallel.pp=2", "parallel.schedule=zb-h1", "parallel.zero=2"),
}


WIDE = {"tp2 dp4": (8, "parallel.tp=2"), "tp4 dp2 sequence": (8, "parallel.tp=4", "parallel.sequence_parallel=true")}


def gradients_of_rank(rank: int, world_size: int, config: RunConfig) -> tuple[float, float, list[Part]]:
    built = built_rank(rank, world_size, config)
    loss, norm = step_of(built, step=1)
    return loss, norm, parts(built, "grads")


def gradients(pool: WorkerPool, world_size: int, *overrides: str) -> tuple[float, float, dict[str, Tensor]]:
    config = run_config(world_size, "optim.clip_grad=0", *overrides)
    results = pool.run(gradients_of_rank, world_size, world_size, config)
    assert len({(loss, norm) for loss, norm, _ in results}) == 1, "ranks disagree on loss or norm"
    return *results[0][:2], assemble(config, [rank_parts for _, _, rank_parts in results])


@pytest.fixture(scope="module")
def of_one_process(pool: WorkerPool) -> dict[str, tuple[float, float, dict[str, Tensor]]]:
    return {name: gradients(pool, 1, *model) for name, model in MODELS.items()}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_are_those_of_one_process(
    pool: WorkerPool, of_one_process: dict[str, tuple[float, float, dict[str, Tensor]]], layout: str, model: str
) -> None:
    world_size, *overrides = LAYOUTS[layout]
    loss, norm, ours = gradients(pool, world_size, *MODELS[model], *overrides)
    expected_loss, expected_norm, expected = of_one_process[model]
    assert loss == pytest.approx(expected_loss, rel=1e-12)
    assert norm == pytest.approx(expected_norm, rel=1e-12)
    difference, where = worst_difference(ours, expected)
    assert difference < 1e-10, where


@pytest.mark.parametrize("model", FAMILIES)
def test_blocks_of_other_families(pool: WorkerPool, model: str) -> None:
    expected_loss, expected_norm, expected = gradients(pool, 1, *FAMILIES[model])
    for layout, (world_size, *overrides) in FAMILY_LAYOUTS.items():
        loss, norm, ours = gradients(pool, world_size, *FAMILIES[model], *overrides)
        assert (loss, norm) == (pytest.approx(expected_loss, rel=1e-12), pytest.approx(expected_norm, rel=1e-12))
        difference, where = worst_difference(ours, expected)
        assert difference < 1e-10, (layout, where)


@pytest.mark.parametrize("layout", WIDE)
def test_eight_ranks_too(
    pool: WorkerPool, of_one_process: dict[str, tuple[float, float, dict[str, Tensor]]], layout: str
) -> None:
    world_size, *overrides = WIDE[layout]
    model = "gpt2 with dropout"
    loss, norm, ours = gradients(pool, world_size, *MODELS[model], *overrides)
    expected_loss, expected_norm, expected = of_one_process[model]
    assert (loss, norm) == (pytest.approx(expected_loss, rel=1e-12), pytest.approx(expected_norm, rel=1e-12))
    difference, where = worst_difference(ours, expected)
    assert difference < 1e-10, where


def twenty_steps_of_rank(rank: int, world_size: int, config: RunConfig) -> tuple[list[tuple[float, float]], list[Part]]:
    built = built_rank(rank, world_size, config)
    return [step_of(built, step, config.optim.lr) for step in range(1, 21)], parts(built, "params")


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_twenty_steps_run_alike_in_every_layout(pool: WorkerPool, optimizer: str) -> None:
    rule = {
        "sgd": ("optim.name=sgd", "optim.lr=0.2", "optim.clip_grad=0", "optim.momentum=0.5", "optim.weight_decay=0.1"),
        "adamw": ("optim.name=adamw", "optim.lr=0.003", "optim.clip_grad=0.5"),
    }[optimizer]
    curves, weights = {}, {}
    long = ("dp4", "tp4", "tp2 dp2", "tp2 sequence regather dp2")
    for name, (world_size, *overrides) in {"one": (1,), **{name: LAYOUTS[name] for name in long}}.items():
        config = run_config(world_size, *rule, *overrides)
        results = pool.run(twenty_steps_of_rank, world_size, world_size, config)
        curves[name] = results[0][0]
        weights[name] = assemble(config, [rank_parts for _, rank_parts in results])
    assert curves["one"][-1][0] < 0.95 * curves["one"][0][0], "nothing was learnt, so nothing was compared"
    for name, curve in curves.items():
        for (loss, norm), (expected_loss, expected_norm) in zip(curve, curves["one"], strict=True):
            assert loss == pytest.approx(expected_loss, rel=1e-9), name
            assert norm == pytest.approx(expected_norm, rel=1e-9), name
        if optimizer == "sgd":
            difference, where = worst_difference(weights[name], weights["one"])
            assert difference < 1e-8, (name, where)


def test_sequence_parallelism_does_not_depend_on_regathering(pool: WorkerPool) -> None:
    layout = ("parallel.tp=2", "parallel.sequence_parallel=true")
    kept = gradients(pool, 2, *layout)
    regathered = gradients(pool, 2, *layout, "parallel.regather_inputs=true")
    assert kept[:2] == regathered[:2]
    assert worst_difference(regathered[2], kept[2])[0] == 0
