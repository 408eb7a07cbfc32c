"""Imports go down: the floors of the house, read off every file's import statements."""

import ast
from collections.abc import Iterator

import pytest

from tests.architecture.sources import Source, library

# Room -> floor. A new room is put on this map first.
FLOORS = {
    "config": 0,
    "layout": 0,
    "spec": 0,
    "schedule": 0,
    "cost": 0,
    "mesh": 1,
    "kernels": 1,
    "data": 1,
    "parallel": 2,
    "sharding": 2,
    "model": 3,
    "optim": 3,
    "pipeline": 4,
    "checkpoint": 4,
    "hf": 4,
    "train": 5,
    "verify": 5,
    "bench": 5,
    "monitor": 5,
    "doctor": 5,
    "generate": 5,
    "corpora": 5,
    "demo": 5,
    "launch": 6,
    "tools": 6,
}

# Which rooms of its own floor a room may know.
NEIGHBOURS = {
    "layout": {"config"},
    "spec": {"config", "layout"},
    "schedule": {"config", "layout", "spec"},
    "cost": {"config", "layout", "spec", "schedule"},
    "train": {"monitor", "generate"},
    "verify": {"train", "monitor"},
    "bench": {"train", "monitor", "verify"},
    "corpora": {"monitor"},
    "demo": {"monitor", "verify"},
    "doctor": {"monitor"},
    "tools": {"launch"},
}

SOURCES = library()
MODULES = frozenset(source.module for source in SOURCES)
BY_MODULE = {source.module: source for source in SOURCES}


def own_imports(source: Source, for_types: bool = True) -> Iterator[tuple[str, int]]:
    """Imports of our own modules."""
    for name, line in source.imports(MODULES, for_types):
        if name in MODULES and name != source.module:
            yield name, line


def test_every_room_has_a_floor():
    assert not {source.room for source in SOURCES} - FLOORS.keys() - {""}, "put the room on the map FLOORS"


def test_imports_go_down():
    wrong = []
    for source in SOURCES:
        for name, line in own_imports(source):
            room = BY_MODULE[name].room
            if not room or not source.room or room == source.room:
                continue
            down = FLOORS[room] < FLOORS[source.room]
            if not down and room not in NEIGHBOURS.get(source.room, ()):
                wrong.append(f"{source.name}:{line}: {source.room} must not import {name}")
    assert not wrong, "\n".join(wrong)


def test_nothing_imports_the_command_table():
    assert not [source.name for source in SOURCES if "megacore.__main__" in dict(own_imports(source))]


def test_no_import_cycles():
    graph = {source.module: {name for name, _ in own_imports(source, for_types=False)} for source in SOURCES}
    # A package's own __init__ gathers its modules; they import each other, not it. Importing `megacore.x.y` also
    # runs `megacore.x.__init__`, but that edge exists in every package and says nothing.
    done: set[str] = set()
    path: list[str] = []

    def visit(module: str) -> None:
        if module in path:
            pytest.fail("import cycle: " + " -> ".join([*path[path.index(module) :], module]))
        if module not in done:
            path.append(module)
            for other in sorted(graph[module]):
                visit(other)
            done.add(path.pop())

    for module in sorted(graph):
        visit(module)


@pytest.mark.parametrize("room", [room for room, floor in FLOORS.items() if floor == 0])
def test_floor_0_knows_no_torch(room):
    """Not even inside a function: planning must run where torch is not installed."""
    allowed = {"numpy", "matplotlib", "megacore"}
    heavy = {"torch", "triton", "transformers", "safetensors", "pyarrow", "tokenizers", "sentencepiece"} - allowed
    wrong = [
        f"{source.name}:{line}: {name}"
        for source in SOURCES
        if source.room == room
        for name, line in source.imports(MODULES)
        if name.split(".")[0] in heavy
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("room", ["data", "corpora", "demo", "tools"])
def test_torch_is_not_imported_at_the_top(room):
    """These answer on the command line at once; what needs torch imports it when it is called."""
    wrong = []
    for source in SOURCES:
        if source.room == room:
            for node in source.tree.body:
                names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
                names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                wrong += [f"{source.name}:{node.lineno}" for name in names if name.split(".")[0] == "torch"]
    assert not wrong, "\n".join(wrong)
