"""Tokenizers of OpenAI's tiktoken: `tiktoken:cl100k_base` and the like."""

from collections.abc import Iterable, Sequence

import numpy as np

from megacore.data.tokenizers.base import Encoded, Tokenizer, content_hash, flatten, require


class TiktokenTokenizer(Tokenizer):
    """A named encoding. tiktoken downloads its vocabulary once and keeps it in its cache."""

    def __init__(self, name: str) -> None:
        library = require("tiktoken", f"the tokenizer 'tiktoken:{name}'")
        known = library.list_encoding_names()
        if name not in known:
            raise ValueError(f"data.tokenizer='tiktoken:{name}': tiktoken knows {', '.join(known)}")
        self.spec = f"tiktoken:{name}"
        try:
            self._encoding = library.get_encoding(name)
        except Exception as reason:  # requests' errors without a network, OSError, a wrong hash
            raise ValueError(
                f"the vocabulary of tiktoken:{name} is not on this machine and could not be downloaded "
                f"({type(reason).__name__}); where there is a network, run "
                f"`TIKTOKEN_CACHE_DIR=tiktoken python -c \"import tiktoken; tiktoken.get_encoding('{name}')\"`, copy "
                "the folder tiktoken here and name it in TIKTOKEN_CACHE_DIR"
            ) from reason
        special = self._encoding._special_tokens
        self.vocab_size = self._encoding.n_vocab
        self.special_tokens = {token: special[token] for token in sorted(special)}
        self.eod = self.special_tokens.get("<|endoftext|>")

    @property
    def hash(self) -> str:
        # The ranks are the vocabulary, the pattern cuts text into words: together they decide the ids.
        encoding = self._encoding
        ranks = sorted((rank, token) for token, rank in encoding._mergeable_ranks.items())
        special = sorted(self.special_tokens.items())
        tokens = b"".join(len(token).to_bytes(4, "little") + token for _, token in ranks)
        numbers = np.array([rank for rank, _ in ranks], "<i8").tobytes()
        return content_hash(b"tiktoken", encoding._pat_str.encode(), repr(special).encode(), numbers, tokens)

    def encode_batch(self, texts: Sequence[str]) -> Encoded:
        return flatten([self._encoding.encode_to_numpy(text, disallowed_special=()) for text in texts])

    def decode(self, ids: Iterable[int]) -> str:
        special = set(self.special_tokens.values())
        text: str = self._encoding.decode([int(i) for i in ids if int(i) not in special])
        return text

    def find_token(self, name: str) -> int | None:
        if name in self.special_tokens:
            return self.special_tokens[name]
        found: int | None = self._encoding._mergeable_ranks.get(name.encode("utf-8"))
        return found
