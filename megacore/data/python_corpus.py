"""Real text that lies on any machine with Python: the language's documentation, docstrings and library sources.

The laptop tour trains on it, so that it needs no download.
"""

import ast
import sysconfig
from collections.abc import Iterable, Iterator
from importlib import import_module
from pathlib import Path

NOT_LIBRARY = frozenset({"site-packages", "test", "tests", "idlelib", "idle_test", "lib2to3", "turtledemo", "pydoc_data"})


def topics() -> Iterator[str]:
    """The pages that `help()` shows for "topics": most of the language reference, about half a megabyte."""
    pages: dict[str, str] = import_module("pydoc_data.topics").topics
    for _, page in sorted(pages.items()):
        yield page.strip()


def library_files() -> list[Path]:
    """The standard library's Python files in a fixed order, top-level modules first, without tests and packages
    that were installed later."""
    root = Path(sysconfig.get_path("stdlib"))
    files = [path for path in root.rglob("*.py") if NOT_LIBRARY.isdisjoint(path.relative_to(root).parts)]
    return sorted(files, key=lambda path: (len(path.relative_to(root).parts), path.relative_to(root).as_posix()))


def docstrings(files: Iterable[Path]) -> Iterator[str]:
    """Per file its docstrings, each below the line that it documents ("def walk(top, topdown=True):")."""
    for path in files:
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):
            continue  # the library holds a few files that are wrong on purpose
        if text := "\n\n".join(_documented(tree)):
            yield text


def sources(files: Iterable[Path], max_bytes: int) -> Iterator[str]:
    """The files' text, whole files until `max_bytes` are reached."""
    for path in files:
        content = path.read_bytes()
        max_bytes -= len(content)
        if max_bytes < 0:
            return
        if text := content.decode("utf-8", "replace").strip():
            yield text


def pieces(text: str, size: int) -> Iterator[str]:
    """The text cut into parts of at most `size` characters: at blank lines, else at line ends, where there are any."""
    text = text.strip()
    while len(text) > size:
        cut = max(text.rfind("\n\n", size // 2, size), 0) or max(text.rfind("\n", size // 2, size), 0) or size
        yield text[:cut].rstrip()
        text = text[cut:].lstrip("\n")
    if text:
        yield text


def _documented(tree: ast.Module) -> Iterator[str]:
    if head := ast.get_docstring(tree):
        yield head
    for node in ast.walk(tree):
        if not isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if text := ast.get_docstring(node):
            line = f"class {node.name}:" if isinstance(node, ast.ClassDef) else f"def {node.name}({ast.unparse(node.args)}):"
            yield line + "\n" + "\n".join("    " + row if row else "" for row in text.split("\n"))
