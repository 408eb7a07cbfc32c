"""Tokenizers of HF's `tokenizers` library: a `tokenizer.json`, alone or in a model's folder."""

import json
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from megacore.data.tokenizers.base import Encoded, Tokenizer, file_hash, require

END_OF_DOCUMENT_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[EOS]")


class HuggingFaceTokenizer(Tokenizer):
    """A `tokenizer.json`. Which token ends a document stands in `tokenizer_config.json` beside it (`eos_token`)."""

    def __init__(self, path: Path) -> None:
        """`path` is the file, or the folder that holds it."""
        self.spec = str(path)
        file = path / "tokenizer.json" if path.is_dir() else path
        library = require("tokenizers", f"the tokenizer {str(path)!r}")
        self._content = file.read_bytes()
        try:
            self._tokenizer = library.Tokenizer.from_str(self._content.decode("utf-8"))
        except Exception as reason:  # the library raises bare Exceptions
            raise ValueError(f"{file} is not a tokenizer of HF tokenizers: {reason}") from reason
        # What a tokenizer.json says about cutting and padding is for inference; both would damage documents.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        added = self._tokenizer.get_added_tokens_decoder()
        self.special_tokens = {token.content: i for i, token in sorted(added.items()) if token.special}
        self.eod = self._end_of_document(file.with_name("tokenizer_config.json"))

    @property
    def hash(self) -> str:
        return file_hash(".json", self._content)

    def encode_batch(self, texts: Sequence[str]) -> Encoded:
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        lists = [encoding.ids for encoding in encodings]
        lengths = np.fromiter(map(len, lists), np.int64, len(lists))
        return Encoded(np.fromiter(chain.from_iterable(lists), np.int32, int(lengths.sum())), lengths)

    def decode(self, ids: Iterable[int]) -> str:
        text: str = self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)
        return text

    def find_token(self, name: str) -> int | None:
        found: int | None = self._tokenizer.token_to_id(name)
        return found

    def _end_of_document(self, config: Path) -> int | None:
        named = _content(_read_json(config).get("eos_token"))
        if named:
            return self.token_id(named)
        present = (self.find_token(name) for name in END_OF_DOCUMENT_NAMES if name in self.special_tokens)
        return next(present, None)


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as reason:
        raise ValueError(f"{file} is not JSON: {reason}") from reason
    return value if isinstance(value, dict) else {}


def _content(token: str | dict[str, Any] | None) -> str:
    """HF writes a token as its text or as an object with its text."""
    return str(token.get("content") or "") if isinstance(token, dict) else token or ""
