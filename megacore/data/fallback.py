"""The loops of the sample index in numpy: what runs where csrc/data/index.cpp was not compiled.

Each function has a compiled twin of the same name, arguments and results, which explains the idea;
tests hold the two together. Lengths are int32, everything counted in tokens is int64.
"""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megacore.data.counter import GOLDEN, MASK, mix64

INTERFACE = 2  # of the compiled module: raised when a signature changes, so that a stale build is not used
BLOCK = 1 << 16  # elements worked on at once: bounds memory

Keys = NDArray[np.uint64]
Ints = NDArray[np.int64]


def permute(size: int, keys: Keys, first: int, count: int) -> Ints:
    """Elements [first, first + count) of a keyed permutation of [0, size)."""
    if not 1 <= size < 1 << 62:
        raise ValueError("size must lie in [1, 2^62)")
    if not (first >= 0 and count >= 0 and first + count <= size):
        raise ValueError("first and count must lie within size")
    num_left = math.isqrt(size - 1) + 1
    num_right = -(-size // num_left)
    result = np.empty(count, np.int64)
    for start in range(0, count, BLOCK):
        stop = min(start + BLOCK, count)
        values = np.arange(first + start, first + stop, dtype=np.uint64)
        todo = np.arange(len(values))
        while len(todo):
            values[todo] = _rounds(values[todo], keys, np.uint64(num_left), np.uint64(num_right))
            todo = todo[values[todo] >= size]
        result[start:stop] = values
    return result


def _rounds(values: Keys, keys: Keys, num_left: np.uint64, num_right: np.uint64) -> Keys:
    left, right = np.divmod(values, num_right)
    for even, odd in zip(keys[::2], keys[1::2], strict=True):
        left = (left + _below(mix64(right + even), num_left)) % num_left
        right = (right + _below(mix64(left + odd), num_right)) % num_right
    return left * num_right + right


def _below(words: Keys, bound: np.uint64) -> Keys:
    return ((words >> np.uint64(32)) * bound) >> np.uint64(32)


def epoch_table(lengths: NDArray[np.int32], keys: Keys, stride: int) -> Ints:
    """[ceil(S / stride) + 1] tokens before every stride-th sequence of a permuted epoch; last: all tokens."""
    num = len(lengths)
    table, total = [], 0
    block = max(BLOCK // stride, 1) * stride
    for first in range(0, num, block):
        taken = lengths[permute(num, keys, first, min(block, num - first))].astype(np.int64)
        ends = total + np.cumsum(taken)
        table.append((ends - taken)[::stride])
        total = int(ends[-1])
    return np.concatenate([*table, np.array([total])])


def locate(table: Ints, lengths: NDArray[np.int32], keys: Keys, stride: int, start: int, count: int) -> Ints:
    """[pieces, 3] (sequence, offset, length) that make up tokens [start, start + count) of a permuted epoch."""
    if not (start >= 0 and count >= 0 and start + count <= table[-1]):
        raise ValueError("start and count must lie within the epoch")
    row = int(np.searchsorted(table[:-1], start, side="right")) - 1
    stop, reached = start + count, int(table[row])
    pieces = []
    for first in range(row * stride, len(lengths), stride):
        if reached >= stop:
            break
        order = permute(len(lengths), keys, first, min(stride, len(lengths) - first))
        taken = lengths[order].astype(np.int64)
        ends = reached + np.cumsum(taken)
        begin = np.maximum(ends - taken, start)
        end = np.minimum(ends, stop)
        some = end > begin
        pieces.append(np.stack([order, begin - (ends - taken), end - begin], axis=1)[some])
        reached = int(ends[-1])
    return np.concatenate(pieces) if pieces else np.empty((0, 3), np.int64)


def scan(lengths: NDArray[np.int32], offsets: Ints, bounds: Ints, itemsize: int) -> tuple[int, int, int, int]:
    """What is wrong with an `.idx`, and a hash of its content.

    Returns (first sequence of negative length, first that does not start where the one before ends, first wrong
    document bound, hash); -1 where nothing is wrong.
    """
    bad_length = bad_offset = -1
    digest = expected = 0
    for first in range(0, len(lengths), BLOCK):
        sizes = lengths[first : first + BLOCK].astype(np.int64)
        starts = offsets[first : first + BLOCK]
        ends = np.concatenate([[expected], starts + sizes * itemsize])
        bad_length = first + int(np.argmax(sizes < 0)) if bad_length < 0 and sizes.min() < 0 else bad_length
        wrong = starts != ends[:-1]
        bad_offset = first + int(np.argmax(wrong)) if bad_offset < 0 and wrong.any() else bad_offset
        expected = int(ends[-1])
        digest += _place_hash(sizes, first)
    wrong = np.diff(bounds, prepend=0) < 0
    wrong[:1] |= bounds[:1] != 0
    if not wrong.any() and (bounds[-1] if len(bounds) else 0) != len(lengths):
        bad_bound = len(bounds) - 1
    else:
        bad_bound = int(np.argmax(wrong)) if wrong.any() else -1
    for first in range(0, len(bounds), BLOCK):
        digest += _place_hash(bounds[first : first + BLOCK], len(lengths) + first)
    return bad_length, bad_offset, bad_bound, digest & MASK


def _place_hash(values: Ints, first: int) -> int:
    """Sum of the hashes of (value, place); the first place of all is 1."""
    places = np.arange(first + 1, first + 1 + len(values), dtype=np.uint64)
    return int(mix64(values.astype(np.uint64) + places * np.uint64(GOLDEN)).sum(dtype=np.uint64))


def shuffle(values: NDArray[Any], state: NDArray[np.uint32], position: int) -> int:
    """Shuffle [n] int32 or uint32 in place as `RandomState.shuffle` does from this Mersenne Twister state.

    The state [624] is moved on in place; returns the new position in it.
    """
    random = np.random.RandomState()
    whole = random.get_state(legacy=False)
    whole["state"] = {"key": state, "pos": position}
    random.set_state(whole)
    random.shuffle(values)
    moved = random.get_state(legacy=False)["state"]
    state[:] = moved["key"]
    return int(moved["pos"])


def sample_index(
    lengths: NDArray[np.int32], document_index: NDArray[np.int32], seq_len: int, num_samples: int, extra: int
) -> NDArray[Any]:
    """[num_samples + 1, 2] (position in document_index, token offset) where Megatron's samples start.

    Row k starts at token k * seq_len of the concatenated documents, in the first document that holds the end of the
    sample before (its `extra` token included); past the end of the data it stays at the last document.
    """
    if not len(document_index):
        raise ValueError("document_index must not be empty")
    if document_index.min() < 0 or document_index.max() >= len(lengths):
        raise ValueError("document_index points outside of lengths")
    sizes = lengths[document_index].astype(np.int64)
    ends = np.cumsum(sizes)
    starts = np.arange(1, num_samples + 1, dtype=np.int64) * seq_len
    last = len(sizes) - 1
    position = np.searchsorted(ends, starts + extra, side="left")
    past = position > last
    position[past] = last
    offset = np.where(past, sizes[last] - extra, starts - (ends - sizes)[position])
    rows = np.concatenate([np.zeros((1, 2), np.int64), np.stack([position, offset], axis=1)])
    return rows.astype(np.int32) if len(document_index) <= np.iinfo(np.int32).max else rows


def blend_megatron(weights: NDArray[np.float64], size: int) -> tuple[NDArray[np.int16], Ints]:
    """([size] data set, [size] its sample): at i the data set furthest behind weight * max(i, 1); first wins ties."""
    datasets, samples = np.empty(size, np.int16), np.empty(size, np.int64)
    counts = np.zeros(len(weights), np.int64)
    for i in range(size):
        best = int(np.argmax(weights * max(i, 1) - counts))
        datasets[i], samples[i] = best, counts[best]
        counts[best] += 1
    return datasets, samples


def blend_pattern(shares: Ints) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """([period] data set, [period] its sample): at i the data set furthest behind share * (i + 1) / period."""
    period = int(shares.sum())
    datasets, samples = np.empty(period, np.int32), np.empty(period, np.int32)
    counts, behind = np.zeros(len(shares), np.int32), np.zeros(len(shares), np.int64)
    for i in range(period):
        behind += shares
        best = int(np.argmax(behind))
        behind[best] -= period
        datasets[i], samples[i] = best, counts[best]
        counts[best] += 1
    return datasets, samples
