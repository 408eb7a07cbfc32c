"""Linear layers that are transformer-engine's ``te.Linear``, to the contract of those in ``linear``.

Its modules multiply and talk to the tp group themselves, forward and backward. All else stays ours: parameters, under
their global names, filled and placed like any others (the module's weight is set to our tensor); biases, which it would
add up in 16 bits, and lose where weight gradients are put off; and the moment at which put-off work is done. Weight
gradients are added to the flat buffer by its own product (``fuse_wgrad_accumulation`` writes ``weight.main_grad``).

Its first microbatch of a step replaces what is in ``main_grad`` where weights are kept in FP8: those are zeros, and
schedules are checked to go backward in ascending order of microbatches.

Never run on a GPU: tests hold every call against the sources of the package, and run this file on a stand-in.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from megacore.mesh.group import Group
from megacore.parallel.parameters import ParameterMaker
from megacore.parallel.tensor import TensorParallel

DIRECTIONS, REMEMBERED = ("scaling_fwd", "scaling_bwd"), ("amax_history", "scale")
"""What a module with delayed scales has in ``fp8_meta``."""


class _AddBias(Function):
    """y [t, o] + bias [o]; the bias' gradient goes where all gradients go."""

    @staticmethod
    def forward(ctx: Any, y_to: Tensor, bias_o: Tensor, tp: TensorParallel) -> Tensor:
        ctx.bias, ctx.tp = bias_o, tp
        return y_to + bias_o

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_to: Tensor) -> tuple[Tensor, Tensor | None, None]:
        return grad_to, ctx.tp.wgrad.bias(ctx.bias, grad_to), None


class _Behind(Function):
    """x itself; ``work`` is due when its gradient is there: now, or later where that is put off."""

    @staticmethod
    def forward(ctx: Any, x_ti: Tensor, work: Callable[[], object], tp: TensorParallel) -> Tensor:
        ctx.work, ctx.tp = work, tp
        return x_ti.view_as(x_ti)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_ti: Tensor) -> tuple[Tensor, None, None]:
        ctx.tp.wgrad.due(ctx.work)
        return grad_ti, None, None


class TransformerEngine:
    """All linear layers of a rank that are transformer-engine's.

    ``linear`` is its class; ``layers`` are the global names of those that multiply in FP8, as ``recipe`` says (None:
    none do). ``amax`` are the ranks that agree on the largest elements, with delayed scales. ``keeps``: weights in FP8
    are kept over microbatches. ``splits``: schedules put weight gradients off.
    """

    everywhere = False
    """Whether all ranks remember the same: each of the layers that it has."""

    def __init__(
        self,
        linear: Callable[..., Any],
        layers: Iterable[str] = (),
        recipe: Any = None,
        amax: Group | None = None,
        keeps: bool = False,
        splits: bool = False,
    ) -> None:
        self.linear, self.layers, self.recipe, self.amax = linear, frozenset(layers), recipe, amax
        self.keeps, self.splits = keeps and recipe is not None, splits
        self.made: dict[str, Linear] = {}
        """The layers of this rank by their global names."""

    def column(self, make: ParameterMaker, tp: TensorParallel) -> "Linear":
        """As ``linear.ColumnParallelLinear``."""
        return self._make(make, tp, "column")

    def row(self, make: ParameterMaker, tp: TensorParallel) -> "Linear":
        """As ``linear.RowParallelLinear``."""
        return self._make(make, tp, "row")

    def _make(self, make: ParameterMaker, tp: TensorParallel, mode: str) -> "Linear":
        name = make.prefix.rstrip(".")
        layer = self.made[name] = Linear(make, tp, mode, self, name in self.layers)
        return layer

    @contextmanager
    def within(self) -> Iterator[None]:
        """Around the forward of a stage, or of a unit. Evaluation leaves no trace in what delayed scales remember."""
        if self.recipe is None:
            yield
            return
        seen = [] if torch.is_grad_enabled() else [each[0] for each in self._remembered("amax_history").values()]
        before = [each.clone() for each in seen]
        with self._autocast(enabled=True):
            yield
        if seen:
            torch._foreach_copy_(seen, before)

    def begin(self, measures: bool = False) -> None:
        """A training step begins, with new weights."""
        for layer in self.made.values():
            layer.fresh = True

    def finish(self) -> None:
        """It ends; products are not measured."""

    def renew(self) -> None:
        """All weights may have changed: each step brings them into FP8 anyway."""

    def forget(self, names: Iterable[str]) -> None:
        """Parameters have no memory any more. Nothing is kept where that happens (ZeRO-3)."""

    @torch.no_grad()
    def prepare(self) -> None:
        """Have everything that ``state`` lists made now, not in the first forward."""
        if self.recipe is not None:
            with self._autocast(enabled=True):
                for layer in self._in_fp8().values():
                    layer.inner.init_fp8_metadata()

    def state(self) -> Mapping[str, Tensor]:
        """What a checkpoint must hold of this rank's layers, and a resumed run writes back into these very tensors:
        with delayed scales the largest elements [forward or backward, tensor] and the scales. Another length is another
        state."""
        found: dict[str, Tensor] = {}
        for what in REMEMBERED:
            found |= {f"{key}.{what}": tensor for key, tensor in self._remembered(what).items()}
        return found

    def _remembered(self, what: str) -> dict[str, Tensor]:
        length = getattr(self.recipe, "amax_history_len", 0)
        return {
            f"te{length}/{name}/{direction}": getattr(layer.inner.fp8_meta[direction], what)
            for name, layer in (self._in_fp8().items() if length else ())
            for direction in DIRECTIONS
        }

    def _in_fp8(self) -> dict[str, "Linear"]:
        return {name: layer for name, layer in self.made.items() if layer.in_fp8}

    def _autocast(self, enabled: bool) -> Any:
        group = None if self.amax is None else self.amax.handle
        return _pytorch().autocast(enabled=enabled, recipe=self.recipe, amax_reduction_group=group)

    def around(self, in_fp8: bool) -> Any:
        """Around the forward of one layer: those that stay in the format of training leave FP8."""
        return nullcontext() if in_fp8 or self.recipe is None else self._autocast(enabled=False)


