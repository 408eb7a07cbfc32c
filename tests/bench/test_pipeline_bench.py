"""`megacore bench pipeline` compares programs that compute the same thing."""

import itertools

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from megacore.bench.baselines.plain_llama import PlainLlama, training_step
from megacore.bench.baselines.torch_pipelining import TorchPipeline
from megacore.config.schema import ModelConfig, OptimConfig
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


@SCHEDULES
def test_torch_pipelining_asks_nobody_for_shapes(pool: WorkerPool, schedule: str, cut: tuple[range, ...]) -> None:
    assert {mode for modes in pool.run(inference_modes, 2, schedule, cut) for mode in modes} == {"static"}
