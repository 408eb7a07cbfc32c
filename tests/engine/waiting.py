"""Counts what would make the host wait for a device: on the CPU nothing waits, but it is called all the same."""

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import megacore

HOUSE = str(Path(megacore.__file__).parent)
READS = frozenset({"tolist", "numpy", "cpu", "item", "__bool__", "__float__", "__int__", "__index__", "__array__"})
"""Methods that give numbers to the host."""
OPERATIONS = frozenset(
    {
        "_local_scalar_dense",
        "is_nonzero",
        "equal",
        "nonzero",
        "masked_select",
        "unique_dim",
        "_unique2",
        "unique_consecutive",
        "lift_fresh",  # numbers of the host become a tensor
        "repeat_interleave",
        "bincount",
    }
)
"""Operations whose result, or whose shape, the host must know."""
INDEXED = frozenset({"index", "index_put", "index_put_", "_index_put_impl_"})
"""Which make a mask into places, of which there are as many as it has ones."""

Calls = Counter[tuple[str, str]]
"""(what, function of ours that called it)"""


class _Operations(TorchDispatchMode):
    def __init__(self, calls: Calls) -> None:
        super().__init__()
        self.calls = calls

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.partition("::")[2]
        masked = name in INDEXED and any(each is not None and each.dtype == torch.bool for each in args[1])
        if name in OPERATIONS or masked:
            self.calls[name, caller()] += 1
        return func(*args, **(kwargs or {}))


def _counted(name: str, calls: Calls) -> Any:
    own = getattr(torch.Tensor, name)

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls[name, caller()] += 1
        return own(*args, **kwargs)

    return counted


@contextmanager
def counting() -> Iterator[Calls]:
    """What is called within, in this thread, backward included."""
    calls: Calls = Counter()
    with pytest.MonkeyPatch.context() as patch, _Operations(calls):
        for name in READS:  # methods, since torch's modes for functions do not reach into backward
            patch.setattr(torch.Tensor, name, _counted(name, calls))
        yield calls


def caller() -> str:
    """The innermost function of ours, "?" where there is none."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and not frame.f_code.co_filename.startswith(HOUSE):
        frame = frame.f_back
    return "?" if frame is None else frame.f_code.co_name
