"""Dropout masks depend on what is dropped, not on who holds it."""

import pytest
import torch

from megacore.config.resolve import resolve_model
from megacore.config.schema import ModelConfig
from megacore.kernels import counter
from megacore.kernels.table import resolve
from megacore.mesh.group import Group
from megacore.model.attention import Attention
from megacore.model.inputs import Inputs, Shared
from megacore.parallel.dropout import dropout, keep_mask
from megacore.parallel.parameters import ParameterMaker
from megacore.parallel.tensor import TensorParallel
from megacore.spec import ModelSpec
from tests.parallel.ranks import numbers

KEY = counter.key_of("dropout", 1, "here")
HEADS, BATCH, LENGTH, HIDDEN = 4, 3, 8, 10


def inputs(first_ordinal: int = 5, batch: int = BATCH) -> Inputs:
    token_bs = torch.zeros(batch, LENGTH, dtype=torch.long)
    return Inputs(token_bs, token_bs, torch.arange(first_ordinal, first_ordinal + batch))


def tensor_parallel(rank: int, size: int, sequence: bool = False) -> TensorParallel:
    """Nothing is sent, so the group needs no process behind it."""
    if size == 1:
        return TensorParallel.single()
    group = Group("tp", tuple(range(size)), rank, handle=object(), backend="gloo")  # type: ignore[arg-type]
    return TensorParallel(group, sequence)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_shards_of_the_sequence_drop_what_one_rank_drops(size: int) -> None:
    x_th, row_t = numbers(1, BATCH * LENGTH, HIDDEN), inputs().token_numbers()
    whole_th = dropout(x_th, row_t, 0.4, KEY)
    shards = []
    for rank in range(size):
        start, count = tensor_parallel(rank, size, sequence=True).shard_of_tokens(BATCH * LENGTH)
        shards.append(dropout(x_th[start : start + count], row_t[start : start + count], 0.4, KEY))
    assert torch.equal(torch.cat(shards), whole_th)
    plain = tensor_parallel(size - 1, size).shard_of_tokens(BATCH * LENGTH)
    assert plain == (0, BATCH * LENGTH)


def attention_mask(rank: int, size: int) -> torch.Tensor:
    model = resolve_model(
        ModelConfig(num_layers=1, hidden_size=16, num_heads=HEADS, vocab_size=5, attention_dropout=0.3), LENGTH
    )
    tp = tensor_parallel(rank, size)
    meta = torch.device("meta")
    make = ParameterMaker(ModelSpec.of(model).by_name, tp.group, meta, torch.float64, 1).below("layers.0.attention")
    attention = Attention(model, make, tp, resolve(meta, torch.float64)[0], seed=1)
    token_t = inputs().token_numbers()
    shared = Shared((BATCH, LENGTH), None, None, {}, token_t, token_t, True, torch.float64)
    return attention.keep(shared, BATCH, LENGTH)


@pytest.mark.parametrize("size", [2, 4])
def test_split_heads_drop_what_one_rank_drops(size: int) -> None:
    whole = attention_mask(0, 1)
    assert whole.shape == (BATCH, HEADS, LENGTH, LENGTH)
    assert torch.equal(torch.cat([attention_mask(rank, size) for rank in range(size)], 1), whole)
    heads = whole.transpose(0, 1).reshape(HEADS, -1)
    assert len(heads.unique(dim=0)) == HEADS
    assert len(whole.reshape(BATCH, -1).unique(dim=0)) == BATCH


def test_a_sample_drops_the_same_wherever_it_lies_in_a_batch() -> None:
    x_th = torch.ones(LENGTH, HIDDEN, dtype=torch.float64)
    together = dropout(x_th.repeat(BATCH, 1), inputs(5).token_numbers(), 0.4, KEY).view(BATCH, LENGTH, HIDDEN)
    for place in range(BATCH):
        alone = dropout(x_th, inputs(5 + place, batch=1).token_numbers(), 0.4, KEY)
        assert torch.equal(alone, together[place])
    assert len(together.view(BATCH, -1).unique(dim=0)) == BATCH


@pytest.mark.parametrize("probability", [0.1, 0.5])
def test_the_right_share_is_dropped_and_the_rest_made_larger(probability: float) -> None:
    keep = keep_mask(KEY, torch.arange(100_000), probability, torch.float64)
    assert set(keep.unique().tolist()) == {0.0, 1 / (1 - probability)}
    spread = (probability * (1 - probability) / 100_000) ** 0.5
    assert abs((keep == 0).double().mean().item() - probability) < 4 * spread


def test_gradients_pass_where_activations_pass() -> None:
    x_th = numbers(1, 24, HIDDEN).requires_grad_()
    y_th = dropout(x_th, inputs().token_numbers(), 0.4, KEY)
    (grad_th,) = torch.autograd.grad(y_th.sum(), x_th)
    torch.testing.assert_close(grad_th * x_th, y_th)


def test_sites_and_seeds_drop_differently() -> None:
    index = torch.arange(1000)
    masks = [
        keep_mask(counter.key_of("dropout", seed, site), index, 0.5, torch.float64) for seed in (1, 2) for site in "ab"
    ]
    for i, one in enumerate(masks):
        for other in masks[:i]:
            assert 0.4 < (one == other).double().mean().item() < 0.6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_keep_their_format(dtype: torch.dtype) -> None:
    assert dropout(torch.ones(2, 3, dtype=dtype), torch.arange(2), 0.1, KEY).dtype == dtype
