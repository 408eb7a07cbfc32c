"""The lines that say how a pipeline is cut and scheduled."""

import pytest

from megacore.config.load import load
from megacore.config.resolve import resolve
from megacore.config.validate import check
from megacore.layout import Layout
from megacore.spec import ModelSpec
from megacore.train.overview import overview
from megacore.train.pipeline_overview import activations_line, stages_line

# blocks of equal cost, and next to nothing around them
SHAPE = ("model.num_layers=8", "model.hidden_size=64", "model.num_heads=4", "model.vocab_size=3", "train.seq_len=8")


def lines_of(ranks: int, *overrides: str, device: str = "cpu") -> dict[str, str]:
    """The overview by its lines' first words; lines of offloading are numbered."""
    config = load(None, [*SHAPE, "train.micro_batch_size=1", *overrides])
    check(config, ranks)
    config = resolve(config, ranks)
    spec, layout = ModelSpec.of(config.model), Layout.of(config.parallel, ranks)
    lines = [line.split(maxsplit=1) for line in overview(config, spec, layout, device, "some data")]
    offload = [text for word, text in lines if word == "offload"]
    rest = {word: text for word, text in lines if word != "offload"}
    return rest | {f"offload {number}": text for number, text in enumerate(offload)}


def test_one_stage_needs_no_words() -> None:
    assert list(lines_of(1)) == ["model", "layout", "batch", "data", "state"]


def test_a_pipeline_is_described() -> None:
    lines = lines_of(4, "parallel.pp=4", "train.global_batch_size=8")
    assert list(lines) == ["model", "layout", "stages", "schedule", "batch", "data", "state"]
    assert lines["stages"] == "0: embedding + layers 0-1; 1: layers 2-3; 2: layers 4-5; 3: layers 6-7 + head"
    # (p - 1) / (m + p - 1) = 3 / 11, but for the head
    assert lines["schedule"].startswith("1f1b: 4 stages, 8 microbatches; bubble 27.3% (simulated); ")
    assert lines["schedule"].endswith("; activations of up to 4, 3, 2, 1 microbatches on the ranks")


def test_an_uneven_split_costs_time_and_state() -> None:
    even = lines_of(2, "parallel.pp=2", "train.global_batch_size=4")
    uneven = lines_of(2, "parallel.pp=2", "train.global_batch_size=4", "parallel.stage_layers=2,6")
    assert uneven["stages"] == "0: embedding + layers 0-1; 1: layers 2-7 + head"
    # stages of 2 and 6 layers: 4 * 18 + 6 from end to end, of 2 ranks of which the two work 4 * 24
    assert "bubble 38.5% (simulated)" in uneven["schedule"] and "bubble 20.0% (simulated)" in even["schedule"]
    # a block: 4 * 64^2 + 3 * 64 * 192 + 2 * 64 parameters of 16 bytes; the head: 4 * 64
    assert even["state"].startswith("at most 3.42 MB") and uneven["state"].startswith("at most 5.13 MB")


def test_folded_ranks_hold_both_ends() -> None:
    lines = lines_of(2, "parallel.pp=2", "parallel.schedule=zb-v", "train.global_batch_size=8")
    assert lines["stages"] == "0: embedding + layers 0-1; 1: layers 2-3; 2: layers 4-5; 3: layers 6-7 + head"
    assert lines["schedule"].startswith("zb-v: 2 ranks, 4 stages, 8 microbatches; bubble ")
    assert lines["schedule"].endswith("activations of up to 2 microbatches on each rank")


def test_long_lists_are_shortened() -> None:
    stages = [range(0), *(range(i, i + 1) for i in range(20)), range(20, 23)]
    assert stages_line(stages) == "0: embedding; 1-20: 1 layer each; 21: layers 20-22 + head"
    assert activations_line([16.0 - rank for rank in range(16)]) == "activations of up to 16 microbatches, on rank 0"
    assert activations_line([4 + 1 / 3, 4.0]) == "activations of up to 4.33, 4 microbatches on the ranks"
    assert activations_line([1.0, 1.0]) == "activations of up to 1 microbatch on each rank"


