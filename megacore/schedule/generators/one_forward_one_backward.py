"""1F1B, interleaved 1F1B, and the zero-bubble schedules ZB-H1 and ZB-H2: one family.

After some forwards to warm up, a rank forwards one microbatch and takes one back, in turn. Members differ in how many
forwards warm a rank up, and in how far weight gradients lag behind where a backward is split in two.
"""

import numpy as np
from numpy.typing import NDArray

from megacore.schedule.generators.placement import loop
from megacore.schedule.generators.spell import Words, spell
from megacore.schedule.instruction import Op
from megacore.schedule.schedule import Instructions


def interleaved(num_ranks: int, num_microbatches: int, chunks: int) -> tuple[Instructions, ...]:
    """1F1B (Narayanan et al. 2021, Megatron-LM, arXiv 2104.04473, sections 2.2.1 and 2.2.2).

    The bubble is (p-1)(F+B) of one chunk's work where p divides m; rank r keeps min(p-r, m) microbatches alive with one
    chunk, and rank 0 keeps p + (p-1)/v with v chunks.

    Two ranks, three microbatches::

        0: F0.0 F0.1      B0.0 F0.2 B0.1      B0.2
        1:      F1.0 B1.0 F1.1 B1.1 F1.2 B1.2
    """
    return tuple(
        _rank(rank, num_ranks, num_microbatches, chunks, usual_warm_up(rank, num_ranks, chunks))
        for rank in range(num_ranks)
    )


def zb_h1(num_ranks: int, num_microbatches: int, chunks: int) -> tuple[Instructions, ...]:
    """ZB-H1: 1F1B whose later ranks put weight gradients off into what was bubble (Qi et al. 2024, Zero Bubble Pipeline
    Parallelism, arXiv 2401.10241, section 2.1).

    Memory as 1F1B; ranks are idle for at most (p-1)(F+I-W) of a chunk's work.

    Two ranks, three microbatches::

        0: F0.0 F0.1      I0.0 W0.0 F0.2 I0.1 W0.1 I0.2 W0.2
        1:      F1.0 I1.0 F1.1 I1.1 W1.0 F1.2 I1.2 W1.1 W1.2
    """
    return tuple(
        _rank(rank, num_ranks, num_microbatches, chunks, usual_warm_up(rank, num_ranks, chunks), lag=rank)
        for rank in range(num_ranks)
    )


def zb_h2(num_ranks: int, num_microbatches: int, chunks: int) -> tuple[Instructions, ...]:
    """ZB-H2: forwards fill the warm-up too, so that no rank idles once it began where F = I = W (Qi et al. 2024,
    section 2.2), for up to 2p-1 microbatches alive on rank 0.

    With several chunks, which the paper leaves out, it is interleaved 1F1B with twice ZB-H1's lag: as many microbatches
    alive as there, and no idling up to p = 4; from there on each further rank adds one forward of idling.

    Two ranks, three microbatches::

        0: F0.0 F0.1 F0.2 I0.0 W0.0 I0.1 W0.1 I0.2 W0.2
        1:      F1.0 I1.0 F1.1 I1.1 F1.2 I1.2 W1.0 W1.1 W1.2
    """
    return tuple(
        _rank(rank, num_ranks, num_microbatches, chunks, long_warm_up(rank, num_ranks, chunks), lag=2 * rank)
        for rank in range(num_ranks)
    )


def usual_warm_up(rank: int, num_ranks: int, chunks: int) -> int:
    """Forwards before a rank takes turns. With one chunk as few as it takes to occupy the ranks below; with several
    more, or each chunk would wait for its first gradient anew."""
    return num_ranks - 1 - rank if chunks == 1 else long_warm_up(rank, num_ranks, chunks)


def long_warm_up(rank: int, num_ranks: int, chunks: int) -> int:
    """As many forwards as there is time for before the first gradient is back."""
    return 2 * (num_ranks - 1 - rank) + (chunks - 1) * num_ranks


def _rank(rank: int, num_ranks: int, num_microbatches: int, chunks: int, warm_up: int, lag: int = -1) -> Instructions:
    """One rank's list; ``lag`` >= 0 splits backwards and puts each W off until ``lag`` more microbatches came back.

    With several chunks, p microbatches go through a chunk before the next chunk is taken: p must divide their number,
    so the list is made for the next number that fits.
    """
    rounds = -(-num_microbatches // num_ranks)
    forward = np.tile(np.repeat(np.arange(chunks, dtype=np.int32), num_ranks), rounds)
    back = chunks - 1 - forward
    turn = np.arange(len(forward))
    # In every turn there is a slot for a forward, one for what comes back, one for a weight gradient.
    verbs = [(3 * turn, Op.FORWARD, forward)]
    if lag < 0:
        verbs.append((3 * (turn + warm_up) + 1, Op.BACKWARD, back))
    else:
        verbs.append((3 * (turn + warm_up) + 1, Op.INPUT_GRAD, back))
        verbs.append((3 * (turn + warm_up + lag) + 2, Op.WEIGHT_GRAD, back))
    order = np.argsort(np.concatenate([slot for slot, _, _ in verbs]))
    words = np.concatenate([_words(op, chunk) for _, op, chunk in verbs])
    return spell(words[order], loop(rank, num_ranks, chunks), num_microbatches)


def _words(op: Op, chunk: NDArray[np.int32]) -> Words:
    return np.stack([np.full_like(chunk, op), chunk, np.full_like(chunk, -1)], axis=1)
