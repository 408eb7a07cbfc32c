"""A stand-in for transformer-engine, of the parts that are called: plain PyTorch on any device, in any precision.

Signatures are those of the package, which ``tests/parallel/test_contract.py`` holds against its sources, and so is what
it does with what it is given, as far as our side depends on it: who talks to whom, when ``main_grad`` is replaced and
when added to, what is kept over microbatches, what is put off, and when largest elements are agreed on.
"""

import sys
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, distributed, nn

from megacore.kernels import transformer_engine

E4M3_LARGEST, E5M2_LARGEST = 448.0, 57344.0


@dataclass
class DelayedScaling:
    margin: int = 0
    amax_history_len: int = 1024
    amax_compute_algo: str = "max"
    reduce_amax: bool = True


@dataclass
class Float8CurrentScaling:
    pass


@dataclass
class Float8BlockScaling:
    pass


@dataclass
class State:
    """What the package knows of a process, and what was asked of it."""

    enabled: bool = False
    recipe: Any = None
    group: Any = None
    depth: int = 0
    first: bool = False
    known: list["Linear"] = field(default_factory=list)
    """Modules whose largest elements are agreed on."""
    calls: list[tuple["Linear", bool, bool | None]] = field(default_factory=list)
    """(module, in FP8, is_first_microbatch) of every forward."""
    reductions: list[tuple[str, int]] = field(default_factory=list)
    """(direction, number of ranks that agreed) of every update of scales."""
    no_fp8: str = ""


_STATE = State()


class autocast:  # noqa: N801
    def __init__(
        self,
        enabled: bool = True,
        calibrating: bool = False,
        recipe: Any = None,
        amax_reduction_group: Any = None,
        _graph: bool = False,
    ) -> None:
        self.enabled, self.recipe, self.group = enabled, recipe, amax_reduction_group

    def __enter__(self) -> "autocast":
        s = _STATE
        self.before = s.enabled, s.recipe, s.group, s.first
        s.enabled, s.recipe, s.group = self.enabled, self.recipe, self.group
        if s.depth == 0:
            s.first = True
        s.depth += 1
        return self

    def __exit__(self, *ignored: object) -> None:
        s = _STATE
        s.enabled, s.recipe, s.group, s.first = self.before
        s.depth -= 1
        if self.enabled and s.depth == 0 and torch.is_grad_enabled():
            update("scaling_fwd")


def is_fp8_available(return_reason: bool = False) -> Any:
    return (not _STATE.no_fp8, _STATE.no_fp8) if return_reason else not _STATE.no_fp8


def is_fp8_block_scaling_available(return_reason: bool = False) -> Any:
    return is_fp8_available(return_reason)


class Linear(nn.Module):
    def __init__(
        self,
        in_features: int,
        out_features: int,
        sequence_parallel: bool = False,
        fuse_wgrad_accumulation: bool = False,
        tp_group: Any = None,
        tp_size: int = 1,
        bias: bool = True,
        params_dtype: torch.dtype | None = None,
        parallel_mode: str | None = None,
        device: Any = "cuda",
        delay_wgrad_compute: bool = False,
    ) -> None:
        super().__init__()
        assert not bias and fuse_wgrad_accumulation and parallel_mode in ("column", "row"), "not stood in for"
        assert tp_size == (1 if tp_group is None else distributed.get_world_size(tp_group))
        self.mode, self.group, self.size = parallel_mode, tp_group, tp_size
        self.sequence = sequence_parallel and tp_size > 1
        assert (out_features if parallel_mode == "column" else in_features) % tp_size == 0
        rows = out_features // (tp_size if parallel_mode == "column" else 1)
        columns = in_features // (tp_size if parallel_mode == "row" else 1)
        self.weight = nn.Parameter(torch.empty(rows, columns, device=device, dtype=params_dtype))
        self.shape = (rows, columns)
        self.store: deque[Callable[[], object]] | None = deque() if delay_wgrad_compute else None
        self.fp8_meta: dict[str, Any] = {}
        self.workspace: Tensor | None = None

    def init_fp8_metadata(self, num_gemms: int = 1) -> None:
        if _STATE.enabled and isinstance(_STATE.recipe, DelayedScaling) and not self.fp8_meta:
            length = _STATE.recipe.amax_history_len
            for name, number in (("scaling_fwd", 3), ("scaling_bwd", 2)):
                history, scale = torch.zeros(length, number * num_gemms), torch.ones(number * num_gemms)
                self.fp8_meta[name] = SimpleNamespace(amax_history=history, scale=scale)
            self.fp8_meta["recipe"], self.fp8_meta["fp8_group"] = _STATE.recipe, _STATE.group

    def forward(
        self,
        inp: Tensor,
        is_first_microbatch: bool | None = None,
        fp8_output: bool = False,
        fp8_grad: bool = False,
    ) -> Tensor:
        assert not self.weight.is_meta and tuple(self.weight.shape) == self.shape
        self.init_fp8_metadata()
        s = _STATE
        if s.enabled and self.fp8_meta and self not in s.known:
            s.known.append(self)
        s.calls.append((self, s.enabled, is_first_microbatch))
        weight: Tensor = self.weight
        if s.enabled:
            assert inp[0].numel() % 16 == 0 and inp.shape[0] % 8 == 0, "what FP8 asks of shapes"
            if is_first_microbatch is None or is_first_microbatch or self.workspace is None:
                weight = self.rounded(self.weight.detach(), "scaling_fwd", 1)
                self.workspace = None if is_first_microbatch is None else weight
            else:
                weight = self.workspace
        reduces, s.first = s.enabled and s.first, s.first and not s.enabled
        out: Tensor = _Linear.apply(inp, self.weight, weight, self, s.enabled, is_first_microbatch, reduces)
        return out

    def backward_dw(self) -> None:
        if self.store is not None:
            self.store.popleft()()

    def rounded(self, x: Tensor, direction: str, place: int) -> Tensor:
        """What FP8 makes of x: with its own scale, or one of the past."""
        kind, largest = (
            (torch.float8_e5m2, E5M2_LARGEST) if direction == "scaling_bwd" else (torch.float8_e4m3fn, E4M3_LARGEST)
        )
        amax = x.abs().amax().float()
        scale = 2.0 ** torch.floor(torch.log2(largest / amax.clamp(min=1e-20)))
        if self.fp8_meta:
            meta = self.fp8_meta[direction]
            meta.amax_history[0, place] = torch.maximum(meta.amax_history[0, place], amax)
            scale = meta.scale[place]
        return ((x.float() * scale).clamp(-largest, largest).to(kind).float() / scale).to(x.dtype)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, param: Tensor, weight: Tensor, m: Linear, fp8: bool, first: bool | None, reduces: bool
    ) -> Tensor:
        x = m.rounded(x, "scaling_fwd", 0) if fp8 else x
        ctx.x, ctx.param, ctx.weight, ctx.m, ctx.fp8, ctx.first, ctx.reduces = x, param, weight, m, fp8, first, reduces
        y = (gathered(x, m.group) if m.mode == "column" and m.sequence else x) @ weight.t()
        if m.mode == "column" or m.size == 1:
            return y
        return summed(y, m.group, m.sequence)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        m, x, main_grad = ctx.m, ctx.x, None
        grad = m.rounded(grad, "scaling_bwd", 0) if ctx.fp8 else grad
        if m.mode == "row" and m.sequence:
            grad = gathered(grad, m.group)
        dgrad = grad @ (ctx.weight if ctx.fp8 else ctx.param)
        if m.mode == "column" and m.size > 1:
            dgrad = summed(dgrad, m.group, m.sequence)
        if ctx.param.requires_grad:
            main_grad = ctx.param.main_grad
            assert main_grad is not None and main_grad.shape == ctx.param.shape
            x = gathered(x, m.group) if m.mode == "column" and m.sequence else x

            def work() -> None:
                made = grad.to(main_grad.dtype).t() @ x.to(main_grad.dtype)
                main_grad.copy_(made) if ctx.first else main_grad.add_(made)

            work() if m.store is None else m.store.append(work)
        if ctx.reduces:
            update("scaling_bwd")
        return dgrad, *[None] * 6


