"""Text to tokens and back. `open_tokenizer(spec)` opens any of them; `Tokenizer` says what each can do."""

from megacore.data.tokenizers.base import Encoded, Tokenizer
from megacore.data.tokenizers.opening import open_tokenizer

__all__ = ["Encoded", "Tokenizer", "open_tokenizer"]