def test_zero_is_described_with_its_price() -> None:
    run = ("train.global_batch_size=8", "parallel.dp=4")
    whole = lines_of(4, *run)
    assert "zero" not in whole
    one = lines_of(4, *run, "parallel.zero=1")
    assert one["zero"] == "stage 1: optimizer state cut over 4 ranks" and "warning" not in one
    three = lines_of(4, *run, "parallel.zero=3", "parallel.dp_shard=2", "parallel.schedule=zb-h1")
    assert three["zero"] == "stage 3: optimizer state, gradients, parameters cut over 2 ranks, 2 copies"
    assert three["warning"] == (
        "gradients travel 2 times a step, once per microbatch, and parameters are gathered twice in each; "
        "zb-h1 keeps whole gradients of units until their weights' turn; parallel.zero=1 sums once a step"
    )
    # 16 bytes per parameter, of which 8 and 16 are cut
    total = {name: float(lines["state"].split()[0]) for name, lines in (("0", whole), ("1", one), ("3", three))}
    assert total["1"] == pytest.approx(total["0"] * 10 / 16, rel=0.01)
    assert total["3"] == pytest.approx(total["0"] / 2, rel=0.01)


def test_sharding_that_does_nothing_is_said() -> None:
    lines = lines_of(4, "train.global_batch_size=8", "parallel.dp=4", "parallel.dp_shard=2")
    assert lines["zero"] == "parallel.dp_shard=2 cuts nothing with parallel.zero=0"
    assert "zero" not in lines_of(1, "parallel.zero=3")


def test_what_is_offloaded_is_said_and_that_a_cpu_gains_nothing() -> None:
    plain, ours = lines_of(1), lines_of(1, "optim.offload=cpu", "parallel.recompute=offload")
    # 16 bytes per parameter; with offload 8 here, and weights, Adam's moments and room for gradients there
    device, host = (float(line.split()[0]) for line in (ours["state"], ours["offload 0"]))
    assert "optimizer 0 B" in ours["state"]
    assert device == pytest.approx(float(plain["state"].split()[0]) / 2, rel=0.01)
    assert host == pytest.approx(2 * device, rel=0.01)
    nothing = "; on the CPU that is where they are anyway: it saves nothing"
    assert ours["offload 0"].endswith(
        "more per rank in host memory: weights that are updated, optimizer state, gradients on their way there"
        + nothing
    )
    assert ours["offload 1"] == "what blocks keep for backward waits in host memory" + nothing
    in_files = lines_of(1, "optim.offload=nvme")
    assert in_files["offload 0"].endswith("of optimizer state per rank in files")
    on_gpu = lines_of(1, "optim.offload=nvme", device="cuda")
    assert on_gpu["offload 0"].endswith("weights that are updated, gradients on their way there")
    assert on_gpu["offload 1"] == in_files["offload 0"]


@pytest.mark.parametrize("kind", ["gpipe", "interleaved", "zb-h1", "zb-h2", "dualpipe-v"])
def test_every_kind_can_be_described(kind: str) -> None:
    lines = lines_of(2, "parallel.pp=2", f"parallel.schedule={kind}", "train.global_batch_size=3")
    assert lines["schedule"].startswith(f"{kind}: 2 ")


def test_products_in_fp8_are_described() -> None:
    """A block has 4 * 64^2 + 3 * 64 * 192 elements in its matrices, kept twice; a history has 4 * 3 bytes a step."""
    words = ("train.seq_len=16", "precision.dtype=bf16")
    assert lines_of(1, *words, "precision.fp8=block")["fp8"] == (
        "block scaling, E4M3: 32 matrices of layers; at most 852 kB more per rank for weights in FP8"
    )
    words = (*words, "parallel.pp=2", "train.global_batch_size=4", "precision.fp8_skip_first=1")
    delayed = lines_of(2, *words, "precision.fp8=delayed", "precision.fp8_skip_last=1", "precision.fp8_history=100")
    assert delayed["fp8"] == (
        "delayed scaling, E4M3, gradients in E5M2: 24 matrices of layers; layers 0, 7 multiply in bf16; at most 348 kB "
        "more per rank for weights in FP8 and histories"
    )
    words = ("precision.fp8=current", "train.seq_len=16", "train.global_batch_size=2", "parallel.zero=3")
    kept = "; at most 106 kB more per rank for weights of a block in use in FP8"
    assert lines_of(2, *words)["fp8"].endswith(kept)
    gathers = lines_of(2, *words, "precision.fp8_gather=true")["fp8"]
    assert gathers.endswith(f"{kept}; weights travel between shards in FP8, too")
