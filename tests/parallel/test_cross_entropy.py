"""Output matrix and split cross-entropy in one against torch's over the whole vocabulary."""

from dataclasses import replace
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megacore.data.documents import IGNORE
from megacore.kernels.linear import ONEDNN, onednn_refuses
from megacore.layout import Segment
from megacore.mesh.group import CommLog
from megacore.parallel import cross_entropy
from megacore.parallel.cross_entropy import Vocabulary, linear_cross_entropy
from megacore.parallel.tensor import TensorParallel
from megacore.spec import ParamSpec
from megacore.spec.params import rows
from tests.parallel.ranks import CPU, close, numbers, own, own_tokens, surroundings
from tests.pool import WorkerPool

TOKENS, HIDDEN, Z_WEIGHT = 24, 6, 0.3


def vocabulary(size: int, tp: TensorParallel) -> tuple[ParamSpec, Vocabulary]:
    spec = ParamSpec("head.weight", (size, HIDDEN), rows(Segment(size)))
    pieces = spec.pieces(tp.group.rank, tp.group.size)
    return spec, Vocabulary(size, pieces[0] if pieces else None)


def labels(size: int) -> Tensor:
    """Some at both ends of the vocabulary, some ignored."""
    label_t = torch.randint(size, (TOKENS,), generator=torch.Generator().manual_seed(3))
    label_t[0], label_t[1], label_t[2], label_t[TOKENS - 1] = 0, size - 1, IGNORE, IGNORE
    return label_t


def expected(x_th: Tensor, weight_vh: Tensor, smoothing: float, softcap: float = 0.0) -> tuple[Tensor, ...]:
    """Loss and z per token, and the gradients of x and the weight, by torch."""
    x_th, weight_vh = x_th.clone().requires_grad_(), weight_vh.clone().requires_grad_()
    logits_tv, label_t = x_th @ weight_vh.t(), labels(len(weight_vh))
    if softcap:
        logits_tv = softcap * torch.tanh(logits_tv / softcap)
    loss_t = F.cross_entropy(logits_tv, label_t, reduction="none", label_smoothing=smoothing, ignore_index=IGNORE)
    z_t = logits_tv.logsumexp(1).square() * (label_t != IGNORE)
    grads = torch.autograd.grad(((loss_t + Z_WEIGHT * z_t) * numbers(2, TOKENS)).sum(), (x_th, weight_vh))
    return loss_t.detach(), z_t.detach(), *grads


def compare(rank: int, world: int, size: int, smoothing: float, spread: float, softcap: float = 0.0) -> None:
    """With and without sequence parallelism and a gradient buffer that is there already; two microbatches."""
    whole_th, whole_vh = spread * numbers(1, TOKENS, HIDDEN), numbers(4, size, HIDDEN)
    loss_t, z_t, grad_th, grad_vh = expected(whole_th, whole_vh, smoothing, softcap)
    for sequence, regather, preset in product((False, True), repeat=3):
        tp = surroundings(rank, world, sequence, regather)
        spec, vocab = vocabulary(size, tp)
        weight_vh = own(whole_vh, spec, tp).requires_grad_()
        before = numbers(5, size, HIDDEN) if preset else torch.zeros(size, HIDDEN, dtype=torch.float64)
        if preset:
            weight_vh.grad = own(before, spec, tp).clone()
        what = f"{tp} preset {preset}"
        for microbatch in (1, 2):
            x_th = own_tokens(whole_th, tp).requires_grad_()
            got_t, got_z_t = linear_cross_entropy(x_th, weight_vh, labels(size), vocab, tp, smoothing, softcap)
            close(got_t, loss_t, f"{what}: loss")
            close(got_z_t, z_t, f"{what}: z")
            ((got_t + Z_WEIGHT * got_z_t) * numbers(2, TOKENS)).sum().backward()
            close(x_th.grad, own_tokens(grad_th, tp), f"{what}: x's gradient")
            close(weight_vh.grad, own(before + microbatch * grad_vh, spec, tp), f"{what}: weight's gradient")


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize(("world", "size"), [(1, 1003), (2, 1003), (4, 1003), (2, 5), (4, 5), (4, 3), (1, 1), (2, 1)])
def test_loss_z_and_gradients_are_those_of_the_whole(pool: WorkerPool, world: int, size: int, smoothing: float) -> None:
    pool.run(compare, world, world, size, smoothing, 1.0)


