"""Stage 3: tokens in a memory-mapped .bin/.idx pair."""

from pathlib import Path

from megacore import __version__
from megacore.data.prepare import Progress, prepare
from megacore.data.tokenizers import Tokenizer
from megacore.demo.text import Corpus
from megacore.demo.workshop import Workshop
from megacore.processes import usable_cores

MOST_WORKERS = 4  # so small a corpus keeps no more of them busy


def make_dataset(shop: Workshop, corpus: Corpus, tokenizer: Tokenizer) -> Path:
    """Tokenise the corpus; the dataset's path without ending."""
    shop.title("3 · Dataset")
    prefix = shop.out / "data" / "corpus"
    inputs = [shop.stamps.made["tokenizer"], __version__]
    results = [prefix.with_suffix(suffix) for suffix in (".bin", ".idx")]
    if shop.unchanged("dataset", inputs, *results):
        shop.result("token ids, memory-mapped", results[0])
        return prefix

    def show(progress: Progress) -> None:
        share = progress.consumed / max(progress.total, 1)
        shop.passing(f"{share:4.0%}  {progress.num_tokens:,} tokens")

    workers = min(MOST_WORKERS, usable_cores())
    source, spec, output = str(corpus.path), tokenizer.spec, str(prefix)
    done = prepare([source], spec, output, workers=workers, overwrite=True, on_progress=show)
    shop.stamps.done("dataset", inputs)
    each = done.num_bytes / max(done.num_tokens, 1)
    shop.result(f"{done.num_tokens:,} tokens of {each:.2f} bytes, by {workers} worker processes", results[0])
    return prefix
