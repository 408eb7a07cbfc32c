"""Which elements of a rank's runs count, where every element of the model is to be counted once.

Ranks of a tensor-parallel group hold copies of what is not split, and neighbours among them of key/value heads that
are fewer than they; a tied matrix has a copy on another pipeline rank. Of each, one copy counts.
"""

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from megacore.layout.shards import Run
from megacore.mesh.group import Group
from megacore.spec import ParamSpec

LONGEST = 1 << 18
"""Elements of a part, so that torch may add up its squares in single precision: on CPU the norm of 33 million normal
numbers was off by 2e-3 at once, by 1e-6 in such parts."""


@dataclass(frozen=True)
class Part:
    """Elements ``[start, stop)`` of run number ``run``, which are of parameter number ``place`` in global order."""

    run: int
    start: int
    stop: int
    place: int


class Counted:
    """The parts of ``runs`` that count on this rank, run after run, none longer than ``LONGEST``.

    ``specs`` are all parameters of the model in global order, ``copies`` the names of those that are here but counted
    by another pipeline rank. ``place_of_run`` is each run's parameter in that order, whether it counts here or not.
    """

    def __init__(
        self, runs: Sequence[Run], specs: Sequence[ParamSpec], tp: Group, copies: Collection[str] = ()
    ) -> None:
        places = {spec.name: place for place, spec in enumerate(specs)}
        self.place_of_run = tuple(places[run.name] for run in runs)

        def parts_of(counted: bool) -> tuple[Part, ...]:
            return tuple(
                Part(number, first - run.start, min(first + LONGEST, last) - run.start, place)
                for number, (run, place) in enumerate(zip(runs, self.place_of_run))
                for start, stop, owned in elements(specs[place], tp)
                if (owned and run.name not in copies) == counted
                for last in [min(stop, run.stop)]
                for first in range(max(start, run.start), last, LONGEST)
            )

        self.parts, self.others = parts_of(True), parts_of(False)

    def of(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The parts' views of one 1-D tensor per run."""
        return [tensors[part.run][part.start : part.stop] for part in self.parts]

    def others_of(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The same of all other elements: copies that count elsewhere."""
        return [tensors[part.run][part.start : part.stop] for part in self.others]

    @property
    def numel(self) -> int:
        """Elements of all parts."""
        return sum(part.stop - part.start for part in self.parts)


def elements(spec: ParamSpec, tp: Group) -> Iterator[tuple[int, int, bool]]:
    """(start, stop, whether this rank counts them) of elements of the local tensor, flattened row-major.

    A segment (q, k, v) is a range of its own; where it is not the whole of an inner dim, each row is.
    """
    shape, dim = spec.local_shape(tp.rank, tp.size), spec.dim
    outer, width, inner = math.prod(shape[:dim]), shape[dim], math.prod(shape[dim + 1 :])
    for piece in spec.pieces(tp.rank, tp.size):
        whole = piece.size == width
        for row in range(1 if whole else outer):
            start = (row * width + piece.local) * inner
            yield start, start + piece.size * inner * (outer if whole else 1), not piece.copy
