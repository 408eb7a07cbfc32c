"""What each optimizer may be told and what it remembers, read from its source without importing it.

An optimizer is a file of ``megacore/optim/rules``. It says two things in tables of literals:

    DEFAULTS = MappingProxyType({"beta1": 0.9, ...})       hyper-parameters and their usual values
    STATE = MappingProxyType({"first": "element", ...})    tensors it keeps, each with what it has one number for

so that a run with it can be checked, explained and priced where torch is not installed.

Kinds of state: a ``moment`` has one number per element, in the format ``optim.state_dtype``; a ``square`` is a moment
that is never negative; an ``element`` has one per element in the format of the updated weights; a ``row`` and a
``column`` have one per row or column of every logical matrix (a vector is one column). KIND if SETTING means only where
that hyper-parameter is not 0; "KIND of hidden matrices" and "KIND of the rest" mean only for those parameters.
"""

import ast
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

RULES = Path(__file__).parents[1] / "optim" / "rules"
_HOLDERS = ("hidden matrices", "the rest")


@cache
def optimizer_names() -> tuple[str, ...]:
    """Every optimizer, as ``optim.name`` calls it: its file's name with dashes."""
    return tuple(sorted(path.stem.replace("_", "-") for path in RULES.glob("[!_]*.py")))


def defaults(name: str) -> Mapping[str, float]:
    """The hyper-parameters of an optimizer with their usual values."""
    return _literal(name, "DEFAULTS")


def state(name: str) -> Mapping[str, str]:
    """What an optimizer may keep, by name: a kind, perhaps with a condition."""
    return _literal(name, "STATE")


def kept(
    state: Mapping[str, str], settings: Mapping[str, float], is_hidden_matrix: bool | None = None
) -> Mapping[str, str]:
    """What an optimizer does keep, by name: the kinds of those whose condition holds.

    For all parameters together, or for one that is a hidden layer's matrix or is not.
    """
    holders = {None: _HOLDERS, True: _HOLDERS[:1], False: _HOLDERS[1:]}[is_hidden_matrix]
    found = {}
    for name, text in state.items():
        rest, _, setting = text.partition(" if ")
        kind, _, holder = rest.partition(" of ")
        if (not setting or settings[setting]) and (not holder or holder in holders):
            found[name] = kind
    return found


@cache
def _literal(name: str, variable: str) -> Mapping[str, Any]:
    """A table of literals at the top of the optimizer's file."""
    path = RULES / f"{name.replace('-', '_')}.py"
    for node in ast.parse(path.read_text(encoding="utf-8"), filename=str(path)).body:
        if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == [variable]:
            assert isinstance(node.value, ast.Call), f"{path}: {variable} must be MappingProxyType({{...}})"
            return MappingProxyType(ast.literal_eval(node.value.args[0]))
    raise AssertionError(f"{path} has no {variable}")
