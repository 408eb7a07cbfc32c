"""What a package that is called has, read from its sources without importing them.

It may be installed, or its pure wheel alone be unpacked in ``contracts`` of the environment (``tests/run.sh`` puts that
of transformer-engine there), where nothing that looks for the package itself takes it for a working one.
"""

import ast
import sys
from collections.abc import Iterator
from functools import cache
from importlib.machinery import PathFinder
from importlib.util import find_spec
from pathlib import Path

import pytest

UNPACKED = Path(sys.prefix) / "contracts"


@cache
def folders(package: str) -> tuple[Path, ...]:
    """Where its sources lie; skips where it is not there."""
    spec = find_spec(package) or PathFinder.find_spec(package, [str(UNPACKED)])
    if spec is None or not spec.submodule_search_locations:
        pytest.skip(f"{package} is not installed")
    return tuple(map(Path, spec.submodule_search_locations))


def definitions(tree: ast.AST, within: str = "") -> Iterator[tuple[str, list[str]]]:
    """Functions, classes and their methods, with the names of their arguments; a class has those of its __init__."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef):
            args = node.args
            names = [each.arg for each in (*args.posonlyargs, *args.args, *args.kwonlyargs)]
            yield within + node.name, [*names, *([f"*{args.vararg.arg}"] if args.vararg else [])]
        elif isinstance(node, ast.ClassDef):
            methods = dict(definitions(node, f"{node.name}."))
            yield within + node.name, methods.get(f"{node.name}.__init__", [])
            yield from methods.items()
        else:
            yield from definitions(node, within)


@cache
def sources(package: str) -> dict[str, list[list[str]]]:
    """All definitions of a package by name."""
    found: dict[str, list[list[str]]] = {}
    for folder in folders(package):
        for path in sorted(folder.rglob("*.py")):
            for name, args in definitions(ast.parse(path.read_text(encoding="utf-8"))):
                found.setdefault(name, []).append(args)
    return found