def gathered(x: Tensor, group: Any) -> Tensor:
    parts = [torch.empty_like(x) for _ in range(distributed.get_world_size(group))]
    distributed.all_gather(parts, x.contiguous(), group=group)
    return torch.cat(parts)


def summed(x: Tensor, group: Any, scatters: bool) -> Tensor:
    whole = x.contiguous()
    distributed.all_reduce(whole, group=group)
    return whole.chunk(distributed.get_world_size(group))[distributed.get_rank(group)].clone() if scatters else whole


def update(direction: str) -> None:
    """Agree on the largest elements of all modules, and make scales of them."""
    if not _STATE.known:
        return
    recipe, group = _STATE.known[0].fp8_meta["recipe"], _STATE.known[0].fp8_meta["fp8_group"]
    metas = [m.fp8_meta[direction] for m in _STATE.known]
    amax, number = torch.cat([meta.amax_history[0] for meta in metas]), 1
    if recipe.reduce_amax and distributed.is_initialized() and (number := distributed.get_world_size(group)) > 1:
        distributed.all_reduce(amax, op=distributed.ReduceOp.MAX, group=group)
    _STATE.reductions.append((direction, number))
    largest = E4M3_LARGEST if direction == "scaling_fwd" else E5M2_LARGEST
    for meta, own in zip(metas, amax.chunk(len(metas)), strict=True):
        meta.amax_history[0] = own
        past = meta.amax_history.amax(0)
        scale = 2.0 ** torch.floor(torch.log2(largest / past.clamp(min=1e-20)) - recipe.margin)
        meta.scale.copy_(torch.where(past > 0, scale, meta.scale))
        meta.amax_history.copy_(meta.amax_history.roll(-1, 0))
        meta.amax_history[0] = 0


@contextmanager
def standing_in() -> Iterator[State]:
    """Within, transformer-engine is this."""
    global _STATE
    _STATE = State()
    pytorch, recipes = ModuleType("transformer_engine.pytorch"), ModuleType("transformer_engine.common.recipe")
    for each in (Linear, autocast, is_fp8_available, is_fp8_block_scaling_available):
        setattr(pytorch, each.__name__, each)
    for each in (DelayedScaling, Float8CurrentScaling, Float8BlockScaling):
        setattr(recipes, each.__name__, each)
    modules = {
        "transformer_engine": ModuleType("transformer_engine"),
        "transformer_engine.pytorch": pytorch,
        "transformer_engine.common": ModuleType("transformer_engine.common"),
        "transformer_engine.common.recipe": recipes,
    }
    before, row = {name: sys.modules.get(name) for name in modules}, transformer_engine.MODULES
    sys.modules.update(modules)
    transformer_engine.MODULES = replace(row, refuses=lambda device, dtype: "")
    try:
        yield _STATE
    finally:
        transformer_engine.MODULES = row
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module