@pytest.mark.parametrize("softcap", [0.5, 30.0])
@pytest.mark.parametrize(("world", "size"), [(1, 1003), (2, 1003), (4, 3)])
def test_bounded_logits(pool: WorkerPool, world: int, size: int, softcap: float) -> None:
    for smoothing in (0.0, 0.1):
        pool.run(compare, world, world, size, smoothing, 10.0, softcap)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_targets_far_below_the_largest_logit_keep_their_slope(dtype: torch.dtype) -> None:
    """Where the exponential of the target's logit underflows in 16 bits, too; soft caps as Gemma-2 has them."""
    tp = TensorParallel.single()
    _, vocab = vocabulary(9, tp)
    x_th = torch.zeros(TOKENS, HIDDEN, dtype=dtype)
    x_th[:, 0] = 1
    weight_vh = torch.zeros(9, HIDDEN, dtype=dtype)
    weight_vh[:, 0] = torch.linspace(-20, 20, 9)  # the largest is 40 above the least
    label_t = torch.zeros(TOKENS, dtype=torch.long)
    x_th, weight_vh = x_th.requires_grad_(), weight_vh.requires_grad_()
    loss_t, _ = linear_cross_entropy(x_th, weight_vh, label_t, vocab, tp, 0.0, 30.0)
    (grad_vh,) = torch.autograd.grad(loss_t.sum(), weight_vh)
    wide = weight_vh.detach().double().requires_grad_()
    logits_tv = 30 * torch.tanh(x_th.detach().double() @ wide.t() / 30)
    (want_vh,) = torch.autograd.grad(F.cross_entropy(logits_tv, label_t, reduction="sum"), wide)
    assert want_vh[0, 0] < -10  # the target's own
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]
    torch.testing.assert_close(grad_vh.double(), want_vh, rtol=tolerance, atol=tolerance)


def overflow(rank: int, world: int) -> None:
    """exp of such logits is infinite: the largest must have been taken off."""
    tp = surroundings(rank, world)
    spec, vocab = vocabulary(37, tp)
    whole_th, whole_vh = 1000 * numbers(1, TOKENS, HIDDEN), numbers(4, 37, HIDDEN)
    assert (whole_th @ whole_vh.t()).exp().isinf().any()
    loss_t, z_t, grad_th, _ = expected(whole_th, whole_vh, 0.1)
    x_th = whole_th.requires_grad_()
    got_t, got_z_t = linear_cross_entropy(x_th, own(whole_vh, spec, tp), labels(37), vocab, tp, 0.1)
    ((got_t + Z_WEIGHT * got_z_t) * numbers(2, TOKENS)).sum().backward()
    for got, want in ((got_t, loss_t), (got_z_t, z_t), (x_th.grad, grad_th)):
        assert got is not None
        torch.testing.assert_close(got.detach(), want, rtol=1e-10, atol=1e-8)


@pytest.mark.parametrize("world", [1, 2])
def test_large_logits_do_not_overflow(pool: WorkerPool, world: int) -> None:
    pool.run(overflow, world, world)


def chunked(rank: int, world: int) -> None:
    cross_entropy.CHUNK, kept = 5 * 11, cross_entropy.CHUNK  # five tokens at once: the last chunk is smaller
    try:
        compare(rank, world, 11 * world, 0.1, 1.0)
    finally:
        cross_entropy.CHUNK = kept


@pytest.mark.parametrize("world", [1, 2])
def test_the_size_of_chunks_changes_nothing(pool: WorkerPool, world: int) -> None:
    pool.run(chunked, world, world)


def test_where_nothing_is_a_target_all_is_zero() -> None:
    tp = TensorParallel.single()
    _, vocab = vocabulary(9, tp)
    x_th, weight_vh = numbers(1, TOKENS, HIDDEN).requires_grad_(), numbers(4, 9, HIDDEN).requires_grad_()
    loss_t, z_t = linear_cross_entropy(x_th, weight_vh, torch.full((TOKENS,), IGNORE), vocab, tp, 0.1)
    for grad in torch.autograd.grad(loss_t.sum() + z_t.sum(), (x_th, weight_vh)):
        assert not grad.any()
    assert not loss_t.any()
    assert not z_t.any()


