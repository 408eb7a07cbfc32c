"""What every tokenizer can do, whatever library is behind it."""

import hashlib
import importlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from types import MappingProxyType, ModuleType
from typing import NamedTuple

import numpy as np

FORMATS = MappingProxyType({".json": b"tokenizers", ".model": b"sentencepiece"})
"""What files with these endings are, as it goes into hashes."""


class Encoded(NamedTuple):
    """Several texts as tokens, in one array: no Python object per token or per text."""

    ids: np.ndarray
    """int32 [tokens], the texts' tokens one after the other."""
    lengths: np.ndarray
    """int64 [texts], tokens of each text."""


class Tokenizer(ABC):
    """Text to token ids and back.

    Text never turns into special tokens: a document that spells `<|endoftext|>` gets the tokens of those thirteen
    characters, so no document can end itself. No token is added at the beginning or the end either.
    """

    spec: str
    """What `open_tokenizer` opens: "bytes", a path, or "tiktoken:NAME"."""
    vocab_size: int
    """Largest id + 1."""
    eod: int | None
    """The token that ends a document, or None if this tokenizer has none."""
    special_tokens: dict[str, int]
    """Ids that no text gives, by name."""

    @property
    @abstractmethod
    def hash(self) -> str:
        """SHA-256 (hex) of everything that decides which ids a text gets: equal hashes, equal ids."""

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> Encoded:
        """Tokens of each text, on one core. Texts must be valid Unicode (no lone surrogates)."""

    @abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; special tokens give nothing, half a character gives U+FFFD."""

    @abstractmethod
    def find_token(self, name: str) -> int | None:
        """Id of the token spelled `name`, special or not; None if there is none."""

    def encode(self, text: str) -> list[int]:
        """Tokens of one text."""
        ids: list[int] = self.encode_batch([text]).ids.tolist()
        return ids

    def token_id(self, name: str) -> int:
        """Id of the token spelled `name`, such as "<|fim_prefix|>".

        Raises:
            ValueError: there is no such token; names the special tokens that exist.
        """
        found = self.find_token(name)
        if found is None:
            raise ValueError(
                f"tokenizer {self.spec!r} has no token {name!r}; its special tokens are "
                f"{', '.join(map(repr, list(self.special_tokens)[:40])) or 'none'}"
            )
        return found


def flatten(sequences: Sequence[Sequence[int]]) -> Encoded:
    """One `Encoded` from a sequence of ids (lists or arrays) per text."""
    lengths = np.fromiter(map(len, sequences), np.int64, len(sequences))
    ids = np.empty(int(lengths.sum()), np.int32)
    start = 0
    for sequence in sequences:
        ids[start : start + len(sequence)] = sequence
        start += len(sequence)
    return Encoded(ids, lengths)


def file_hash(suffix: str, content: bytes) -> str:
    """The ``hash`` of a tokenizer that one file makes: `.json` (of HF tokenizers) or `.model` (SentencePiece)."""
    return content_hash(FORMATS[suffix], content)


def content_hash(*parts: bytes) -> str:
    """SHA-256 over several byte strings, each preceded by its length."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()


def require(package: str, purpose: str) -> ModuleType:
    """Import an optional package.

    Raises:
        ValueError: it cannot be imported; says what needs it, why it fails and the line that installs it.
    """
    try:
        return importlib.import_module(package)
    except ImportError as reason:
        top = package.partition(".")[0]
        raise ValueError(f"{purpose} needs the package {top} ({reason}); pip install {top}") from reason
