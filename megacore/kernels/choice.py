"""How one of several backends of an operation is taken, and the story that is told of it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch


@dataclass(frozen=True)
class Later:
    """A function whose module is imported when it is chosen or called: it needs a package that may not be there."""

    module: str
    name: str

    def load(self) -> Any:
        """The function itself."""
        return getattr(import_module(self.module), self.name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.load()(*args, **kwargs)


@dataclass(frozen=True)
class Kernel:
    """One implementation of an operation. ``refuses`` gives the reason why it cannot serve, or ''.

    One that is not ``by_default`` is taken only where it is named: nobody has measured it yet where it runs.
    """

    operation: str
    backend: str
    function: Any
    refuses: Callable[..., str] = lambda device, dtype: ""
    by_default: bool = True

    @property
    def loaded(self) -> Any:
        """``function``, imported."""
        return self.function.load() if isinstance(self.function, Later) else self.function


@dataclass(frozen=True)
class Choice:
    """What was chosen for an operation, and why not the others."""

    operation: str
    backend: str
    rejected: tuple[str, ...]


def first_willing(
    candidates: Sequence[Kernel], device: torch.device, dtype: torch.dtype, wanted: str = ""
) -> tuple[Kernel, Choice]:
    """The first of an operation's backends that accepts the device and dtype, or the one named ``wanted`` if it does.

    Raises ValueError if there is none.
    """
    operation = candidates[0].operation
    rejected: list[str] = []
    for kernel in candidates:
        if wanted in ("", kernel.backend):
            if not (reason := reason_against(kernel, device, dtype, bool(wanted))):
                return kernel, Choice(operation, kernel.backend, tuple(rejected))
            rejected.append(f"{kernel.backend}: {reason}")
    why = "; ".join(rejected) or f"no backend {wanted!r}"
    raise ValueError(f"kernels: no {operation} for {dtype} on {device}: {why}")


def reason_against(kernel: Kernel, device: torch.device, dtype: torch.dtype, named: bool) -> str:
    """Why a backend cannot be taken, or ''."""
    reason = kernel.refuses(device, dtype)
    if reason or named or kernel.by_default:
        return reason
    return f"its speed on {device.type} has not been measured; kernels.use={kernel.operation}={kernel.backend} takes it"
