"""Rules of style that a machine can check: state, environment, length, names, prints."""

import ast
import re
import sys
from collections.abc import Iterator

from tests.architecture.sources import ROOT, Source, library, python_files

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60

# Files that may be longer, each with its reason.
LONG_FILES: dict[str, str] = {}

# Where the environment may be read or changed.
USES_ENVIRONMENT = ("launch/", "megacore/train/build.py", "megacore/processes.py")

MUTABLE_CALLS = {
    "list",
    "dict",
    "set",
    "bytearray",
    "defaultdict",
    "OrderedDict",
    "Counter",
    "deque",
    "WeakKeyDictionary",
}
MUTABLE_NODES = (ast.List, ast.Dict, ast.Set, ast.ListComp, ast.DictComp, ast.SetComp)
# A constant, a type alias or a dunder.
CONSTANT_NAME = re.compile(r"_?[A-Z][A-Za-z0-9_]*|__[a-z]+__")

LIBRARY = library()
EVERYTHING = [*LIBRARY, *python_files("tests", "benchmarks")]


def assignments(body: list[ast.stmt]) -> Iterator[tuple[str, ast.expr | None, int]]:
    """(name, value, line) of the assignments right in a module's or a class' body."""
    for node in body:
        if isinstance(node, ast.Assign):
            for target in node.targets:
                for name in ast.walk(target):
                    if isinstance(name, ast.Name):
                        yield name.id, node.value, node.lineno
        elif isinstance(node, (ast.AnnAssign, ast.AugAssign)) and isinstance(node.target, ast.Name):
            yield node.target.id, node.value, node.lineno
        elif isinstance(node, (ast.If, ast.Try)):
            yield from assignments([child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt)])


def is_mutable(value: ast.expr | None) -> bool:
    if isinstance(value, ast.Call):
        called = value.func
        name = called.id if isinstance(called, ast.Name) else called.attr if isinstance(called, ast.Attribute) else ""
        return name in MUTABLE_CALLS
    return isinstance(value, MUTABLE_NODES)


def mutable_state(source: Source) -> Iterator[str]:
    for name, value, line in assignments(source.tree.body):
        if is_mutable(value) and name != "__all__":
            yield f"{source.name}:{line}: {name} is mutable; use a tuple, frozenset or MappingProxyType"
        elif isinstance(value, ast.Constant) and not CONSTANT_NAME.fullmatch(name):
            yield f"{source.name}:{line}: {name} looks like a variable; constants are upper-case"
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Global):
            yield f"{source.name}:{node.lineno}: global {', '.join(node.names)}"
        elif isinstance(node, ast.ClassDef):
            for name, value, line in assignments(node.body):
                if is_mutable(value):
                    yield f"{source.name}:{line}: all instances of {node.name} share the mutable {name}"


def test_no_mutable_module_state():
    wrong = [line for source in LIBRARY for line in mutable_state(source)]
    assert not wrong, "\n".join(wrong)


def test_environment_is_used_in_three_places():
    wrong = []
    for source in LIBRARY:
        if source.name.startswith(USES_ENVIRONMENT):
            continue
        for node in ast.walk(source.tree):
            of_os = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "os"
            names = [node.attr] if of_os else []
            if isinstance(node, ast.ImportFrom) and node.module == "os":
                names = [alias.name for alias in node.names]
            if {"environ", "environb", "getenv", "getenvb", "putenv", "unsetenv"} & set(names):
                wrong.append(f"{source.name}:{node.lineno}: {names}")
    assert not wrong, "\n".join(wrong)


def test_files_are_short():
    long = {source.name: len(source.code_lines) for source in EVERYTHING if len(source.code_lines) > MAX_FILE_LINES}
    for path in sorted((ROOT / "csrc").rglob("*")):
        if path.suffix in (".cpp", ".cu", ".h", ".cuh"):
            text = re.sub(r"/\*.*?\*/|//[^\n]*", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
            count = sum(1 for line in text.splitlines() if line.strip())
            if count > MAX_FILE_LINES:
                long[path.relative_to(ROOT).as_posix()] = count
    assert long.keys() == LONG_FILES.keys(), long


def test_functions_are_short():
    wrong = []
    for source in LIBRARY:
        for node in ast.walk(source.tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                lines = source.code_lines & set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
                if len(lines) > MAX_FUNCTION_LINES:
                    wrong.append(f"{source.name}:{node.lineno}: {node.name} has {len(lines)} lines of code")
    assert not wrong, "\n".join(wrong)


def test_faces_do_not_shadow_the_standard_library():
    """A script's folder comes first on sys.path: `tools/inspect.py` would replace `inspect` for everybody."""
    faces = [source for source in LIBRARY if source.room in ("tools", "launch")]
    assert not [source.name for source in faces if source.path.stem in sys.stdlib_module_names]


def test_the_library_does_not_print():
    wrong = []
    for source in LIBRARY:
        if source.room in ("tools", "launch") or source.name == "megacore/__main__.py":
            continue
        for node in ast.walk(source.tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
                wrong.append(f"{source.name}:{node.lineno}")
    assert not wrong, "\n".join(wrong)


def test_modules_and_public_names_have_docstrings():
    wrong = []
    for source in LIBRARY:
        if ast.get_docstring(source.tree) is None:
            wrong.append(f"{source.name}: the module")
        for node in source.tree.body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
                if ast.get_docstring(node) is None:
                    wrong.append(f"{source.name}:{node.lineno}: {node.name}")
    assert not wrong, "without a docstring:\n" + "\n".join(wrong)
