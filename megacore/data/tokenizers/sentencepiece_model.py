"""Tokenizers in SentencePiece's `.model` files: `megacore data tokenizer` trains them; Llama 2's and T5's are such."""

from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path

import numpy as np

from megacore.data.tokenizers.base import Encoded, Tokenizer, file_hash, flatten, require

SPACE_SYMBOL = "\u2581"  # SentencePiece's own spelling of a space
END_OF_DOCUMENT_NAMES = ("<|endoftext|>", "<eod>", "<EOD>", "<|end_of_text|>")


class SentencePieceTokenizer(Tokenizer):
    """A `.model` file.

    SentencePiece spells a space as U+2581, so that a U+2581 in the text itself would come back as a space. Models
    with byte pieces can say it nonetheless: here it is written as its three bytes.
    """

    def __init__(self, path: Path) -> None:
        sentencepiece = require("sentencepiece", f"the tokenizer {str(path)!r}")
        self.spec = str(path)
        self._content = path.read_bytes()
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(self._content)
        except RuntimeError as reason:
            raise ValueError(f"{path} is not a SentencePiece model: {reason}") from reason
        processor = self._processor
        self.vocab_size = processor.get_piece_size()
        self.special_tokens = {
            processor.id_to_piece(i): i
            for i in range(self.vocab_size)
            if processor.is_control(i) or processor.is_unknown(i)
        }
        self.eod = self._end_of_document()
        self._space_symbol_bytes = self._byte_pieces(SPACE_SYMBOL)

    @property
    def hash(self) -> str:
        return file_hash(".model", self._content)

    def encode_batch(self, texts: Sequence[str]) -> Encoded:
        if self._space_symbol_bytes and any(SPACE_SYMBOL in text for text in texts):
            return flatten([self._encode_with_space_symbols(text) for text in texts])
        lists = self._processor.encode(list(texts), num_threads=1)
        lengths = np.fromiter(map(len, lists), np.int64, len(lists))
        return Encoded(np.fromiter(chain.from_iterable(lists), np.int32, int(lengths.sum())), lengths)

    def decode(self, ids: Iterable[int]) -> str:
        text: str = self._processor.decode([int(i) for i in ids])
        return text

    def find_token(self, name: str) -> int | None:
        i = int(self._processor.piece_to_id(name))
        return i if self._processor.id_to_piece(i) == name else None

    def _end_of_document(self) -> int | None:
        for name in END_OF_DOCUMENT_NAMES:
            if name in self.special_tokens:
                return self.special_tokens[name]
        eos = int(self._processor.eos_id())
        return eos if eos >= 0 else None

    def _byte_pieces(self, text: str) -> list[int]:
        """Ids of the byte pieces of `text`; empty if the model has no byte pieces."""
        ids = [self.find_token(f"<0x{byte:02X}>") for byte in text.encode("utf-8")]
        return [i for i in ids if i is not None] if None not in ids else []

    def _encode_with_space_symbols(self, text: str) -> list[int]:
        parts = self._processor.encode(text.split(SPACE_SYMBOL), num_threads=1)
        ids = list(parts[0])
        for part in parts[1:]:
            ids += self._space_symbol_bytes
            ids += part
        return ids
