"""From a sample's ordinal to its tokens, targets, positions and documents: all of a run's data behind one call.

`SampleStream` ties the parts together: the blend says which data set serves an ordinal, that data set's index says
where the tokens lie, and the tokens become a microbatch. The result depends on the ordinals alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from warnings import warn

import numpy as np
from numpy.typing import NDArray

from megacore.config.schema import DataConfig
from megacore.data import documents
from megacore.data.blend import Blend, MegatronBlend, build_megatron_blend, megatron_sizes
from megacore.data.cache import IndexCache, Notify
from megacore.data.fim import FillInMiddle, FimTokens
from megacore.data.megatron_index import MegatronIndex, MegatronPlan, build_megatron_index
from megacore.data.sample_index import SampleIndex
from megacore.data.skipping import Holes, place
from megacore.data.source import Source, known_eod, mixture_weights, open_sources

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class MicroBatch:
    """Samples ready to be computed; b samples of s tokens."""

    tokens: Ints  # [b, s]
    labels: Ints  # [b, s] next tokens; documents.IGNORE (-100): no target
    positions: Ints | None  # [b, s] with data.reset_positions; None: 0 .. s - 1
    documents: Ints | None  # [b, s] with data.reset_attention: tokens attend within equal numbers; None: one document
    ordinals: Ints  # [b]


class SampleStream:
    """The samples of one split of a run. `eod` is the token that ends a document in them, None if that is not known.

    Args:
        config: the `data` section.
        seq_len: tokens of a sample.
        seed: of the run.
        num_samples: how many the run will ask for (data.index=megatron: the order depends on it; otherwise any
            ordinal may be asked for, and this only says what `build` prepares).
        split: train, valid or test.
        eod: id of the end-of-document token where the data sets note none (see `known_eod`); None: not known.
        fim: ids of the fill-in-the-middle markers; needed where config.fim_rate > 0.
        vocab_size: of the model; every token is checked against it. 0: not checked.
        notify: told in words about things worth knowing.
        holes: ordinals that are left out; then what is asked for counts the others.

    Raises:
        ValueError: a data set is missing or damaged, the split is empty, settings or data sets contradict each other.
    """

    def __init__(
        self,
        config: DataConfig,
        *,
        seq_len: int,
        seed: int,
        num_samples: int,
        split: str = "train",
        eod: int | None = None,
        fim: FimTokens | None = None,
        vocab_size: int = 0,
        notify: Notify = warn,
        holes: Holes = (),
    ) -> None:
        self.holes = tuple(holes)
        num_samples += sum(last - first for first, last in self.holes)
        self.config, self.seq_len, self.seed, self.split, self.num_samples = config, seq_len, seed, split, num_samples
        self.vocab_size = vocab_size
        self.sources = open_sources(config, split, vocab_size)
        noted = known_eod(self.sources)
        self.eod = eod if noted is None else noted
        self.fim = self._fill_in_middle(fim)
        if config.mask_eod_loss and self.eod is None:
            raise ValueError("data.mask_eod_loss=true needs the id of the end-of-document token; set data.tokenizer")
        weights = mixture_weights(config, self.sources)
        self.blend: Blend | MegatronBlend
        self.indices: Sequence[SampleIndex | MegatronIndex]
        if config.index == "megatron":
            self.blend, self.indices = self._megatron_order(weights, notify)
        else:
            self.blend, self.indices = Blend(weights), [self._own_index(source, notify) for source in self.sources]

    def build(self) -> None:
        """Build now what the run's samples will need and what takes a while, instead of when each epoch begins."""
        if isinstance(self.blend, Blend):
            for index, count in zip(self.indices, self.blend.counts(self.num_samples), strict=True):
                if isinstance(index, SampleIndex) and count:
                    index.build(count)

    def source(self, ordinal: int) -> tuple[int, int, int]:
        """(data set, sample id within it, epoch) of a sample, for a ledger of what was read."""
        dataset, sample = self.blend.pick(ordinal)
        return dataset, *self.indices[dataset].source(sample)

    def microbatch(self, first_ordinal: int, count: int) -> MicroBatch:
        """Samples [first_ordinal, first_ordinal + count).

        Raises:
            ValueError: a token lies beyond the vocabulary; the message names its document.
        """
        ordinals = place(np.arange(first_ordinal, first_ordinal + count, dtype=np.int64), self.holes)
        shape = (count, self.seq_len)
        tokens, labels = np.empty(shape, np.int64), np.empty(shape, np.int64)
        positions = np.empty(shape, np.int64) if self.config.reset_positions else None
        numbers = np.empty(shape, np.int64) if self.config.reset_attention else None
        for row, ordinal in enumerate(ordinals.tolist()):
            text, piece_lengths = self._text(ordinal)
            if positions is not None or numbers is not None or self.fim is not None:
                starts = documents.document_starts(text, piece_lengths, self.eod)
                if self.fim is not None:
                    self.fim.apply(text, starts, ordinal)
                if positions is not None:
                    positions[row] = documents.document_positions(starts)[:-1]
                if numbers is not None:
                    numbers[row] = documents.document_numbers(starts)[:-1]
            tokens[row] = text[:-1]
            labels[row] = documents.labels_of(text, self.eod if self.config.mask_eod_loss else None)
        return MicroBatch(tokens, labels, positions, numbers, ordinals)

    def _text(self, ordinal: int) -> tuple[Ints, Ints]:
        """([seq_len + 1] tokens, [pieces] lengths of the sequences' parts) of a sample, checked."""
        dataset, sample = self.blend.pick(ordinal)
        pieces = self.indices[dataset].locate(sample)
        source = self.sources[dataset]
        text = source.gather(pieces)
        if self.vocab_size and (int(text.max()) >= self.vocab_size or int(text.min()) < 0):
            source.report_bad_token(pieces, self.vocab_size)
        return text, pieces[:, 2]

    def _fill_in_middle(self, tokens: FimTokens | None) -> FillInMiddle | None:
        config = self.config
        if config.fim_rate == 0:
            return None
        if tokens is None:
            rule = f"data.fim_rate={config.fim_rate} needs the tokens {list(config.fim_tokens)}"
            raise ValueError(f"{rule}; use a tokenizer that has them and name it in data.tokenizer")
        for token in (tokens.prefix, tokens.middle, tokens.suffix):
            if self.vocab_size and not 0 <= token < self.vocab_size:
                rule = f"fill-in-the-middle token {token} lies beyond model.vocab_size={self.vocab_size}"
                raise ValueError(f"{rule}; raise model.vocab_size")
        return FillInMiddle(tokens, config.fim_rate, config.fim_spm_rate, self.eod, self.seed, self.split)

    def _own_index(self, source: Source, notify: Notify) -> SampleIndex:
        cache = IndexCache(source.cache_folder(self.config), notify)
        lengths = source.dataset.lengths[source.first : source.last]
        return SampleIndex(lengths, source.first, self.seq_len, self.seed, self.split, source.meta.fingerprint, cache)

    def _megatron_order(
        self, weights: list[float], notify: Notify
    ) -> tuple[Blend | MegatronBlend, list[MegatronIndex]]:
        """One data set alone, as Megatron's `--data-path PREFIX`; several, as its weighted blend."""
        alone = len(self.sources) == 1
        sizes = [self.num_samples] if alone else megatron_sizes(weights, self.num_samples)
        indices = [self._megatron_index(source, size, notify) for source, size in zip(self.sources, sizes, strict=True)]
        if alone:
            return Blend([1.0]), indices
        key = {"kind": "megatron blend", "weights": [float(weight) for weight in weights], "size": self.num_samples}
        cache = IndexCache(self.sources[0].cache_folder(self.config), notify)
        arrays = cache.get(key, lambda: build_megatron_blend(weights, self.num_samples))
        return MegatronBlend(arrays["datasets"], arrays["samples"]), indices

    def _megatron_index(self, source: Source, num_samples: int, notify: Notify) -> MegatronIndex:
        lengths = source.dataset.lengths
        plan = MegatronPlan.make(source.num_tokens, self.seq_len, num_samples)
        key = {
            "kind": "megatron index",
            "data": source.meta.fingerprint,
            "first": source.first,
            "last": source.last,
            "seed": self.seed,
            "seq_len": self.seq_len,
            "extra": plan.extra,
            "epochs": plan.num_epochs,
            "separate": plan.separate,
        }
        cache = IndexCache(source.cache_folder(self.config), notify)
        arrays = cache.get(key, lambda: build_megatron_index(lengths, source.first, source.last, plan, self.seed))
        return MegatronIndex(arrays, lengths, plan)
