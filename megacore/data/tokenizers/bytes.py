"""The built-in tokenizer: a token per byte of UTF-8. No vocabulary file, no package, any text."""

from collections.abc import Iterable, Sequence

import numpy as np

from megacore.data.tokenizers.base import Encoded, Tokenizer, content_hash

END_OF_DOCUMENT = "<|endoftext|>"


class ByteTokenizer(Tokenizer):
    """Ids 0 to 255 are the byte values, 256 ends a document."""

    def __init__(self) -> None:
        self.spec = "bytes"
        self.vocab_size = 257
        self.eod = 256
        self.special_tokens = {END_OF_DOCUMENT: 256}

    @property
    def hash(self) -> str:
        return content_hash(b"megacore bytes 257")

    def encode_batch(self, texts: Sequence[str]) -> Encoded:
        encoded = [text.encode("utf-8") for text in texts]
        lengths = np.fromiter(map(len, encoded), np.int64, len(encoded))
        return Encoded(np.frombuffer(b"".join(encoded), np.uint8).astype(np.int32), lengths)

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(i for i in ids if i < 256).decode("utf-8", errors="replace")

    def find_token(self, name: str) -> int | None:
        if name in self.special_tokens:
            return self.special_tokens[name]
        value = name.encode("utf-8")
        return value[0] if len(value) == 1 else None
