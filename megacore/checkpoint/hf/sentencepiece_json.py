"""A SentencePiece `.model` as the tokenizer.json that AutoTokenizer loads: the same pieces, merges and spaces.

The file is a protobuf message, of which only what decides about ids is read (google/sentencepiece,
src/sentencepiece_model.proto). Byte-pair encoding merges by score there, by rank here: merges are written in the order
of the scores of what they make.
"""

import base64
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

SPACE = "\u2581"
BPE = 2
UNKNOWN, CONTROL, USER_DEFINED, BYTE = 2, 3, 4, 6
"""Types of pieces."""


@dataclass(frozen=True)
class Piece:
    """A token's text, score and type."""

    text: str
    score: float
    type: int


@dataclass(frozen=True)
class SentencePiece:
    """What a `.model` says that decides about ids."""

    pieces: tuple[Piece, ...]
    model_type: int
    charsmap: bytes
    dummy_prefix: bool
    remove_extra_whitespaces: bool

    @classmethod
    def of(cls, data: bytes) -> "SentencePiece":
        """Raises ValueError for what is not such a file."""
        pieces, trainer, normalizer = [], b"", b""
        try:
            for number, value in _fields(data):
                if number == 1:
                    piece = dict(_fields(value))
                    score = struct.unpack("<f", piece[2])[0] if 2 in piece else 0.0
                    pieces.append(Piece(piece.get(1, b"").decode(), score, piece.get(3, 1)))
                elif number == 2:
                    trainer = value
                elif number == 3:
                    normalizer = value
            how, spaces = dict(_fields(trainer)), dict(_fields(normalizer))
        except (ValueError, IndexError, TypeError, struct.error):
            raise ValueError("the tokenizer that came with the weights is no SentencePiece model") from None
        return cls(
            pieces=tuple(pieces),
            model_type=how.get(3, 1),
            charsmap=spaces.get(2, b""),
            dummy_prefix=bool(spaces.get(3, 1)),
            remove_extra_whitespaces=bool(spaces.get(4, 1)),
        )

    def special(self) -> list[str]:
        """Pieces that no text gives."""
        return [piece.text for piece in self.pieces if piece.type in (UNKNOWN, CONTROL)]

    def to_json(self) -> dict[str, Any]:
        """The content of a tokenizer.json. Raises ValueError for anything but byte-pair encoding."""
        if self.model_type != BPE:
            raise ValueError("only SentencePiece models of type bpe have a tokenizer.json of the same meaning")
        vocabulary = {piece.text: i for i, piece in enumerate(self.pieces)}
        added = [
            {
                "id": i,
                "content": piece.text,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": piece.type != USER_DEFINED,
            }
            for i, piece in enumerate(self.pieces)
            if piece.type in (UNKNOWN, CONTROL, USER_DEFINED)
        ]
        unknown = next((piece.text for piece in self.pieces if piece.type == UNKNOWN), None)
        return {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": added,
            "normalizer": {"type": "Sequence", "normalizers": list(self._normalizers())},
            "pre_tokenizer": None,
            "post_processor": None,
            "decoder": {"type": "Sequence", "decoders": list(self._decoders())},
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": unknown,
                "continuing_subword_prefix": None,
                "end_of_word_suffix": None,
                "fuse_unk": True,
                "byte_fallback": any(piece.type == BYTE for piece in self.pieces),
                "ignore_merges": False,
                "vocab": vocabulary,
                "merges": self._merges(vocabulary),
            },
        }

    def _merges(self, vocabulary: dict[str, int]) -> list[str]:
        """Every way to make a piece of two others, the best piece first."""
        found = []
        for piece in self.pieces:
            if piece.type in (UNKNOWN, CONTROL, BYTE):
                continue
            ways = []
            for cut in range(1, len(piece.text)):
                left, right = piece.text[:cut], piece.text[cut:]
                if left in vocabulary and right in vocabulary:
                    ways.append((vocabulary[left], vocabulary[right], left, right))
            found += [(-piece.score, left, right) for _, _, left, right in sorted(ways)]
        found.sort(key=lambda way: way[0])  # stable: of equal scores the first piece comes first
        return [f"{left} {right}" for _, left, right in found]

    def _normalizers(self) -> Iterator[dict[str, Any]]:
        if self.charsmap:
            yield {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(self.charsmap).decode()}
        if self.remove_extra_whitespaces:
            yield {"type": "Strip", "strip_left": True, "strip_right": True}
            yield {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}
        if self.dummy_prefix:
            yield {"type": "Prepend", "prepend": SPACE}
        yield {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}

    def _decoders(self) -> Iterator[dict[str, Any]]:
        yield {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
        yield {"type": "ByteFallback"}
        yield {"type": "Fuse"}
        if self.dummy_prefix:
            yield {"type": "Strip", "content": " ", "start": 1, "stop": 0}


def byte_level_json(end_of_document: str) -> dict[str, Any]:
    """The built-in tokenizer `bytes` as a tokenizer.json: token b is byte b, and the one behind them ends documents."""
    # the library spells bytes as printable characters (Radford et al. 2019, GPT-2's encoder.py)
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    spelled = {byte: chr(byte) for byte in printable}
    others = (byte for byte in range(256) if byte not in spelled)
    spelled |= {byte: chr(256 + number) for number, byte in enumerate(others)}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    end = {"id": 256, "content": end_of_document, "single_word": False, "lstrip": False, "rstrip": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{**end, "normalized": False, "special": True}],
        "normalizer": None,
        "pre_tokenizer": level,
        "post_processor": None,
        "decoder": level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {**{spelled[byte]: byte for byte in range(256)}, end_of_document: 256},
            "merges": [],
        },
    }


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """(number, value) of a message's fields: integers, or bytes of fixed or given length."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        kind = tag & 7
        value: Any
        if kind == 0:
            value, at = _varint(data, at)
        else:
            if kind == 2:
                size, at = _varint(data, at)
            else:
                size = {1: 8, 5: 4}[kind] if kind in (1, 5) else len(data) + 1
            if at + size > len(data):
                raise ValueError("a field is longer than its message")
            value, at = data[at : at + size], at + size
        yield tag >> 3, value


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
        if shift > 63:
            raise ValueError("a number does not end")
