"""Which index loops run in this process: the compiled ones, else numpy's. Chosen once, and the reason is kept."""

from importlib import import_module
from types import ModuleType

from megacore.data import fallback


def choose() -> tuple[ModuleType, str]:
    """The module with the loops, and why it is that one."""
    try:
        compiled = import_module("megacore.data._native")
    except ImportError as reason:
        return fallback, f"numpy (slower): the compiled helper does not load: {reason}; run pip install again"
    if getattr(compiled, "INTERFACE", None) != fallback.INTERFACE:
        return fallback, "numpy (slower): the compiled helper is of another version; run pip install again"
    return compiled, "compiled"


loops, REASON = choose()
