"""The time of a step: its parts, its order, its closed form against the schedule's own list, and published figures."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megacore.config.load import load
from megacore.config.resolve import resolve
from megacore.cost.collectives import KINDS, collective_s
from megacore.cost.machine import find_machine, machine_names
from megacore.cost.pipelines import StageTimes, pipeline_s
from megacore.cost.practice import OURS
from megacore.cost.roofline import Device, attention_s, gemm_s
from megacore.cost.simulate import Durations, simulate
from megacore.cost.step import StepTime, step_time
from megacore.layout import Layout
from megacore.schedule.generators.generate import generate
from megacore.schedule.generators.placement import fold, loop

H100, A100 = find_machine("h100"), find_machine("a100")
BASE = ("precision.dtype=bf16", "train.seq_len=4096", "train.global_batch_size=128", "parallel.zero=1")
REFERENCE = Path(__file__).parents[3] / "shared/reference"


def step(*keys: str, world: int = 64, machine=H100, practice=OURS, simulate: bool = False) -> StepTime:
    config = resolve(load(None, [*BASE, *keys], "llama2-70b"), world)
    return step_time(config, Layout.of(config.parallel, world), machine, practice, simulate)


def test_the_parts_of_a_step_add_up():
    for keys in (("parallel.tp=8", "parallel.pp=4"), ("parallel.zero=3",), ("parallel.cp=4", "parallel.tp=8")):
        found = step(*keys)
        assert sum(found.breakdown.values()) == pytest.approx(found.seconds)
        assert min(found.breakdown.values()) >= 0
        assert found.compute + found.optimizer < found.seconds


def test_a_step_takes_what_its_floating_point_operations_take_at_least():
    found = step("parallel.tp=8", "parallel.sequence_parallel=true")
    flops = 6 * 69e9 * 128 * 4096
    assert found.seconds > flops / 64 / 989.4e12
    assert found.seconds < 3 * flops / 64 / 989.4e12


def test_more_work_takes_longer_and_more_bandwidth_does_not():
    base = ("parallel.tp=8", "parallel.pp=2")
    assert step(*base, "train.global_batch_size=256").seconds > 1.7 * step(*base).seconds
    assert step(*base, "parallel.recompute=full").seconds > 1.2 * step(*base).seconds
    wide = replace(H100, node=replace(H100.node, gb_per_s=900.0), nvls_gb_per_s=900.0)
    assert step(*base, machine=wide).communication["tp"] < step(*base).communication["tp"]
    assert step(*base, machine=A100).seconds > 1.5 * step(*base).seconds
    assert step(*base, practice=replace(OURS, overlap_tp=0.5)).seconds < step(*base).seconds
    assert step(*base, "precision.fp8=current").seconds < step(*base).seconds


def test_tensor_parallelism_over_nodes_does_not_pay():
    within, beyond = (step(f"parallel.tp={tp}", "parallel.sequence_parallel=true") for tp in (8, 16))
    assert beyond.communication["tp"] > 2 * within.communication["tp"]


def test_experts_cost_what_is_active_and_their_exchange():
    keys = ("precision.dtype=bf16", "parallel.ep=8", "train.global_batch_size=64", "train.seq_len=4096")
    config = resolve(load(None, keys, "mixtral-8x7b"), 8)
    found = step_time(config, Layout.of(config.parallel, 8), H100, simulate=False)
    active = 6 * 12.9e9 * 64 * 4096 / 8 / 989.4e12
    assert active < found.compute < 3 * active
    assert found.communication["ep"] > 0


def test_small_microbatches_of_many_experts_wait_for_the_host():
    keys = ("train.global_batch_size=64", "train.seq_len=4096", "precision.dtype=bf16")

    def waited(micro: int, ep: int) -> float:
        given = (*keys, f"parallel.ep={ep}", f"train.micro_batch_size={micro}")
        config = resolve(load(None, given, "qwen3-30b-a3b"), 16)
        layout = Layout.of(config.parallel, 16)
        return step_time(config, layout, H100, simulate=False).breakdown["launching kernels"]

    assert waited(1, 8) > waited(4, 8)
    assert waited(1, 8) > waited(1, 16)


@pytest.mark.parametrize("kind", ["gpipe", "1f1b", "interleaved", "zb-h1", "zb-h2", "zb-v", "dualpipe-v"])
def test_the_closed_form_is_near_the_simulation(kind):
    folded = kind in ("zb-v", "dualpipe-v")
    chunks = 2 if folded or kind == "interleaved" else 1
    for p, m in ((2, 8), (4, 16), (8, 32)):
        home = [0] * (p * chunks)
        for rank in range(p):
            for stage in fold(rank, p) if folded else loop(rank, p, chunks):
                home[stage] = rank
        for f, b, w in ((1.0, 1.0, 1.0), (1.0, 1.3, 0.8)):
            for p2p in (0.0, 0.05):
                rows = np.tile([f, b, w], (p * chunks, 1))
                given = Durations(f, b + w, b, w, p2p=p2p)
                exact = simulate(generate(kind, p, m, chunks), given).makespan
                near = pipeline_s(kind, StageTimes(rows, tuple(home), p, rows[:1]), m, p2p)
                assert near == pytest.approx(exact, rel=0.08), (p, m, f, b, w, p2p)


def test_a_step_is_much_the_same_simulated():
    for keys in (("parallel.tp=8", "parallel.pp=8"), ("parallel.tp=4", "parallel.pp=4", "parallel.schedule=zb-h1")):
        assert step(*keys).seconds == pytest.approx(step(*keys, simulate=True).seconds, rel=0.03)


def test_pricing_a_layout_by_formula_is_quick():
    import timeit

    config = resolve(load(None, [*BASE, "parallel.tp=8", "parallel.pp=8"], "llama2-70b"), 64)
    layout = Layout.of(config.parallel, 64)
    step_time(config, layout, H100, simulate=False)
    best = min(timeit.repeat(lambda: step_time(config, layout, H100, simulate=False), number=20, repeat=5)) / 20
    assert best < 0.003  # a third of a millisecond on a machine with nothing else to do


# bus bandwidths that NCCL's tests print: what moves 2 (n-1)/n (or (n-1)/n) of the tensor in the time
@pytest.mark.parametrize(
    ("name", "kind", "ranks", "size", "published"),
    [
        ("h100", "all_reduce", 8, 1e6, 67),
        ("h100", "all_reduce", 8, 16e6, 237),
        ("h100", "all_reduce", 8, 64e6, 362),
        ("h100", "all_reduce", 8, 256e6, 422),
        ("h100", "all_reduce", 8, 1e9, 466),
        ("h100", "all_reduce", 8, 16e9, 480),
        ("h200", "all_gather", 8, 16e9, 361),
        ("h200", "reduce_scatter", 8, 16e9, 363),
        ("h200", "all_reduce", 32, 4.3e9, 365),
        ("a100", "all_reduce", 8, 16e9, 235),
    ],
)
def test_collectives_reach_published_bandwidths(name, kind, ranks, size, published):
    factor = (2 if kind == "all_reduce" else 1) * (ranks - 1) / ranks
    assert factor * size / collective_s(find_machine(name), kind, size, ranks) / 1e9 == pytest.approx(
        published, rel=0.12
    )


def test_collectives_grow_with_size_and_distance():
    for kind in KINDS:
        near, far = (collective_s(H100, kind, 1e8, 8, stride) for stride in (1, 8))
        assert collective_s(H100, kind, 2e8, 8) > near > 0
        assert far > 3 * near
        assert collective_s(H100, kind, 1e8, 1) == 0
    with pytest.raises(ValueError, match="use one of"):
        collective_s(H100, "broadcast", 1e8, 8)


def test_products_of_matrices_reach_less_where_they_are_small_or_thin():
    device = Device(H100, "bf16")
    rate = {n: 2 * n**3 / gemm_s(device, n, n, n) for n in (256, 1024, 4096, 16384)}
    assert sorted(rate.values()) == list(rate.values())
    assert 0.97 * device.rate < rate[16384] < device.rate
    assert 2 * 4096 * 4096 * 64 / gemm_s(device, 4096, 4096, 64) < 0.4 * device.rate
    fp8 = Device(H100, "bf16", fp8=True)
    assert 1.3 < gemm_s(device, 16384, 8192, 8192) / gemm_s(fp8, 16384, 8192, 8192) < 2.0


def test_attention_is_quicker_for_long_samples_and_wide_heads():
    device = Device(H100, "bf16")

    def rate(seq: int, dim: int, backward: bool = False) -> float:
        flops = 2 * seq * seq / 2 * 32 * 2 * dim * (2.5 if backward else 1)
        return flops / attention_s(device, seq, seq / 2, 32, dim, dim, backward)

    assert rate(512, 128) < rate(2048, 128) < rate(8192, 128)
    assert rate(8192, 64) < rate(8192, 128)
    assert rate(8192, 128, backward=True) < rate(8192, 128)


def test_a_machine_of_ones_own(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('base = "a100"\nmemory_gb = 64\nprice_per_gpu_hour = 1.5\n[network]\ngb_per_s = 12.5\n')
    mine = find_machine(str(path))
    assert (mine.name, mine.accelerator.memory_gb, mine.price_per_gpu_hour) == ("mine", 64, 1.5)
    assert (mine.network.gb_per_s, mine.node) == (12.5, A100.node)
    assert "h100" in machine_names()
    for text, told in (("speed = 3", "speed"), ("[network]\nmbit = 3", "network.mbit"), ("memory_gb = -1", "above 0")):
        path.write_text(text)
        with pytest.raises(ValueError, match=told):
            find_machine(str(path))
    with pytest.raises(ValueError, match="did you mean h100"):
        find_machine("h10")


@pytest.mark.skipif(not (REFERENCE / "layouts.csv").is_file(), reason="the tables of published runs are not here")
def test_published_step_times(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks/planner"))
    import published
    import rows
    import validate

    monkeypatch.setattr(published, "FILES", ("layouts.csv",))
    found, _ = rows.cases(REFERENCE)
    dense = validate.predict([one for one in found if not one.config.model.num_experts])
    assert len(dense) > 500
    middle, high = validate.quantiles([each.error for each in dense])
    assert middle < 0.10
    assert high < 0.25
    mixtures = validate.predict([one for one in found if one.config.model.num_experts])
    assert len(mixtures) > 100
    middle, high = validate.quantiles([each.error for each in mixtures])
    assert middle < 0.18  # weaker: the same layouts differ by up to 1.7 between releases
    assert high < 0.50
    tau, pairs = validate.order([each for each in dense if each.case.source.name == "Zero Bubble 2024"])
    assert tau > 0.9
    assert pairs > 100
