"""GPipe: everything forwards, then everything back (Huang et al. 2019, GPipe, arXiv 1811.06965, section 2)."""

from megacore.schedule.generators.placement import loop
from megacore.schedule.generators.spell import spell, words
from megacore.schedule.schedule import Instructions


def gpipe(num_ranks: int, num_microbatches: int, chunks: int) -> tuple[Instructions, ...]:
    """Of every rank, all forwards chunk by chunk, then all backwards from the last chunk to the first.

    The bubble is (p-1)(F+B) of a chunk's work where there is one chunk or m >= p; all m microbatches are alive at once.
    With several chunks it is the breadth-first schedule (Lamy-Poirier 2023, arXiv 2211.05953).

    Two ranks, two microbatches::

        0: F0.0 F0.1           B0.0 B0.1
        1:      F1.0 F1.1 B1.0 B1.1
    """
    forwards = [(f"F{chunk}", num_microbatches) for chunk in range(chunks)]
    backwards = [(f"B{chunk}", num_microbatches) for chunk in reversed(range(chunks))]
    text = words(forwards + backwards)
    return tuple(spell(text, loop(rank, num_ranks, chunks), num_microbatches) for rank in range(num_ranks))