def single_precision(rank: int, world: int, size: int) -> None:
    """In the format and with the product that runs take; a rank may have no rows."""
    tp = surroundings(rank, world)
    if not onednn_refuses(CPU, torch.float32):
        tp = replace(tp, linear=ONEDNN)
    spec, vocab = vocabulary(size, tp)
    whole_th, whole_vh = numbers(1, TOKENS, HIDDEN), numbers(4, size, HIDDEN)
    wants = expected(whole_th, whole_vh, 0.1)
    x_th, weight_vh = whole_th.float().requires_grad_(), own(whole_vh, spec, tp).float().requires_grad_()
    loss_t, z_t = linear_cross_entropy(x_th, weight_vh, labels(size), vocab, tp, 0.1)
    ((loss_t + Z_WEIGHT * z_t) * numbers(2, TOKENS).float()).sum().backward()
    for got, want in zip((loss_t, z_t, x_th.grad, weight_vh.grad), (*wants[:3], own(wants[3], spec, tp)), strict=True):
        assert got is not None
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.detach().double(), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("world", "size"), [(1, 1003), (2, 1003), (4, 3)])
def test_in_single_precision(pool: WorkerPool, world: int, size: int) -> None:
    pool.run(single_precision, world, world, size)


def test_microbatches_use_the_same_memory() -> None:
    """Logits are the largest tensor of a step: one at a time, whatever the number of microbatches."""
    tp = TensorParallel.single()
    _, vocab = vocabulary(50, tp)
    x_th, weight_vh = numbers(1, TOKENS, HIDDEN).requires_grad_(), numbers(4, 50, HIDDEN).requires_grad_()
    places = set()
    for _ in range(3):
        linear_cross_entropy(x_th, weight_vh, labels(50), vocab, tp)[0].sum().backward()
        (spare,) = vocab.spare
        assert spare.shape == (TOKENS, 50)
        places.add(spare.data_ptr())
    with torch.no_grad():  # an evaluation too
        linear_cross_entropy(x_th, weight_vh, labels(50), vocab, tp)
    assert places == {spare.data_ptr() for spare in vocab.spare}
    assert len(places) == 1


def test_microbatches_in_flight_do_not_share_memory() -> None:
    """All forwards first, then all backwards, in the same order and in the other one."""
    tp, size = TensorParallel.single(), 50
    _, vocab = vocabulary(size, tp)
    weight_vh = numbers(4, size, HIDDEN)
    inputs = [numbers(seed, TOKENS, HIDDEN) for seed in (11, 12, 13)]
    wants = [expected(x_th, weight_vh, 0.0)[2] for x_th in inputs]
    for order in ((0, 1, 2), (2, 1, 0), (1, 0, 2)):
        leaves = [x_th.clone().requires_grad_() for x_th in inputs]
        totals = []
        for x_th in leaves:
            loss_t, z_t = linear_cross_entropy(x_th, weight_vh, labels(size), vocab, tp)
            totals.append(((loss_t + Z_WEIGHT * z_t) * numbers(2, TOKENS)).sum())
        for i in order:
            totals[i].backward()
        for x_th, want in zip(leaves, wants):
            close(x_th.grad, want, f"gradient, backward in order {order}")


def sent(rank: int, world: int, sequence: bool, smoothing: float) -> list[tuple[str, int]]:
    log = CommLog()
    tp = surroundings(rank, world, sequence, log=log)
    spec, vocab = vocabulary(1003, tp)
    x_th = own_tokens(numbers(1, TOKENS, HIDDEN), tp).requires_grad_()
    loss_t, _ = linear_cross_entropy(x_th, own(numbers(4, 1003, HIDDEN), spec, tp), labels(1003), vocab, tp, smoothing)
    loss_t.sum().backward()
    return [(record.operation, record.num_elements) for record in log]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_only_vectors_of_one_number_per_token_travel(pool: WorkerPool, smoothing: float) -> None:
    """Beside the activations themselves: maxima, then sums."""
    vectors = [("all_reduce", TOKENS), ("all_reduce", (3 if smoothing else 2) * TOKENS)]
    activations = TOKENS * HIDDEN
    assert pool.run(sent, 2, 2, False, smoothing) == 2 * [[*vectors, ("all_reduce", activations)]]
    with_sequence = [("all_gather", activations), *vectors, ("reduce_scatter", activations)]
    assert pool.run(sent, 2, 2, True, smoothing) == 2 * [with_sequence]
