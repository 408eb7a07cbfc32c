"""Collectives as ranges in a profile: `tp all_reduce` where one begins, and again where it is waited for."""

from functools import partial
from typing import Any

from torch import Tensor

from megacore.mesh.group import Group, Pending, Ranges


def named(backend: Any, group: Group) -> Any:
    """The backend itself, unless somebody looks on."""
    if group.log is None or group.log.ranges is None:
        return backend
    return _Named(backend, group.axis, group.log.ranges)


class _Named:
    """A backend whose functions are ranges, and what they leave to be waited for, too."""

    def __init__(self, backend: Any, axis: str, ranges: Ranges) -> None:
        self.backend, self.axis, self.ranges = backend, axis, ranges

    def __getattr__(self, operation: str) -> Any:
        return partial(self._call, getattr(self.backend, operation), f"{self.axis} {operation}")

    def _call(self, function: Any, name: str, *args: Any) -> Any:
        with self.ranges(name):
            begun = function(*args)
        if isinstance(begun, list):
            return [self._waiting(each, name) for each in begun]
        return None if begun is None else self._waiting(begun, name)

    def _waiting(self, pending: Pending, name: str) -> Pending:
        def finish() -> Tensor:
            with self.ranges(name):
                return pending.wait()

        return Pending(finish)
