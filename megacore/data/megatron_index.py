"""Megatron-LM's GPT sample indices, element for element (`data.index = "megatron"`), to continue its runs.

E epochs of documents are shuffled and cut into samples of `seq_len` tokens (plus the one that is the last target),
and the samples are shuffled. The number of epochs follows from the length of the run; so does the order, which
is why our own order (`sample_index.py`) is the default.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megacore.data import native
from megacore.data.cache import Arrays

SEPARATE_BELOW = 0.80  # of an epoch's samples: a last epoch used less than that is shuffled by itself


@dataclass(frozen=True)
class MegatronPlan:
    """The sizes from which Megatron's indices follow."""

    seq_len: int
    extra: int  # 1: each sample brings one token more, its last target; 0: it does not
    tokens: int  # in one epoch
    num_epochs: int
    num_samples: int  # in the index: all that fit in the epochs
    separate: bool  # the last epoch is shuffled by itself
    num_first: int  # samples of the epochs before it, if separate

    @classmethod
    def make(cls, tokens: int, seq_len: int, num_samples: int | None, extra: int = 1) -> "MegatronPlan":
        """Sizes for a run of `num_samples` (None: one epoch, whatever it holds).

        Raises:
            ValueError: there are no tokens.
        """
        if tokens <= 0:
            raise ValueError("the data holds no tokens; prepare a corpus with text in it")
        epochs = 1 if num_samples is None else max(1, -(-(num_samples * seq_len + extra) // tokens))
        total = (epochs * tokens - extra) // seq_len
        if epochs == 1 or num_samples is None:
            return cls(seq_len, extra, tokens, epochs, total, False, total)
        first = ((epochs - 1) * tokens - extra) // seq_len
        per_epoch = (tokens - extra) // seq_len
        separate = num_samples - first < int(SEPARATE_BELOW * per_epoch)
        return cls(seq_len, extra, tokens, epochs, total, separate, first if separate else total)


def build_megatron_index(lengths: NDArray[np.int32], first: int, last: int, plan: MegatronPlan, seed: int) -> Arrays:
    """document_index i32 [E * sequences], sample_index [N + 1, 2], shuffle_index u32 or i64 [N].

    Args:
        lengths: [S] tokens of every sequence of the data set.
        first, last: range of the sequences used.
    """
    shuffle = _Shuffler(seed)
    documents = np.arange(first, last, dtype=np.int32)
    if plan.separate:
        parts = [shuffle(np.tile(documents, plan.num_epochs - 1)), shuffle(documents)]
        document_index = np.concatenate(parts)
    else:
        document_index = shuffle(np.tile(documents, plan.num_epochs))
    samples = native.loops.sample_index(lengths, document_index, plan.seq_len, plan.num_samples, plan.extra)
    dtype = np.uint32 if plan.num_samples < 2**32 - 2 else np.int64
    shuffled = shuffle(np.arange(plan.num_first, dtype=dtype))
    if plan.num_samples > plan.num_first:
        rest = shuffle(np.arange(plan.num_first, plan.num_samples, dtype=dtype))
        shuffled = np.concatenate([shuffled, rest])
    return {"document_index": document_index, "sample_index": samples, "shuffle_index": shuffled}


class _Shuffler:
    """`numpy.random.RandomState(seed).shuffle`, call after call, through the compiled loop where it can."""

    def __init__(self, seed: int) -> None:
        self.random = np.random.RandomState(seed)

    def __call__(self, values: NDArray[Any]) -> NDArray[Any]:
        """Shuffle in place; returns the same array."""
        if values.dtype.itemsize == 8:
            self.random.shuffle(values)
            return values
        whole = self.random.get_state(legacy=False)
        twister = whole["state"]
        twister["pos"] = native.loops.shuffle(values, twister["key"], twister["pos"])
        self.random.set_state(whole)
        return values


class MegatronIndex:
    """Samples of one split of one data set in Megatron's order.

    Args:
        arrays: of `build_megatron_index`.
        lengths: [S] tokens of every sequence of the data set.
    """

    def __init__(self, arrays: Arrays, lengths: NDArray[np.int32], plan: MegatronPlan) -> None:
        self.documents, self.samples = arrays["document_index"], arrays["sample_index"]
        self.shuffle, self.lengths, self.plan = arrays["shuffle_index"], lengths, plan

    def __len__(self) -> int:
        return len(self.shuffle)

    def source(self, sample: int) -> tuple[int, int]:
        """(sample id in the unshuffled order, epoch in which it starts)."""
        row = int(self.shuffle[sample])
        return row, row * self.plan.seq_len // self.plan.tokens

    def locate(self, sample: int) -> NDArray[np.int64]:
        """[pieces, 3] (sequence, offset, length) that make up a sample, its extra token included.

        Raises:
            ValueError: the run asks for more samples than it said it would.
        """
        if sample >= len(self.shuffle):
            raise ValueError(
                f"sample {sample} lies beyond the {len(self.shuffle)} that Megatron's index was built for; "
                "its order depends on the run's length: set train.steps to the whole run, or use data.index=megacore"
            )
        row = int(self.shuffle[sample])
        (position, offset), (last, stop) = self.samples[row].tolist(), self.samples[row + 1].tolist()
        pieces: list[Any] = []
        for place in range(position, last + 1):
            sequence = int(self.documents[place])
            end = stop + self.plan.extra if place == last else int(self.lengths[sequence])
            if end > offset:
                pieces.append((sequence, offset, end - offset))
            offset = 0
        return np.array(pieces, np.int64).reshape(-1, 3)
