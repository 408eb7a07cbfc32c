"""Real text that needs no download: what comes with Python (documentation, docstrings, sources), or the user's files.

The laptop tour trains on it.
"""

import ast
import json
import random
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from importlib import import_module
from pathlib import Path

from megacore.data.files import write_atomic
from megacore.data.text.blocks import read_blocks
from megacore.data.text.documents import documents
from megacore.data.text.options import ReadOptions
from megacore.data.text.sources import find_sources

NOT_LIBRARY = frozenset(
    {"site-packages", "test", "tests", "idlelib", "idle_test", "lib2to3", "turtledemo", "pydoc_data"}
)
LARGEST_PIECE = 12_000  # characters
LEAST_PIECES = 200


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


def user_texts(paths: Sequence[str], max_bytes: int) -> Iterator[str]:
    """The documents in the user's files, of all kinds that `megacore data prepare` reads, until about `max_bytes`.

    Raises:
        ValueError: a file cannot be read. Broken documents are left out.
    """
    for block in read_blocks(find_sources(paths), ReadOptions(errors="skip")):
        yield from documents(block, ReadOptions(errors="skip")).texts
        max_bytes -= block.num_bytes
        if max_bytes < 0:
            return


def write_corpus(texts: Sequence[str], path: Path) -> None:
    """Writes the texts in pieces as JSON lines, {"text": ...}, shuffled.

    Pieces, so that one huge book gives a validation split too; shuffled, so that the split holds some of everything.
    """
    total = sum(map(len, texts))
    cut = [piece for text in texts for piece in pieces(text, min(LARGEST_PIECE, max(1, total // LEAST_PIECES)))]
    random.Random(0).shuffle(cut)
    lines = (json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in cut)
    write_atomic(path, "".join(lines).encode("utf-8"))


def pieces(text: str, size: int) -> Iterator[str]:
    """The text cut into parts of at most `size` characters: at blank lines, else at line ends, where there are any."""
    text = text.strip()
    while len(text) > size:
        cut = max(text.rfind("\n\n", size // 2, size), 0) or max(text.rfind("\n", size // 2, size), 0) or size
        yield text[:cut].rstrip()
        text = text[cut:].lstrip("\n")
    if text:
        yield text


def openings(corpus: Path, count: int, length: int) -> list[str]:
    """The first words of `count` different documents, of at most `length` characters: something for a model to
    continue, in the corpus' own language."""
    found: list[str] = []
    with corpus.open(encoding="utf-8") as lines:
        for line in lines:
            text = next(filter(None, map(str.strip, json.loads(line)["text"].splitlines())), "")
            words = text[:length].rsplit(" ", 1)[0] if len(text) > length else text
            if len(words) >= min(8, length // 2) and words not in found:
                found.append(words)
            if len(found) == count:
                break
    return found


def _documented(tree: ast.Module) -> Iterator[str]:
    if head := ast.get_docstring(tree):
        yield head
    for node in ast.walk(tree):
        if not isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if text := ast.get_docstring(node):
            line = (
                f"class {node.name}:"
                if isinstance(node, ast.ClassDef)
                else f"def {node.name}({ast.unparse(node.args)}):"
            )
            yield line + "\n" + "\n".join("    " + row if row else "" for row in text.split("\n"))
