"""What only its data can tell of a run (tokenizer, vocabulary), and whether the data can serve the run."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

from megacore.config.errors import ConfigError
from megacore.config.parse import show
from megacore.config.schema import RunConfig
from megacore.data.indexed import IndexedDataset
from megacore.data.meta import DataMeta
from megacore.data.run_tokenizer import resolve_tokenizer
from megacore.data.source import Source, cut, known_eod, read_by
from megacore.data.tokenizers import Tokenizer
from megacore.exits import raised_by_us

Opened = Mapping[str, tuple[IndexedDataset, DataMeta]]  # by prefix


def fill_in(config: RunConfig) -> RunConfig:
    """The run with what only its data can tell: ``data.tokenizer``, and ``model.vocab_size`` where it is 0.

    Raises:
        ConfigError: with everything that keeps the data from serving the run: data sets that are missing or damaged,
            splits that are read but empty, a tokenizer that is another one or lacks a token, too small a vocabulary.
    """
    problems: list[str] = []
    opened = _open_all(config, problems)
    tokenizer = None
    with _noted_in(problems):
        tokenizer = resolve_tokenizer(config.data, {prefix: meta for prefix, (_, meta) in opened.items()})
    if tokenizer or not problems:  # with a data set missing, none may only seem to be named
        problems += _lacking(config, tokenizer)
    vocab_size = config.model.vocab_size
    with _noted_in(problems):
        vocab_size = _vocab_size(config, opened, tokenizer)
    _check_sources(config, opened, tokenizer, problems)
    if problems:
        raise ConfigError(problems)
    return replace(
        config,
        model=replace(config.model, vocab_size=vocab_size),
        data=replace(config.data, tokenizer=tokenizer.spec if tokenizer else ""),
    )


@contextmanager
def _noted_in(problems: list[str]) -> Iterator[None]:
    """What is wrong with the user's input inside becomes a line of ``problems``."""
    try:
        yield
    except ValueError as error:
        if not raised_by_us(error.__traceback__):
            raise
        problems.append(str(error))
    except OSError as error:
        problems.append(f"{show(str(error.filename))} cannot be read: {error.strerror}; name data that can")


def _open_all(config: RunConfig, problems: list[str]) -> Opened:
    opened = {}
    for prefix in dict.fromkeys(prefix for _, prefix in (*config.data.blend, *config.data.eval_blend)):
        with _noted_in(problems):
            dataset = IndexedDataset(prefix)
            opened[prefix] = dataset, DataMeta.load(dataset)
    return opened


def _lacking(config: RunConfig, tokenizer: Tokenizer | None) -> Iterator[str]:
    """What the run asks of a tokenizer that this one does not have."""
    data, every = config.data, config.log.sample_every
    if every and tokenizer is None:
        yield f"log.sample_every={every} needs the tokenizer of the data; set data.tokenizer"
    if not data.fim_rate:
        return
    missing = [name for name in data.fim_tokens if tokenizer is None or tokenizer.find_token(name) is None]
    if missing:
        has = f"{tokenizer.spec!r} has no {', '.join(missing)}" if tokenizer else "no tokenizer is known"
        yield (
            f"data.fim_rate={data.fim_rate} needs data.fim_tokens={list(data.fim_tokens)}, but {has}; name the "
            "tokenizer's own markers there, prepare the data with a tokenizer that has some, or leave data.fim_rate out"
        )


def _vocab_size(config: RunConfig, opened: Opened, tokenizer: Tokenizer | None) -> int:
    """The model's, or else the data's.

    Raises:
        ValueError: nothing says how large it is, or it is too small for the data.
    """
    sizes = [meta.vocab_size for _, meta in opened.values() if meta.vocab_size]
    needed, given = max([*sizes, tokenizer.vocab_size if tokenizer else 0], default=0), config.model.vocab_size
    if not given and not needed and opened:
        raise ValueError("model.vocab_size=0 is to come from the data, which does not say; give it, or data.tokenizer")
    if 0 < given < needed:
        raise ValueError(
            f"model.vocab_size={given} is smaller than the data's vocabulary of {needed}; give at least {needed}"
        )
    return given or needed


def _check_sources(config: RunConfig, opened: Opened, tokenizer: Tokenizer | None, problems: list[str]) -> None:
    """Every split that is read must have tokens, and all must mean one end-of-document token."""
    sources: list[Source] = []
    for split in ("train", "valid") if config.train.eval_every else ("train",):
        blend, shares = read_by(config.data, split)
        for weight, prefix in blend:
            if prefix in opened:
                with _noted_in(problems):
                    sources.append(cut(*opened[prefix], weight, shares, split))
    if len(opened) < len({prefix for _, prefix in (*config.data.blend, *config.data.eval_blend)}):
        return  # what is missing may note the token
    with _noted_in(problems):
        if known_eod(sources) is None and config.data.mask_eod_loss and (tokenizer is None or tokenizer.eod is None):
            problems.append(
                "data.mask_eod_loss=true needs the id of the end-of-document token, which neither the data nor its "
                "tokenizer says; set data.tokenizer, or leave it out"
            )
