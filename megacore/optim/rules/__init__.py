"""Optimizers, one a file: ``optim.name`` is the file's name, so that adding one takes one file."""

from collections.abc import Mapping
from importlib import import_module

from megacore.optim.rule import Rule, Share


def make_rule(name: str, share: Share, settings: Mapping[str, float]) -> Rule:
    """The optimizer ``name`` (see ``config.optimizers``); ``settings`` has a value for each of its ``DEFAULTS``."""
    module = import_module(f"{__name__}.{name.replace('-', '_')}")
    found = [
        kind
        for kind in vars(module).values()
        if isinstance(kind, type) and issubclass(kind, Rule) and kind.__module__ == module.__name__
    ]
    assert len(found) == 1, f"{module.__name__} must hold one Rule, not {found}"
    return found[0](share, settings)
