"""The repository's own source files, as the architecture tests see them."""

import ast
import io
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

# Folders of importable code -> the package that they are installed as.
PACKAGES = {"megacore": "megacore", "tools": "megacore.tools", "launch": "megacore.launch"}

NO_CODE = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)


@dataclass(frozen=True)
class Source:
    """One Python file."""

    path: Path

    @property
    def name(self) -> str:
        """Path from the repository's root, for messages."""
        return self.path.relative_to(ROOT).as_posix()

    @property
    def module(self) -> str:
        """Dotted name that it is imported by."""
        folder, *rest = self.path.relative_to(ROOT).with_suffix("").parts
        if rest[-1] == "__init__":
            rest.pop()
        return ".".join([PACKAGES[folder], *rest])

    @property
    def room(self) -> str:
        """The part of the house: ``config``, ..., ``tools``, ``launch``; empty for the package's own files."""
        folder, *rest = self.path.relative_to(ROOT).parts
        if folder != "megacore":
            return folder
        return rest[0] if len(rest) > 1 else ""

    @cached_property
    def text(self) -> str:
        return self.path.read_text(encoding="utf-8")

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text, filename=self.name)

    @cached_property
    def code_lines(self) -> frozenset[int]:
        """Numbers of the lines that hold code: no blanks, comments or docstrings."""
        skipped = (
            tokenize.COMMENT,
            tokenize.NL,
            tokenize.NEWLINE,
            tokenize.INDENT,
            tokenize.DEDENT,
            tokenize.ENDMARKER,
        )
        lines: set[int] = set()
        for token in tokenize.generate_tokens(io.StringIO(self.text).readline):
            if token.type not in skipped:
                lines.update(range(token.start[0], token.end[0] + 1))
        return frozenset(lines - self._docstring_lines())

    def _docstring_lines(self) -> set[int]:
        lines: set[int] = set()
        for node in ast.walk(self.tree):
            if (
                isinstance(node, ast.Expr)
                and isinstance(node.value, ast.Constant)
                and isinstance(node.value.value, str)
            ):
                lines.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
        return lines

    def imports(self, modules: frozenset[str], for_types: bool = True) -> Iterator[tuple[str, int]]:
        """(module, line) of every import, also inside functions. ``from a import b`` is a.b where that is a module.

        Without ``for_types``, those under ``if TYPE_CHECKING`` are left out.
        """
        package = self.module.split(".") if self.path.stem == "__init__" else self.module.split(".")[:-1]
        left_out = set() if for_types else set(self._nodes_for_types())
        for node in ast.walk(self.tree):
            if node in left_out:
                continue
            if isinstance(node, ast.Import):
                for alias in node.names:
                    yield alias.name, node.lineno
            elif isinstance(node, ast.ImportFrom):
                base = package[: len(package) - node.level + 1] if node.level else []
                origin = ".".join([*base, *([node.module] if node.module else [])])
                for alias in node.names:
                    whole = f"{origin}.{alias.name}"
                    yield (whole if whole in modules else origin), node.lineno

    def _nodes_for_types(self) -> Iterator[ast.AST]:
        for node in ast.walk(self.tree):
            if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
                yield from ast.walk(node)


def python_files(*folders: str) -> list[Source]:
    """All Python files of the folders, in order of path."""
    return [Source(path) for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def library() -> list[Source]:
    """All importable code."""
    return python_files(*PACKAGES)