class Linear(nn.Module):
    """A column- or row-parallel layer (``mode``); shapes as those of ``linear``."""

    def __init__(
        self, make: ParameterMaker, tp: TensorParallel, mode: str, engine: TransformerEngine, in_fp8: bool
    ) -> None:
        super().__init__()
        self.weight = make("weight")
        self.bias = make.optional("bias")
        self.tp, self.engine, self.in_fp8, self.fresh = tp, engine, in_fp8, True
        num_outputs, num_inputs = self.weight.shape
        of_outputs, of_inputs = (tp.group.size, 1) if mode == "column" else (1, tp.group.size)
        inner = engine.linear(
            in_features=num_inputs * of_inputs,
            out_features=num_outputs * of_outputs,
            bias=False,
            sequence_parallel=tp.sequence,
            tp_group=tp.group.handle,
            tp_size=tp.group.size,
            parallel_mode=mode,
            params_dtype=self.weight.dtype,
            fuse_wgrad_accumulation=True,
            delay_wgrad_compute=engine.splits,
            device="meta",  # no memory, and no random numbers: the weight is ours
        )
        inner.weight = self.weight
        self._inner = (inner,)  # no child: parameters are listed once, under our names

    @property
    def inner(self) -> Any:
        """transformer-engine's module."""
        return self._inner[0]

    def forward(self, x_ti: Tensor) -> Tensor:
        trains = torch.is_grad_enabled()
        if trains and self.engine.splits and self.weight.requires_grad:
            # put-off work is known of when x has its gradient, so it must have one
            x_ti = x_ti if x_ti.requires_grad else x_ti.detach().requires_grad_()
            x_ti = _Behind.apply(x_ti, self.inner.backward_dw, self.tp)
        first = None
        if trains and self.engine.keeps and self.in_fp8:
            first, self.fresh = self.fresh, False
        with self.engine.around(self.in_fp8):
            y_to = self.inner(x_ti, is_first_microbatch=first)
        return y_to if self.bias is None else _AddBias.apply(y_to, self.bias, self.tp)


def recipe_of(fp8: str, history: int, margin: int, agree: bool) -> Any:
    """transformer-engine's recipe of `precision.fp8`; ``agree``: delayed scales come from what all ranks have seen."""
    recipes = import_module("transformer_engine.common.recipe")
    if fp8 == "delayed":
        return recipes.DelayedScaling(
            margin=margin, amax_history_len=history, amax_compute_algo="max", reduce_amax=agree
        )
    return recipes.Float8CurrentScaling() if fp8 == "current" else recipes.Float8BlockScaling()


def no_fp8(fp8: str) -> str:
    """Why transformer-engine has no FP8 of this kind here, or ''."""
    pytorch = _pytorch()
    asked = pytorch.is_fp8_block_scaling_available if fp8 == "block" else pytorch.is_fp8_available
    there, reason = asked(return_reason=True)
    return "" if there else reason or "transformer-engine does not say why"


def _pytorch() -> Any:
    return import_module("transformer_engine.pytorch")
