"""Each rank's share of what is trained and evaluated on."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from megacore.data.sampler import BatchPlan
from megacore.data.stream import MicroBatch
from megacore.train.feed import Feed


class Stream:
    """Samples that hold their own number."""

    def microbatch(self, first: int, count: int) -> MicroBatch:
        ordinals = np.arange(first, first + count)
        tokens = np.repeat(ordinals[:, None], 4, axis=1)
        return MicroBatch(tokens, tokens + 1, None, tokens * 0, ordinals)


def feed(rank: int, size: int) -> Feed:
    plan = BatchPlan(8, 2, (4, 4, 8))
    return Feed(Stream(), plan, SimpleNamespace(rank=rank, size=size), torch.device("cpu"))  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [1, 2])
def test_evaluation_deals_whole_batches_out_and_is_the_same_each_time(size: int) -> None:
    seen: list[list[int]] = [[] for _ in range(3)]
    for rank in range(size):
        ours = feed(rank, size)
        for _ in range(2):
            batches = list(ours.evaluation(3, 8))
            assert [len(batch) for batch in batches] == [4 // size] * 3  # the ramp is of training only
        for numbers, batch in zip(seen, batches, strict=True):
            for inputs in batch:
                assert not inputs.training
                assert torch.equal(inputs.token_bs[:, 0], inputs.ordinal_b)
                assert torch.equal(inputs.label_bs, inputs.token_bs + 1)
                assert inputs.position_bs is None
                assert inputs.document_bs is not None
                numbers += inputs.ordinal_b.tolist()
    assert [sorted(numbers) for numbers in seen] == [list(range(8 * i, 8 * i + 8)) for i in range(3)]


def test_training_follows_the_ramp() -> None:
    firsts = [[inputs.ordinal_b.tolist() for inputs in feed(1, 2).step(step)] for step in (1, 2, 3)]
    assert firsts == [[[2, 3]], [[6, 7]], [[10, 11], [14, 15]]]
    assert all(inputs.training for inputs in feed(0, 1).step(1))


def test_to_a_gpu_samples_go_from_pinned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """From any other memory the host would wait until the device has come so far."""
    pinned: list[int] = []

    def pin_memory(self: torch.Tensor) -> torch.Tensor:
        copy = self.clone()
        pinned.append(copy.data_ptr())
        return copy

    def to(self: torch.Tensor, device: object, non_blocking: bool = False) -> torch.Tensor:
        assert non_blocking and self.data_ptr() == pinned[-1]
        return self

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    monkeypatch.setattr(torch.Tensor, "to", to)
    ours = feed(0, 1)
    ours.device = SimpleNamespace(type="cuda")  # type: ignore[assignment]
    inputs = ours.step(1)[0]
    assert inputs.ordinal_b.data_ptr() in pinned and len(pinned) == 2 * 4
