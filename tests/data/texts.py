"""Texts of several kinds, small and made on the spot: what corpora in the world look like."""

import random

ENGLISH = (
    "It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of foolishness.\n"
)
CHINESE = (
    "话说天下大势，分久必合，合久必分。\n\u3000\u3000周末七国分争，并入于秦。「及秦灭之后」，楚、汉分争，又并入于汉。\n"
)
CODE = 'def f(x):\n    if x:\n\treturn {"a": [1, 23, 456]}  # why\n\n\nclass A:\n        pass\r\n'
EMOJI = "👩‍👩‍👧‍👦 cafe\u0301 naïve 🇨🇭 \u202bעברית\u202c ½\n"
# Spellings that tokenizers treat in a way of their own.
ODD = (
    "",
    " ",
    "\n",
    "\n\n\n",
    "\t\t\tx",
    "  two spaces first, three last   ",
    "\r\nwindows\r\n",
    "\x00 a null",
    "\ufeff a byte order mark inside",
    "\u2581 the sign that SentencePiece writes for a space \u2581\u2581",
    "\u2585 one that its trainer reserves",
    "</s><s><unk><0x0A><|endoftext|><|fim_prefix|>",
    "\u3000\u00a0 wide and unbreakable\u2028spaces",
    "a" * 5000,
)
SAMPLES = (ENGLISH, CHINESE, CODE, EMOJI, *ODD)


def corpus(kind: str, num_chars: int, seed: int = 0) -> str:
    """Running text of one kind: words of the samples in random order, with their line breaks."""
    rng = random.Random(seed)
    source = {"english": ENGLISH, "chinese": CHINESE, "code": CODE, "mixed": ENGLISH + CHINESE + CODE + EMOJI}[kind]
    parts, length = [], 0
    while length < num_chars:
        start = rng.randrange(len(source))
        part = source[start : start + rng.randrange(1, 60)]
        parts.append(part)
        length += len(part)
    return "".join(parts)[:num_chars]
