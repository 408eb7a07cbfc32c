"""Column- and row-parallel linear layers (Shoeybi et al. 2019, section 3; with sequence parallelism Korthikanti et
al. 2022, section 4.2.2).

Y = X W^T. *Column*: W's rows (outputs) are split; X must be whole, so it is gathered under sequence parallelism, and
its gradient is the sum of every rank's part (all-reduce, or reduce-scatter back to shards). *Row*: W's columns
(inputs) are split, X already is; Y is the sum of every rank's part. In backward the sum of input gradients travels
while the weight gradient is computed.

Shapes: t all tokens of the microbatch, or a rank's shard of them under sequence parallelism; i inputs, o outputs, as
this rank holds them.
"""

from typing import Any

from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from megacore.kernels.linear import LinearKernel
from megacore.mesh.collectives import (
    all_gather,
    all_gather_start,
    all_reduce,
    all_reduce_start,
    reduce_scatter,
    reduce_scatter_start,
)
from megacore.parallel.parameters import ParameterMaker
from megacore.parallel.tensor import TensorParallel


class _ColumnParallel(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_ti: Tensor,
        weight_oi: Tensor,
        bias_o: Tensor | None,
        tp: TensorParallel,
        kernel: LinearKernel,
    ) -> Tensor:
        whole_ti = all_gather(x_ti, tp.group) if tp.sequence else x_ti
        ctx.save_for_backward(x_ti if tp.regather else whole_ti)
        ctx.weight, ctx.bias, ctx.tp, ctx.kernel = weight_oi, bias_o, tp, kernel
        y_to = kernel.forward(whole_ti, weight_oi)
        return y_to if bias_o is None else y_to.add_(bias_o)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_to: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, None, None]:
        (x_ti,), tp, kernel = ctx.saved_tensors, ctx.tp, ctx.kernel
        gathering = all_gather_start(x_ti, tp.group) if tp.sequence and tp.regather else None
        grad_ti = kernel.dgrad(grad_to, ctx.weight)
        start = reduce_scatter_start if tp.sequence else all_reduce_start
        summing = start(grad_ti, tp.group)
        if gathering is not None:
            x_ti = gathering.wait()
        grad_weight = tp.wgrad.linear(kernel, ctx.weight, x_ti, grad_to)
        grad_bias = None if ctx.bias is None else tp.wgrad.bias(ctx.bias, grad_to)
        return summing.wait(), grad_weight, grad_bias, None, None


class _RowParallel(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_ti: Tensor,
        weight_oi: Tensor,
        bias_o: Tensor | None,
        tp: TensorParallel,
        kernel: LinearKernel,
    ) -> Tensor:
        ctx.save_for_backward(x_ti)
        ctx.weight, ctx.bias, ctx.tp, ctx.kernel = weight_oi, bias_o, tp, kernel
        y_to = (reduce_scatter if tp.sequence else all_reduce)(kernel.forward(x_ti, weight_oi), tp.group)
        return y_to if bias_o is None else y_to.add_(bias_o)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_to: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, None, None]:
        (x_ti,), tp, kernel = ctx.saved_tensors, ctx.tp, ctx.kernel
        whole_to = all_gather(grad_to, tp.group) if tp.sequence else grad_to
        grad_ti = kernel.dgrad(whole_to, ctx.weight)
        grad_weight = tp.wgrad.linear(kernel, ctx.weight, x_ti, whole_to)
        grad_bias = None if ctx.bias is None else tp.wgrad.bias(ctx.bias, grad_to)
        return grad_ti, grad_weight, grad_bias, None, None


class ColumnParallelLinear(nn.Module):
    """y [t, o/tp] of x [t, i] (x [t/tp, i] under sequence parallelism): each rank computes its outputs."""

    def __init__(self, make: ParameterMaker, tp: TensorParallel) -> None:
        super().__init__()
        self.weight = make("weight")
        self.bias = make.optional("bias")
        self.tp, self.kernel = tp, tp.kernel_of(make.prefix.rstrip("."))

    def forward(self, x_ti: Tensor) -> Tensor:
        return _ColumnParallel.apply(x_ti, self.weight, self.bias, self.tp, self.kernel)

    def product(self, x_ti: Tensor) -> Tensor:
        """y without the bias, which somebody else adds."""
        return _ColumnParallel.apply(x_ti, self.weight, None, self.tp, self.kernel)


class RowParallelLinear(nn.Module):
    """y [t, o] (y [t/tp, o] under sequence parallelism) of x [t, i/tp]: the sum over ranks of their inputs' parts."""

    def __init__(self, make: ParameterMaker, tp: TensorParallel) -> None:
        super().__init__()
        self.weight = make("weight")
        self.bias = make.optional("bias")
        self.tp, self.kernel = tp, tp.kernel_of(make.prefix.rstrip("."))

    def forward(self, x_ti: Tensor) -> Tensor:
        return _RowParallel.apply(x_ti, self.weight, self.bias, self.tp, self.kernel)


def make_column(make: ParameterMaker, tp: TensorParallel) -> nn.Module:
    """A block's column-parallel layer, of the kind that the run has chosen."""
    return (tp.modules.column if tp.modules else ColumnParallelLinear)(make, tp)


def make_row(make: ParameterMaker, tp: TensorParallel) -> nn.Module:
    """A block's row-parallel layer, of the kind that the run has chosen."""
    return (tp.modules.row if tp.modules else RowParallelLinear)(make, tp)


def column_parallel(x_ti: Tensor, weight_oi: Tensor, tp: TensorParallel) -> Tensor:
    """The column-parallel product with a weight that lives elsewhere (a tied embedding)."""
    return _ColumnParallel.apply(x_ti, weight_oi, None, tp, tp.linear)
