"""`megacore bench pipeline` compares programs that compute the same thing."""

import itertools
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.distributed.pipelining import stage
from torch.nn import functional

from megacore.bench.baselines.plain_llama import PlainLlama, training_step
from megacore.bench.baselines.torch_pipelining import TorchPipeline
from megacore.bench.harness import case_named
from megacore.bench.pipeline import CASES, SHAPE, batch_of, engine_step, lay_out, torch_step
from megacore.bench.train import OURS, configure
from megacore.config.schema import ModelConfig, OptimConfig
from megacore.mesh.rank_info import RankInfo
from megacore.tools import bench
from megacore.train.build import build
from tests.pool import WorkerPool

MODEL = ModelConfig(
    num_layers=4, hidden_size=32, ffn_hidden_size=48, num_heads=4, num_kv_heads=2, head_dim=8, vocab_size=64
)
OPTIM = OptimConfig(lr=1e-3)
SEQ_LEN = 16
NUM_MICROBATCHES = 4
STEPS = 3
TWO, FOUR = (range(3), range(3, 4)), (range(1), range(1, 2), range(2, 4), range(4, 4))
SCHEDULES = pytest.mark.parametrize(("schedule", "cut"), [("1f1b", TWO), ("interleaved", FOUR), ("interleaved", TWO)])


def batch() -> tuple[Tensor, Tensor]:
    text = torch.randint(MODEL.vocab_size, (8, SEQ_LEN + 1), generator=torch.Generator().manual_seed(0))
    return text[:, :-1].contiguous(), text[:, 1:].contiguous()


def whole_model() -> PlainLlama:
    torch.manual_seed(0)
    return PlainLlama(MODEL, SEQ_LEN)


def torch_pipeline(schedule: str, cut: tuple[range, ...]) -> TorchPipeline:
    micro_batch = len(batch()[0]) // NUM_MICROBATCHES, SEQ_LEN
    return TorchPipeline(whole_model(), cut, OPTIM, micro_batch, NUM_MICROBATCHES, schedule)


def gradients_of(rank: int, schedule: str, cut: tuple[range, ...]) -> dict[str, Tensor | None]:
    """Of this rank's stages, under the whole model's names."""
    pipeline = torch_pipeline(schedule, cut)
    pipeline.forward_backward(*batch())
    named = [pair for stage in pipeline.stages.values() for pair in stage.named_parameters()]
    return {name: parameter.grad for name, parameter in named}


def losses_of(rank: int, schedule: str, cut: tuple[range, ...]) -> list[float]:
    step, (tokens, labels) = torch_pipeline(schedule, cut), batch()
    losses = [step(tokens, labels) for _ in range(STEPS)]
    return [loss.item() for loss in losses if loss is not None]


@SCHEDULES
def test_torch_pipelining_has_the_gradients_of_one_process(
    pool: WorkerPool, schedule: str, cut: tuple[range, ...]
) -> None:
    model, (tokens, labels) = whole_model(), batch()
    functional.cross_entropy(model(tokens).flatten(0, 1), labels.flatten()).backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    first, second = pool.run(gradients_of, 2, schedule, cut)
    assert not first.keys() & second.keys()
    torch.testing.assert_close(first | second, expected, rtol=1e-4, atol=1e-7)


@SCHEDULES
def test_torch_pipelining_trains_as_one_process(pool: WorkerPool, schedule: str, cut: tuple[range, ...]) -> None:
    step, (tokens, labels) = training_step(whole_model(), OPTIM), batch()
    expected = [step(tokens, labels).item() for _ in range(STEPS)]
    assert all(later < earlier for earlier, later in itertools.pairwise(expected))
    first, last = pool.run(losses_of, 2, schedule, cut)
    assert first == [] and last == pytest.approx(expected, rel=1e-5)


def inference_modes(rank: int, schedule: str, cut: tuple[range, ...]) -> list[str]:
    pipeline = torch_pipeline(schedule, cut)
    pipeline.forward_backward(*batch())
    return [part._inference_mode.value for part in pipeline.parts]


@pytest.mark.skipif(not hasattr(stage, "InferenceMode"), reason="this torch does not tell how stages know shapes")
@SCHEDULES
def test_torch_pipelining_asks_nobody_for_shapes(pool: WorkerPool, schedule: str, cut: tuple[range, ...]) -> None:
    assert {mode for modes in pool.run(inference_modes, 2, schedule, cut) for mode in modes} == {"static"}


TINY = (
    "model.num_layers=2",
    "model.hidden_size=32",
    "model.ffn_hidden_size=48",
    "model.num_heads=4",
    "model.num_kv_heads=2",
    "model.vocab_size=64",
    "train.seq_len=16",
    "train.micro_batch_size=1",
    "train.global_batch_size=4",
)


@pytest.mark.parametrize("case", ["1f1b-pp2", "interleaved-pp2"])
def test_a_case_runs_and_is_kept(case: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = ["pipeline", *TINY, "--case", case, "--rounds", "2", "--json", "--output", str(tmp_path)]
    assert bench.main(arguments) == 0
    shown = json.loads(capfd.readouterr().out)
    (comparison,) = shown["comparisons"]
    assert comparison["name"] == case and comparison["settings"]["microbatches"] == 4
    assert [side["side"] for side in comparison["sides"]][0] == OURS
    assert all(side["rounds"] == 2 and side["best_s"] > 0 for side in comparison["sides"])
    assert comparison["ratios"].keys() == {f"torch, {rival}" for rival in case_named(case, CASES).rivals}
    assert json.loads((tmp_path / "pipeline.json").read_text()) == shown


def first_losses(rank: int, case_name: str) -> list[tuple[float, float]]:
    """(the engine's, torch's) of two steps, on the rank that knows both."""
    case = case_named(case_name, CASES)
    config = lay_out(configure([*SHAPE, *TINY]), case)
    built = build(config, RankInfo(rank, case.pp, rank, case.pp), torch.device("cpu"))
    ours, theirs = engine_step(built), torch_step(built, case.schedule)
    pairs = [(ours(*batch_of(config)), theirs(*batch_of(config))) for _ in range(2)]
    return [(our.item(), their.item()) for our, their in pairs if our is not None and their is not None]


@pytest.mark.parametrize("case", ["1f1b-pp4", "interleaved-pp2"])
def test_both_sides_start_from_the_same_weights(pool: WorkerPool, case: str) -> None:
    *others, last = pool.run(first_losses, case_named(case, CASES).pp, case)
    assert not any(others)
    (our_first, their_first), (our_next, their_next) = last
    assert our_first == pytest.approx(their_first, rel=1e-5) and our_next == pytest.approx(their_next, rel=1e-4)
    assert our_next < our_first


def test_an_unknown_case_is_refused() -> None:
    with pytest.raises(ValueError, match="there is no case 'gpipe-pp2'; the cases are 1f1b-pp2, interleaved-pp2"):
        bench.main(["pipeline", "--case", "gpipe-pp2"])


def test_microbatches_that_torch_cannot_schedule_are_refused() -> None:
    config = configure([*SHAPE, *TINY, "train.global_batch_size=6"])
    with pytest.raises(ValueError, match="train.global_batch_size=6 must be a multiple of 4 here"):
        lay_out(config, case_named("1f1b-pp4", CASES))
