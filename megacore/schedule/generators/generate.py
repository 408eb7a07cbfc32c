"""The table of schedules: every kind's generator, and what it can be asked for."""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

from megacore.schedule.generators.dualpipe_v import dualpipe_v
from megacore.schedule.generators.forward import forward
from megacore.schedule.generators.gpipe import gpipe
from megacore.schedule.generators.one_forward_one_backward import interleaved, zb_h1, zb_h2
from megacore.schedule.generators.zb_v import zb_v
from megacore.schedule.schedule import Instructions, Schedule


class Kind(NamedTuple):
    """A kind of schedule."""

    generator: Callable[[int, int, int], tuple[Instructions, ...]]
    """(ranks, microbatches, chunks) -> the computing instructions of every rank."""
    folded: bool = False
    """Whether rank r has stages r and 2p-1-r, so two chunks and no other number."""


def _evaluation(num_ranks: int, num_microbatches: int, chunks: int) -> tuple[Instructions, ...]:
    return forward([stage % num_ranks for stage in range(num_ranks * chunks)], num_microbatches)


KINDS: Mapping[str, Kind] = MappingProxyType(
    {
        "gpipe": Kind(gpipe),
        "1f1b": Kind(interleaved),
        "interleaved": Kind(interleaved),
        "zb-h1": Kind(zb_h1),
        "zb-h2": Kind(zb_h2),
        "zb-v": Kind(zb_v, folded=True),
        "dualpipe-v": Kind(dualpipe_v, folded=True),
        "forward": Kind(_evaluation),
    }
)


def default_chunks(kind: str) -> int:
    """Model chunks per rank where nobody asks for a number. Raises ValueError for an unknown kind."""
    return 2 if _kind(kind).folded else 1


def generate(kind: str, num_ranks: int, num_microbatches: int, chunks: int = 0) -> Schedule:
    """The computing instructions of a training step (``forward``: of an evaluation); ``lower`` adds the rest.

    ``chunks`` stages live on every rank, 0 being the kind's own number: stage s on rank s mod p, except that the folded
    kinds put stages r and 2p-1-r on rank r. Any number of microbatches will do.

    Raises ValueError for an unknown kind, and for chunks that it cannot have.
    """
    chosen = _kind(kind)
    chunks = chunks or default_chunks(kind)
    counts = {"parallel.pp": num_ranks, "num_microbatches": num_microbatches, "parallel.chunks": chunks}
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    if chosen.folded and chunks != 2:
        raise ValueError(
            f"parallel.chunks={chunks} does not fit parallel.schedule={kind}, which folds the pipeline into two chunks "
            "per rank; set parallel.chunks=2, or take parallel.schedule=interleaved"
        )
    return Schedule(kind, num_microbatches, chosen.generator(num_ranks, num_microbatches, chunks))


def forward_only(home: Sequence[int], num_microbatches: int) -> Schedule:
    """An evaluation with stages on the ranks ``home``: those of the schedule that trains them."""
    return Schedule("forward", num_microbatches, forward(home, num_microbatches))


def _kind(kind: str) -> Kind:
    if kind not in KINDS:
        raise ValueError(f"parallel.schedule={kind} is unknown; choose one of {', '.join(KINDS)}")
    return KINDS[kind]
