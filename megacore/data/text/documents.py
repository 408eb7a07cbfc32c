"""The texts of a block: lines, paragraphs, JSON fields, table values, as valid Unicode; and what is wrong with them."""

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from megacore.data.text.blocks import Block
from megacore.data.text.options import ReadOptions
from megacore.data.text.sources import BadInput

_BLANK_LINES = re.compile(rb"\n(?:[ \t\r]*\n)+")
_SURROGATE = re.compile("[\ud800-\udfff]")
_GO_ON = "or go on with --errors replace or --errors skip"


@dataclass
class Documents:
    """What a block holds."""

    texts: list[str]
    """In order; none is blank, but for a part of a longer document."""
    num_empty: int = 0
    """Documents left out because there is nothing but white space in them."""
    num_broken: int = 0
    """Documents left out because of errors="skip"."""


def documents(block: Block, options: ReadOptions) -> Documents:
    """The documents of a block.

    Raises:
        BadInput: bad UTF-8 or JSON, no such key, or no text in it, unless `options.errors` says to go on.
    """
    if block.kind == "jsonl" and (texts := _quick_json_lines(block, options.json_key)) is not None:
        full = [text for text in texts if text and not text.isspace()]
        return Documents(full, len(texts) - len(full))
    found = Documents([])
    is_part = not (block.starts and block.ends)
    for place, item in _items(block, options):
        try:
            text = item if isinstance(item, str) and block.kind == "line" else _text(item, place, block, options)
        except BadInput:
            if options.errors != "skip":
                raise
            found.num_broken += 1
            continue
        if text and (is_part or not text.isspace()):
            found.texts.append(text)
        else:
            found.num_empty += 1
    return found


def _quick_json_lines(block: Block, key: str) -> list[str] | None:
    """The texts of JSON lines that are right in every way, parsed all at once; None if anything is wrong."""
    assert isinstance(block.content, bytes), block.kind
    try:
        content = block.content.decode("utf-8")
        lines = [line for line in content.split("\n") if line and not line.isspace()]
        items = json.loads(f"[{','.join(lines)}]")
        texts = [item[key] for item in items]
    except (ValueError, KeyError, TypeError):
        return None
    if len(texts) != len(lines) or not set(map(type, texts)) <= {str}:
        return None
    if ("\\ud" in content or "\\uD" in content) and any(map(_SURROGATE.search, texts)):
        return None
    return texts


def _items(block: Block, options: ReadOptions) -> Iterable[tuple[int, Any]]:
    """(number of its line, row or item; raw form) of each document of the block."""
    if isinstance(block.content, list):
        return enumerate(block.content, block.line)
    if block.kind in ("line", "jsonl"):
        return _lines(block.content, block.line)
    if block.kind == "paragraph":
        return _paragraphs(block.content, block.line)
    if block.kind == "array":
        return _array(block.content, block, options)
    return [(block.line, block.content)]


def _lines(content: bytes, first: int) -> Iterator[tuple[int, str | bytes]]:
    """Lines that are not blank: as text where the block is UTF-8 throughout, else as bytes, to find the bad ones."""
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError:
        for number, raw in enumerate(content.split(b"\n"), first):
            if raw.strip():
                yield number, raw.removesuffix(b"\r")
        return
    for number, line in enumerate(text.split("\n"), first):
        if line and not line.isspace():
            yield number, line.removesuffix("\r")


def _paragraphs(content: bytes, line: int) -> Iterator[tuple[int, bytes]]:
    start = 0
    for end, following in [match.span() for match in _BLANK_LINES.finditer(content)] + [(len(content), 0)]:
        if paragraph := content[start:end].strip(b"\r\n"):
            yield line, paragraph
        line += content.count(b"\n", start, following)
        start = following


def _array(content: bytes, block: Block, options: ReadOptions) -> list[tuple[int, Any]]:
    try:
        items = json.loads(_decode(content, 1, block, options))
    except ValueError as reason:
        if isinstance(reason, BadInput):
            raise
        raise BadInput(f"{block.name} begins like a JSON array but is not JSON: {reason}") from reason
    return list(enumerate(items, 1))


def _text(item: Any, place: int, block: Block, options: ReadOptions) -> str:
    """The text of one document in its raw form."""
    if item is None and block.kind == "column":
        return ""
    if isinstance(item, bytes):
        item = _decode(item, place, block, options)
    if block.kind == "jsonl":
        may_be_broken = "\\ud" in item or "\\uD" in item
        item = _parse(item, place, block)
    elif block.kind == "array":
        may_be_broken = True
    else:
        return str(item)
    text = _field(item, place, block, options.json_key)
    if may_be_broken and _SURROGATE.search(text):
        if options.errors != "replace":
            raise BadInput(
                f"{_where(block, place)}: the text has half of a \\uD800-\\uDFFF pair, which is no character; "
                f"mend the file, {_GO_ON}"
            )
        text = _SURROGATE.sub("\ufffd", text)
    return text


def _parse(line: str, place: int, block: Block) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as reason:
        where = f"{_where(block, place)} is not JSON ({reason.msg} at column {reason.colno}): {_shortened(line)}"
        raise BadInput(
            f"{where}; a JSON lines file has one object per line (--format text reads a file as it is, --errors skip "
            "leaves such lines out)"
        ) from reason


def _field(item: Any, place: int, block: Block, key: str) -> str:
    if isinstance(item, str) and block.kind == "array":
        return item
    if not isinstance(item, dict):
        kind = type(item).__name__
        raise BadInput(f"{_where(block, place)} is not an object but {kind}: {_shortened(json.dumps(item))}")
    if key not in item:
        texts = [name for name, value in item.items() if isinstance(value, str)]
        longest = max(texts, key=lambda name: len(item[name]), default="")
        fix = f"did you mean --json-key {longest}?" if longest else "none of them holds text"
        raise BadInput(f"{_where(block, place)} has no key {key!r}; its keys are {', '.join(item) or 'none'}; {fix}")
    if not isinstance(item[key], str):
        kind = type(item[key]).__name__
        raise BadInput(f"{_where(block, place)}: the value of {key!r} is not a text but {kind}; choose with --json-key")
    return item[key]


def _decode(data: bytes, place: int, block: Block, options: ReadOptions) -> str:
    try:
        return data.decode("utf-8", errors="replace" if options.errors == "replace" else "strict")
    except UnicodeDecodeError as reason:
        where = _where(block, place)
        if block.kind in ("whole", "array"):
            where = _where(block, place + data.count(b"\n", 0, reason.start))
        if isinstance(block.content, bytes):
            where += f" (byte {block.offset + block.content.find(data) + reason.start} of the file)"
        raise BadInput(
            f"{where} is not UTF-8: {reason.reason} 0x{data[reason.start]:02x}; convert the file "
            f"(iconv -f LATIN1 -t UTF-8, if that is what it is), {_GO_ON}"
        ) from reason


def _where(block: Block, place: int) -> str:
    unit = {"column": "row", "array": "item"}.get(block.kind, "line")
    return f"{block.name} {unit} {place}"


def _shortened(text: str, limit: int = 60) -> str:
    return text if len(text) <= limit else text[:limit] + "..."
