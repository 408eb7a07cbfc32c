"""Embedding whose vocabulary is split over tp (Shoeybi et al. 2019, section 3).

Each rank looks up the tokens whose rows it holds and gives zeros for the others; the sum over ranks is the whole
look-up. Vocabularies need not divide: the first ranks hold one row more.
"""

from typing import Any

from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from megacore.layout.partition import Piece
from megacore.mesh.autograd import reduce_from, reduce_scatter_to
from megacore.parallel.parameters import ParameterMaker
from megacore.parallel.tensor import TensorParallel
from megacore.parallel.wgrad import WeightGradients


class _Lookup(Function):
    """Rows of the local table; its gradient is added row by row, never made as a whole table."""

    @staticmethod
    def forward(
        ctx: Any, token_t: Tensor, weight_vh: Tensor, first_row: int, whole: bool, wgrad: WeightGradients
    ) -> Tensor:
        local_t = token_t - first_row
        inside_t = (local_t >= 0) & (local_t < weight_vh.shape[0])
        ctx.weight, ctx.whole, ctx.wgrad = weight_vh, whole, wgrad
        if whole:
            ctx.save_for_backward(local_t)
            return weight_vh[local_t]
        if not weight_vh.shape[0]:
            ctx.save_for_backward(local_t[:0])
            return weight_vh.new_zeros(token_t.shape[0], weight_vh.shape[1])
        # other ranks' tokens take some row of ours, which is then cleared (not all the same one, that would have to add
        # up their zeros one by one): to leave them out, the host would have to wait for their number
        row_t, outside_t1 = local_t.remainder(weight_vh.shape[0]), ~inside_t[:, None]
        ctx.save_for_backward(row_t, outside_t1)
        return weight_vh[row_t].masked_fill_(outside_t1, 0.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_th: Tensor) -> tuple[None, Tensor | None, None, None, None]:
        row_t, *outside = ctx.saved_tensors
        if outside:
            grad_th = grad_th.masked_fill(outside[0], 0.0)
        return None, ctx.wgrad.rows(ctx.weight, row_t, grad_th[: len(row_t)]), None, None, None


class VocabParallelEmbedding(nn.Module):
    """x [t, h] (x [t/tp, h] under sequence parallelism) of tokens [t]."""

    def __init__(self, make: ParameterMaker, vocab: Piece | None, tp: TensorParallel) -> None:
        super().__init__()
        self.weight = make("weight")
        self.first_row = vocab.start if vocab else 0
        self.tp = tp

    def forward(self, token_t: Tensor) -> Tensor:
        part_th = _Lookup.apply(token_t, self.weight, self.first_row, self.tp.group.size == 1, self.tp.wgrad)
        return (reduce_scatter_to if self.tp.sequence else reduce_from)(part_th, self.tp.group)


class PositionEmbedding(nn.Module):
    """Learned rows per position, whole on every rank; x [t, h] of positions [t]."""

    def __init__(self, make: ParameterMaker, tp: TensorParallel) -> None:
        super().__init__()
        self.weight = make("weight")
        self.wgrad = tp.wgrad

    def forward(self, position_t: Tensor) -> Tensor:
        return _Lookup.apply(position_t, self.weight, 0, True, self.wgrad)


def vocab_piece(vocab_pieces: tuple[Piece, ...]) -> Piece | None:
    """The single run of vocabulary rows that a rank holds; None where there are more ranks than rows."""
    assert len(vocab_pieces) <= 1, vocab_pieces
    return vocab_pieces[0] if vocab_pieces else None
