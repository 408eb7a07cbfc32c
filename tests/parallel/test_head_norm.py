"""The norm over all heads, split over ranks, against one written out over the whole projection."""

import pytest
import torch
from torch import Tensor

from megacore.layout import Segment
from megacore.mesh.group import CommLog
from megacore.parallel.head_norm import HeadNorm
from megacore.parallel.tensor import TensorParallel
from megacore.spec import ParamSpec
from megacore.spec.params import rows
from tests.parallel.ranks import close, numbers, own, surroundings
from tests.pool import WorkerPool

B, S, N, D, EPS = 2, 3, 4, 6, 0.05


def whole_norm(x_tr: Tensor, weight_r: Tensor, offset: float) -> Tensor:
    return x_tr / (x_tr.square().mean(-1, keepdim=True) + EPS).sqrt() * (offset + weight_r)


def heads(name: str, num: int) -> ParamSpec:
    return ParamSpec(name, (num * D,), rows(Segment(num * D, D, replicate=True)))


def norm_of(tp: TensorParallel, num_kv: int, offset: float) -> HeadNorm:
    local = N // tp.group.size, max(1, num_kv // tp.group.size)
    counts = local[0] * D * tp.group.size, local[1] * D * tp.group.size
    return HeadNorm(counts, EPS, offset, tp.group)


def compare(rank: int, world: int, num_kv: int, offset: float) -> list[tuple[str, int]]:
    """Values, and gradients that copies of a key head share out among them; returns the collectives."""
    log = CommLog()
    tp = surroundings(rank, world, log=log)
    copies = max(1, world // num_kv)
    q_spec, k_spec = heads("q", N), heads("k", num_kv)
    whole = [numbers(1, B * S, N * D), numbers(2, B * S, num_kv * D), numbers(3, N * D), numbers(4, num_kv * D)]
    leaves = [tensor.clone().requires_grad_() for tensor in whole]
    wanted = whole_norm(leaves[0], leaves[2], offset), whole_norm(leaves[1], leaves[3], offset)
    slopes = numbers(5, B * S, N * D), numbers(6, B * S, num_kv * D)
    of_q, of_k, of_q_weight, of_k_weight = torch.autograd.grad(wanted, leaves, slopes)

    def mine(x_tr: Tensor, spec: ParamSpec) -> Tensor:
        return own(x_tr.t().contiguous(), spec, tp).t().reshape(B, S, -1, D)

    qk = torch.cat((mine(whole[0], q_spec), mine(whole[1], k_spec)), 2).requires_grad_()
    weights = own(whole[2], q_spec, tp).requires_grad_(), own(whole[3], k_spec, tp).requires_grad_()
    log.clear()
    got = norm_of(tp, num_kv, offset)(qk, *weights)
    close(got, torch.cat((mine(wanted[0], q_spec), mine(wanted[1], k_spec)), 2), "heads")
    # each copy of a key head is looked at by its own query heads: here they share its slope evenly
    grad = torch.cat((mine(slopes[0], q_spec), mine(slopes[1], k_spec) / copies), 2)
    of_qk, *of_weights = torch.autograd.grad(got, (qk, *weights), grad)
    close(of_qk, torch.cat((mine(of_q, q_spec), mine(of_k, k_spec) / copies), 2), "gradient of heads")
    close(of_weights[0], own(of_q_weight, q_spec, tp), "gradient of queries' weight")
    close(of_weights[1] * copies, own(of_k_weight, k_spec, tp), "gradient of keys' weight")
    return [(record.operation, record.num_elements) for record in log]


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize(("world", "num_kv"), [(1, 2), (2, 4), (2, 1), (4, 2)])
def test_split_heads_are_normed_as_a_whole(pool: WorkerPool, world: int, num_kv: int, offset: float) -> None:
    """Two numbers per token travel, once in forward and once in backward."""
    expected = [] if world == 1 else [("all_reduce", 2 * B * S)] * 2
    assert pool.run(compare, world, world, num_kv, offset) == [expected] * world


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sums_have_32_bits(dtype: torch.dtype) -> None:
    norm = norm_of(TensorParallel.single(), 2, 0.0)
    heads_bsnd, weights = 300 * numbers(1, B, S, N + 2, D), (numbers(3, N * D), numbers(4, 2 * D))
    narrow = [tensor.to(dtype).requires_grad_() for tensor in (heads_bsnd, *weights)]
    wide = [tensor.detach().double().requires_grad_() for tensor in narrow]
    slope = numbers(5, B, S, N + 2, D).to(dtype)
    got, want = norm(*narrow), norm(*wide)
    assert got.dtype == dtype
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
    of_narrow, of_wide = torch.autograd.grad(got, narrow, slope), torch.autograd.grad(want, wide, slope.double())
    for ours, theirs in ((got, want), *zip(of_narrow, of_wide, strict=True)):
        torch.testing.assert_close(ours.detach().double(), theirs.detach(), rtol=tolerance, atol=tolerance)
