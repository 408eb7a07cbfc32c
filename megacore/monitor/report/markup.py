"""Pieces of HTML. Every text that comes from a run goes through ``text``: nothing of it becomes markup."""

import json
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any


def text(value: Any) -> str:
    """As it is to be read, whatever it is."""
    shown = str(value).encode("utf-8", "replace").decode()
    return escape("".join(char if char.isprintable() or char in "\n\t" else "\ufffd" for char in shown))


def tag(name: str, inside: str, **attributes: Any) -> str:
    """``inside`` is markup already; attributes are texts."""
    words = "".join(f' {key.strip("_").replace("_", "-")}="{text(value)}"' for key, value in attributes.items())
    return f"<{name}{words}>{inside}</{name}>"


def table(header: Sequence[str], rows: Iterable[Sequence[str]], **attributes: Any) -> str:
    """``rows`` are of markup, the header of texts."""
    head = "".join(f"<th>{text(each)}</th>" for each in header)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    inside = f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody>"
    return tag("div", tag("table", inside), **{"class_": "scroll", **attributes})


def section(name: str, title: str, *inside: str, note: str = "") -> str:
    """A part of the page; nothing where nothing is inside."""
    body = "".join(inside)
    if not body:
        return ""
    head = tag("h2", text(title)) + (tag("p", text(note), class_="note") if note else "")
    return tag("section", head + body, id=name)


def bar(parts: Sequence[tuple[str, float, str]], shades: Sequence[str]) -> str:
    """A stacked bar over its whole width: (name, share, figure) each; shares of 0 are left out."""
    shown = [(*part, shade) for part, shade in zip(parts, shades, strict=False) if part[1] > 0]
    pieces = "".join(
        tag("i", "", style=f"flex:{share:.6f} 1 0;background:var(--{shade})", title=f"{name}: {figure}")
        for name, share, figure, shade in shown
    )
    keys = "".join(
        tag("li", tag("b", "", style=f"background:var(--{shade})") + f"{text(name)} " + tag("em", text(figure)))
        for name, share, figure, shade in shown
    )
    return tag("div", pieces, class_="bar") + tag("ul", keys, class_="keys")


def data(name: str, value: Any) -> str:
    """JSON for the page's own script: within it no character can end the element or begin another."""
    content = json.dumps(value, separators=(",", ":"), allow_nan=False)
    for char in "<>&\u2028\u2029":
        content = content.replace(char, f"\\u{ord(char):04x}")
    return f'<script type="application/json" id="{name}">{content}</script>'
