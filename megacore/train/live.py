"""How much memory tensors hold while something runs on the meta device, and attention as it is saved on real ones."""

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class LiveBytes(TorchDispatchMode):
    """Within: ``now`` and ``peak`` bytes of the memory that operations have made, to the byte and without an
    allocator's rounding. What kernels use inside themselves is not seen."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self,
        function: Callable[..., Any],
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        known = {each.untyped_storage()._cdata for each in tree_iter((args, kwargs)) if isinstance(each, Tensor)}
        result = function(*args, **(kwargs or {}))
        for each in (result,) if isinstance(result, Tensor) else tree_iter(result):
            if isinstance(each, Tensor):
                self._note(each.untyped_storage(), known)
        return result

    def _note(self, storage: torch.UntypedStorage, given: set[int]) -> None:
        place, size = storage._cdata, storage.nbytes()
        if place in self._known or place in given:  # what came from outside is not ours to count
            return
        self._known.add(place)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._freed, place, size)

    def _freed(self, place: int, size: int) -> None:
        self._known.discard(place)
        self.now -= size


class FlashAttention(TorchFunctionMode):
    """torch's attention, which makes all scores on the meta device, by the operation that a real one would run: it
    saves its output and one number per row, as kernels for GPUs do."""

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        if function is F.scaled_dot_product_attention:
            kwargs.pop("enable_gqa", None)
            return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*args, **kwargs)[0]
        return function(*args, **kwargs)
