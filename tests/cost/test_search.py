"""The planner's search: against pricing everything, against the rules, and facts that must hold of any price."""

from dataclasses import replace
from types import MappingProxyType

import pytest

from megacore.config.errors import ConfigError
from megacore.config.load import load
from megacore.config.resolve import resolve
from megacore.config.validate import validate
from megacore.cost.estimate import estimate
from megacore.cost.explain import Judge, alternatives, difference, gaps_of
from megacore.cost.machine import find_machine
from megacore.cost.outcome import judge
from megacore.cost.planning import read_wish, run_lines
from megacore.cost.search import Search, by_everything, by_mesh, least_seconds
from megacore.cost.space import RECOMPUTE, SCHEDULES, Space, usual_batch
from megacore.cost.step import step_time
from megacore.layout.layout import Layout

H100 = find_machine("h100")
SMALL = ("model.num_layers=8", "model.hidden_size=2048", "model.num_heads=16", "model.num_kv_heads=4",
         "model.vocab_size=32000", "train.seq_len=4096", "precision.dtype=bf16")  # fmt: skip
LARGE = ("model.num_layers=12", "model.hidden_size=12288", "model.num_heads=96", "model.vocab_size=50000",
         "train.seq_len=2048", "precision.dtype=bf16")  # fmt: skip


def wish_of(keys=SMALL, world=4, batch=16, preset=None, machine=H100, **more):
    return read_wish(None, preset, list(keys), world, machine, batch, **more)


def everything(space):
    """Every legal layout of the whole space that fits, by price."""
    found = []
    for mesh in space.meshes():
        for way in space.ways(mesh):
            for recompute in RECOMPUTE:
                config = space.run(mesh, way._replace(recompute=recompute))
                if space.problems(config):
                    continue
                priced = estimate(config, space.world, H100, simulate=False)
                if priced.fits:
                    found.append(priced)
    return sorted(found, key=lambda each: -each.tokens_per_s_per_gpu)


@pytest.mark.parametrize(
    ("keys", "world", "batch", "schedules"),
    [
        (LARGE, 8, 4, ("1f1b", "zb-h1")),
        pytest.param(SMALL, 4, 16, SCHEDULES, marks=pytest.mark.slow),
        pytest.param(LARGE, 8, 16, SCHEDULES, marks=pytest.mark.slow),
        pytest.param(LARGE, 16, 16, SCHEDULES, marks=pytest.mark.slow),
        pytest.param(SMALL, 6, 12, SCHEDULES, marks=pytest.mark.slow),
    ],
)
def test_search_finds_what_pricing_everything_finds(keys, world, batch, schedules):
    space = replace(wish_of(keys, world, batch).space(), allowed={"schedule": schedules})
    whole = everything(replace(space, whole=True))
    assert whole, "the test needs a model that fits"
    found = Search(space, H100).run(1, by_everything, simulate=False)
    assert found.best[0].tokens_per_s_per_gpu == pytest.approx(whole[0].tokens_per_s_per_gpu, rel=1e-9)
    assert found.counts["priced"] < 2 * len(whole)


def test_the_list_is_ranked_legal_and_fits():
    wish = wish_of(LARGE, 64, 64)
    found = Search(wish.space(), H100).run(8, by_mesh, simulate=False)
    speeds = [each.tokens_per_s_per_gpu for each in found.best]
    assert len(speeds) > 3
    assert speeds == sorted(speeds, reverse=True)
    for each in found.best:
        assert each.fits
        assert not validate(each.config, 64)
        assert each.layout.world == 64


def test_a_bound_is_below_all_ways_of_its_mesh():
    space = wish_of(LARGE, 16, 32).space()
    for mesh in space.meshes():
        ways = list(space.ways(mesh))
        seconds = []
        for way in ways:
            config = space.run(mesh, way)
            if not space.problems(config):
                seconds.append(step_time(config, Layout.of(config.parallel, 16), H100, simulate=False))
        if seconds:
            assert least_seconds(seconds[0]) <= min(each.seconds for each in seconds) * (1 + 1e-9), mesh


def test_recomputation_takes_time_and_saves_memory():
    space = wish_of(LARGE, 16, 32).space()
    for mesh in space.meshes():
        for way in list(space.ways(mesh))[:2]:
            priced = []
            while way:
                priced.append(estimate(space.run(mesh, way), 16, H100, simulate=False))
                way = space.smaller(way)
            for faster, smaller in zip(priced, priced[1:]):
                assert faster.step.seconds <= smaller.step.seconds * (1 + 1e-9)
                if mesh.pp <= 2:  # a stage of one block has nothing else to keep
                    assert faster.worst.activations >= smaller.worst.activations


def test_runs_of_the_space_are_resolved_runs():
    """What is priced is what the engine would be given."""
    space = wish_of(SMALL, 8, 32).space()
    for mesh in space.meshes():
        for way in space.ways(mesh):
            config = space.run(mesh, way)
            assert resolve(config, 8) == config


def test_the_paste_is_the_layout():
    wish = wish_of(SMALL, 8, 32)
    best = wish.search(3).best
    import tomllib

    for each in best:
        lines = [
            f"{section}.{key}={value if isinstance(value, str) else str(value).lower()}"
            for section, keys in tomllib.loads(run_lines(each)).items()
            for key, value in keys.items()
        ]
        again = resolve(load(None, [*SMALL, *lines]), 8)
        assert again.parallel == each.config.parallel
        assert again.train == each.config.train


