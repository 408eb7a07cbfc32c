"""Stage 2: a SentencePiece vocabulary learned from the text."""

from megacore.data import found_text
from megacore.data.tokenizers import Tokenizer, open_tokenizer
from megacore.data.train_tokenizer import train_sentencepiece
from megacore.demo.text import Corpus
from megacore.demo.workshop import Workshop
from megacore.monitor.console import Paint

EXAMPLE = 'The "for" statement iterates over the elements of a sequence.'  # shown cut into tokens


def learn_tokenizer(shop: Workshop, corpus: Corpus) -> Tokenizer:
    """Learn the vocabulary and show how it cuts a sentence.

    Raises:
        ValueError: the vocabulary asked for is too small or too large for the text.
    """
    shop.title("2 · Tokenizer")
    path = shop.out / "tokenizer.model"
    size = shop.options.vocab_size or vocabulary_for(corpus.num_bytes)
    inputs = [shop.stamps.made["text"], size]
    if not shop.unchanged("tokenizer", inputs, path):
        train_sentencepiece([str(corpus.path)], str(path), size, overwrite=True, on_progress=shop.passing)
        shop.stamps.done("tokenizer", inputs)
    tokenizer = open_tokenizer(str(path))
    shop.result(f"{tokenizer.vocab_size:,} tokens, learned from the text", path)
    for text in found_text.openings(corpus.path, 1, 60) if shop.options.text else [EXAMPLE]:
        shop.console.line("  " + _set_apart(tokenizer, text, shop.console.paint))
    return tokenizer


def vocabulary_for(num_bytes: int) -> int:
    """Tokens that so much text can teach a small model: a power of two from 512 to 4096."""
    return 2 ** max(9, min(12, (num_bytes // 400).bit_length() - 1))


def _set_apart(tokenizer: Tokenizer, text: str, paint: Paint) -> str:
    """The text with lines between its tokens."""
    tokens = [tokenizer.decode([token]) for token in tokenizer.encode(text)]
    styles = ("cyan", "magenta")
    return paint("│", "dim").join(paint(token, styles[number % 2]) for number, token in enumerate(tokens))
