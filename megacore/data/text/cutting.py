"""Where a long text may be cut so that its parts, tokenised alone, give the tokens of the whole.

Tokenizers first cut text into words by a pattern and never join across words. All patterns in use (GPT-2's,
cl100k's, o200k's, SentencePiece's spaces, a model without line breaks in its pieces) begin a new word after a single
line break that stands between two characters that are not spaces; o200k alone lets a "/" follow. So texts are cut
there where possible. Text without such places is cut, in this order, after any line break, before a space, or between
two characters; then up to a few tokens at the cut may differ from those of the uncut text.
"""

import re

# Spaces beyond ASCII in UTF-8 (U+00A0, U+1680, U+2000-202F, U+3000) must not stand before the break, nor any
# character that may be one of them after it.
_BETWEEN_WORDS = re.compile(
    rb"(?<!\xc2\xa0)(?<!\xe1\x9a\x80)(?<!\xe2\x80[\x80-\xaf])(?<!\xe3\x80\x80)(?<=[^\s])\n(?=[!-.0-~\xc3-\xe0\xe4-\xf4])"
)
_LINE_BREAK = re.compile(rb"\n")
_BEFORE_SPACE = re.compile(rb"[^\s](?= )")


def cut_place(data: bytes, limit: int) -> int:
    """The best place to cut UTF-8 text, in bytes: the last good one within (limit / 2, limit].

    Args:
        data: more than `limit` bytes, beginning at a character.
        limit: at least 8.
    """
    for pattern in (_BETWEEN_WORDS, _LINE_BREAK, _BEFORE_SPACE):
        for start in (limit - min(limit // 2, 4096), limit // 2):
            ends = [match.end() for match in pattern.finditer(data, start, limit)]
            # A pattern that ends at `limit` could not look at the byte behind it: such a place is left alone.
            if ends:
                return ends[-1]
    place = limit
    while place > limit - 4 and data[place] & 0xC0 == 0x80:  # inside a character
        place -= 1
    return place


def cut_text(text: str, limit: int) -> list[str]:
    """`text` in parts of about `limit` bytes of UTF-8 at most, cut where `cut_place` says."""
    if len(text) * 4 <= limit:
        return [text]
    data = text.encode("utf-8")
    if len(data) <= limit:
        return [text]
    parts, start = [], 0
    while len(data) - start > limit:
        end = start + cut_place(data[start : start + limit + 1], limit)
        parts.append(data[start:end].decode("utf-8"))
        start = end
    parts.append(data[start:].decode("utf-8"))
    return parts