def test_fixed_keys_stay():
    wish = wish_of((*SMALL, "parallel.tp=2", "parallel.zero=3", "train.micro_batch_size=2"), 8, 32)
    best = Search(wish.space(), H100).run(20, by_everything, simulate=False).best
    assert best
    assert {(e.layout.tp, e.layout.zero, e.config.train.micro_batch_size) for e in best} == {(2, 3, 2)}


def test_the_batch_is_kept_or_near():
    given = wish_of(SMALL, 8, 24).search(5).best
    assert {each.config.train.global_batch_size for each in given} == {24}
    chosen = wish_of(SMALL, 12, 0).search(5).best
    for each in chosen:
        assert abs(each.config.train.global_batch_size - usual_batch(4096, 12)) <= 0.25 * usual_batch(4096, 12)


def test_nothing_fits_says_what_is_missing():
    outcome = judge(wish_of(("precision.dtype=bf16",), 8, 64, preset="gpt3-175b"), 3)
    assert not outcome.best
    assert "does not fit: at least" in outcome.nothing()
    assert "GB of 72.0 GB" in outcome.nothing()


def test_verdicts_are_prices():
    wish = wish_of((), 64, 64, preset="llama2-13b")
    found = wish.search(2)
    winner = found.best[0]
    judged = Judge(wish.space(), H100, winner)
    verdicts = judged.verdicts(alternatives(judged.space))
    for verdict in verdicts:
        if verdict.slower is not None:
            # the winner was priced with its schedule's list, as these are
            assert verdict.slower > -0.02, verdict
            assert verdict.estimate.fits
    alone = next(each for each in verdicts if each.name == "data parallel alone")
    assert alone.slower is None  # 13B parameters' state on one device
    assert "does not fit" in alone.why


def test_the_batch_can_forbid():
    wish = wish_of((), 64, 32, preset="llama2-7b")
    judged = Judge(wish.space(), H100, wish.search(1).best[0])
    (verdict,) = judged.verdicts({"fsdp": MappingProxyType({"tp": (1,), "pp": (1,), "cp": (1,), "zero": (3,)})})
    assert verdict.slower is None
    assert "the batch forbids it" in verdict.why
    assert "train.global_batch_size=32" in verdict.why


def test_terms_add_up_to_the_difference():
    best = wish_of(LARGE, 32, 64).search(4).best
    winner, other = best[0], best[-1]
    gaps = gaps_of(winner, other)
    assert sum(seconds for _, seconds in gaps) == pytest.approx(
        other.step.seconds - winner.step.seconds, abs=0.02 * winner.step.seconds
    )
    assert "slower" in difference(winner, other)


def test_json_is_the_contract():
    (best,) = wish_of(SMALL, 8, 32).search(1).best[:1]
    json = best.as_json()
    assert list(json)[:10] == [
        "layout", "step_time_s", "tflops_per_gpu", "mfu", "tokens_per_s_per_gpu", "bubble_fraction", "memory_gb",
        "communication_s", "fits", "notes",
    ]  # fmt: skip
    assert {"params", "grads", "optimizer", "activations", "buffers", "total"} <= json["memory_gb"].keys()
    assert list(json["communication_s"]) == ["tp", "pp", "dp", "cp", "ep"]
    assert json["tokens_per_s_per_gpu"] == pytest.approx(32 * 4096 / json["step_time_s"] / 8)
    parts = ("params", "grads", "optimizer", "activations", "buffers", "fragmentation", "context")
    assert sum(json["memory_gb"][part] for part in parts) == pytest.approx(json["memory_gb"]["total"])


@pytest.mark.parametrize(
    ("keys", "more", "said"),
    [
        (("model.num_layers=2", "model.hidden_size=64", "model.num_heads=4"), {}, "model.vocab_size is missing"),
        (SMALL, {"world": 0}, "--gpus=0 must be from 1"),
        (SMALL, {"headroom": 1.5}, "--headroom=1.5"),
        (SMALL, {"batch": -1}, "--global-batch=-1"),
        ((*SMALL, "train.global_batch_size=8"), {"batch": 16}, "disagree"),
        ((*SMALL, "model.num_kv_heads=3"), {}, "does not divide model.num_heads"),
    ],
)
def test_wrong_wishes(keys, more, said):
    with pytest.raises(ValueError, match=said):
        wish_of(keys, **more).space()


def test_an_estimate_obeys_the_rules():
    with pytest.raises(ConfigError, match=r"parallel.tp=3 does not divide model.num_heads"):
        wish_of((*SMALL, "parallel.tp=3"), 6, 0).estimate()
    found = wish_of((*SMALL, "parallel.tp=2", "parallel.pp=2", "parallel.cp=2"), 16, 0).estimate()
    assert found.layout.dp == 2
    assert any("does not run this yet: parallel.cp=2" in note for note in found.notes)


def test_a_space_of_experts_deals_them_out():
    config = resolve(load(None, ["train.global_batch_size=64"], "mixtral-8x7b"), 16)
    space = Space(config, 16, 8, batch=64)
    axes = {(mesh.ep, mesh.etp) for mesh in space.meshes()}
    assert {(1, 1), (8, 1), (2, 2)} <= axes
    assert all(8 % ep == 0 for ep, _ in axes)
