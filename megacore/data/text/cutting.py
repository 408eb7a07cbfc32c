"""Where a long text may be cut so that its parts, tokenised alone, give the tokens of the whole.

Tokenizers first cut text into words by a pattern and never join across words. In all patterns in use (GPT-2's,
cl100k's, o200k's and their kin; SentencePiece's words with their leading space) a word surely ends

- between a letter or digit and a line break: `word|\\n    word`;
- between anything and a space: `word| word`;
- behind a single line break with no space before or behind it: `word.\\n|word` (but o200k lets a "/" join).

Text without such places for long (Chinese with no line breaks, one endless word) is cut behind any line break, or else
between two characters; then a few tokens at the cut may differ from those of the uncut text.
"""

import re

# In UTF-8. Letters: ASCII and U+5000-9FFF. The last line leaves alone a line break behind a space beyond ASCII
# (U+00A0, U+1680, U+2000-202F, U+3000) or before a character that may be one.
_WORD_ENDS = re.compile(
    rb"(?:(?<=[A-Za-z0-9])|(?<=[\xe5-\xe9][\x80-\xbf][\x80-\xbf]))(?=\r?\n)"
    rb"|(?<=[!-~])(?= )"
    rb"|(?<!\xc2\xa0)(?<!\xe1\x9a\x80)(?<!\xe2\x80[\x80-\xaf])(?<!\xe3\x80\x80)(?<=[^\s])\n(?=[!-.0-~\xc3-\xe0\xe4-\xf4])"
)
_LINE_BREAK = re.compile(rb"\n")
_PATIENCE = 8  # how much longer than asked a part may be to end at a word


def cut_place(data: bytes, limit: int) -> int:
    """The best place to cut UTF-8 text, in bytes: the last good one within (limit / 2, limit].

    Args:
        data: more than `limit` bytes, beginning at a character.
        limit: at least 8.
    """
    return _last_match(_WORD_ENDS, data, limit) or _any_place(data, limit)


def cut_text(text: str, limit: int) -> list[str]:
    """`text` in parts of about `limit` bytes of UTF-8; longer ones where no word ends."""
    if len(text) * 4 <= limit:
        return [text]
    data = text.encode("utf-8")
    parts, start = [], 0
    while len(data) - start > limit:
        rest = data[start : start + _PATIENCE * limit + 1]
        end = _last_match(_WORD_ENDS, rest, limit)
        if not end:
            end = cut_place(rest, _PATIENCE * limit) if len(rest) > _PATIENCE * limit else len(rest)
        parts.append(rest[:end].decode("utf-8"))
        start += end
    if start < len(data):
        parts.append(data[start:].decode("utf-8"))
    return parts


def _last_match(pattern: re.Pattern[bytes], data: bytes, limit: int) -> int:
    """End of the last match within (limit / 2, limit); 0: there is none. Looks near the limit first."""
    for window in (min(128, limit // 2), limit // 2):
        ends = [match.end() for match in pattern.finditer(data, limit - window, limit)]
        if ends:
            return ends[-1]
    return 0


def _any_place(data: bytes, limit: int) -> int:
    place = _last_match(_LINE_BREAK, data, limit)
    if place:
        return place
    place = limit
    while place > limit - 4 and data[place] & 0xC0 == 0x80:  # inside a character
        place -= 1
    return place
