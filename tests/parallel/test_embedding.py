"""The split look-up against the whole table."""

from itertools import product

import pytest
import torch

from megacore.layout import Segment
from megacore.parallel.embedding import PositionEmbedding, VocabParallelEmbedding, vocab_piece
from megacore.parallel.tensor import TensorParallel
from megacore.spec import ParamSpec
from megacore.spec.params import rows
from tests.parallel.ranks import close, maker, numbers, own, own_tokens, surroundings
from tests.pool import WorkerPool

TOKENS, HIDDEN = 16, 6


def look_up(rank: int, world: int, vocab_size: int) -> None:
    spec = ParamSpec("weight", (vocab_size, HIDDEN), rows(Segment(vocab_size)), std=1.0)
    table = maker(TensorParallel.single(), spec)("weight").detach()
    for sequence, preset in product((False, True), repeat=2):
        tp = surroundings(rank, world, sequence)
        embedding = VocabParallelEmbedding(maker(tp, spec), vocab_piece(spec.pieces(tp.group.rank, world)), tp)
        want_grad = numbers(5, *spec.shape) if preset else torch.zeros_like(table)
        if preset:
            embedding.weight.grad = own(want_grad, spec, tp).clone()
        for seed in (10, 20):
            token_t = torch.randint(vocab_size, (TOKENS,), generator=torch.Generator().manual_seed(seed))
            token_t[:2] = torch.tensor([0, vocab_size - 1])  # both ends; others repeat in a small vocabulary
            x_th = embedding(token_t)
            close(x_th, own_tokens(table[token_t], tp), f"{tp}: x")
            grad_th = numbers(seed, TOKENS, HIDDEN)
            x_th.backward(own_tokens(grad_th, tp))
            want_grad = want_grad.index_add(0, token_t, grad_th)
            close(embedding.weight.grad, own(want_grad, spec, tp), f"{tp}: gradient, preset {preset}")


@pytest.mark.parametrize(("world", "vocab_size"), [(1, 1003), (2, 1003), (4, 1003), (2, 5), (4, 5), (4, 3)])
def test_a_split_table_is_the_whole_table(pool: WorkerPool, world: int, vocab_size: int) -> None:
    pool.run(look_up, world, world, vocab_size)


@pytest.mark.parametrize("preset", [False, True])
def test_positions(preset: bool) -> None:
    spec = ParamSpec("weight", (9, HIDDEN), std=1.0)
    table = PositionEmbedding(maker(TensorParallel.single(), spec), TensorParallel.single())
    want_grad = numbers(5, 9, HIDDEN) if preset else torch.zeros(9, HIDDEN, dtype=torch.float64)
    if preset:
        table.weight.grad = want_grad.clone()
    place_t = torch.tensor([0, 1, 2, 8, 0, 1])
    for seed in (1, 2):
        grad_th = numbers(seed, 6, HIDDEN)
        x_th = table(place_t)
        assert torch.equal(x_th, table.weight[place_t])
        x_th.backward(grad_th)
        want_grad = want_grad.index_add(0, place_t, grad_th)
    close(table.weight.grad, want_grad, "gradient")
