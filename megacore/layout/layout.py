"""Which rank stands where: two factorings of the same ranks.

Dense parameters see the ranks as ``pp * dp * cp * tp``; the experts of a mixture see the same ranks as
``pp * edp * ep * etp``, with ``dp * cp * tp == edp * ep * etp``. Inside dp, replicas are outermost:
``dp == dp_replicate * dp_shard`` (hybrid sharding). A rank is a mixed-radix number whose digits are its
coordinates; everything below is that arithmetic.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from megacore.config.pipeline import num_chunks
from megacore.config.schema import ParallelConfig

EXPERT_AXES: Mapping[str, str] = MappingProxyType({"tp": "etp", "cp": "ep", "dp": "edp", "pp": "pp"})


@dataclass(frozen=True)
class Layout:
    """Sizes of all axes; ``order`` names the dense axes, outermost first."""

    tp: int = 1
    cp: int = 1
    dp: int = 1
    pp: int = 1
    dp_shard: int = 1
    ep: int = 1
    etp: int = 1
    chunks: int = 1
    zero: int = 0
    order: tuple[str, ...] = ("pp", "dp", "cp", "tp")

    def __post_init__(self) -> None:
        if sorted(self.order) != ["cp", "dp", "pp", "tp"] or self.order[0] != "pp":
            raise ValueError(
                f"parallel.order={'-'.join(self.order)} must begin with pp and name tp, cp and dp once each"
            )
        if self.dp % self.dp_shard:
            raise ValueError(f"parallel.dp_shard={self.dp_shard} does not divide dp={self.dp}")
        if (self.dp * self.cp * self.tp) % (self.ep * self.etp):
            raise ValueError(f"ep*etp={self.ep * self.etp} does not divide dp*cp*tp={self.dp * self.cp * self.tp}")

    @classmethod
    def of(cls, parallel: ParallelConfig, world: int) -> "Layout":
        """The layout of ``world`` ranks; ``parallel.dp``, ``dp_shard``, ``etp`` and ``chunks`` of 0 are derived.

        Raises ValueError if the world is not a multiple of tp*pp*cp, or contradicts an explicit dp.
        """
        model = parallel.tp * parallel.pp * parallel.cp
        if world % model:
            raise ValueError(
                f"{world} ranks cannot hold tp*pp*cp={parallel.tp}*{parallel.pp}*{parallel.cp}={model}; "
                f"use a multiple of {model} ranks"
            )
        dp = parallel.dp or world // model
        if dp * model != world:
            raise ValueError(
                f"parallel.dp={dp} needs {dp * model} ranks, but there are {world}; leave dp out to derive it"
            )
        return cls(
            tp=parallel.tp,
            cp=parallel.cp,
            dp=dp,
            pp=parallel.pp,
            dp_shard=parallel.dp_shard or dp,
            ep=parallel.ep,
            etp=parallel.etp or (parallel.tp if parallel.ep == 1 else 1),
            chunks=num_chunks(parallel),
            zero=parallel.zero,
            order=tuple(parallel.order.split("-")),
        )

    @property
    def world(self) -> int:
        """Number of ranks."""
        return self.pp * self.dp * self.cp * self.tp

    @property
    def edp(self) -> int:
        """Replicas of an expert."""
        return self.dp * self.cp * self.tp // (self.ep * self.etp)

    @property
    def dp_replicate(self) -> int:
        """Copies of the sharded state."""
        return self.dp // self.dp_shard

    @property
    def num_stages(self) -> int:
        """Pieces that the layers are cut into: pipeline ranks times chunks."""
        return self.pp * self.chunks

    def radices(self, expert: bool = False) -> tuple[tuple[str, int], ...]:
        """The digits of a rank, outermost first: (axis, size), dp as its two parts."""
        digits: list[tuple[str, int]] = []
        for axis in self.order:
            name = EXPERT_AXES[axis] if expert else axis
            if name == "dp":
                digits += [("dp_replicate", self.dp_replicate), ("dp_shard", self.dp_shard)]
            else:
                digits.append((name, getattr(self, name)))
        return tuple(digits)

    def coordinate(self, rank: int) -> dict[str, int]:
        """Where a rank stands on every axis of both factorings.

        Raises ValueError if the rank is not one of the world's.
        """
        if not 0 <= rank < self.world:
            raise ValueError(f"rank {rank} is not in a world of {self.world}")
        at = {**self._digits(rank, expert=True), **self._digits(rank, expert=False)}
        at["dp"] = at["dp_replicate"] * self.dp_shard + at["dp_shard"]
        return at

    def rank(self, at: Mapping[str, int]) -> int:
        """The rank at a dense coordinate; the inverse of ``coordinate``. Axes left out are 0."""
        number = 0
        digits = dict(at)
        if "dp" in digits:
            digits["dp_replicate"], digits["dp_shard"] = divmod(digits["dp"], self.dp_shard)
        for axis, size in self.radices():
            number = number * size + digits.get(axis, 0)
        return number

    def groups(self, *axes: str) -> tuple[tuple[int, ...], ...]:
        """All groups of ranks that differ only along ``axes``, each ascending, ordered by first rank.

        ``groups("tp")`` are the tensor-parallel groups, ``groups("dp", "cp")`` those that sum a dense gradient.
        """
        expert = any(axis in ("ep", "etp", "edp") for axis in axes)
        inside = {part for axis in axes for part in (("dp_replicate", "dp_shard") if axis == "dp" else (axis,))}
        names = [axis for axis, _ in self.radices(expert)]
        if unknown := inside.difference(names):
            raise ValueError(f"axes {sorted(unknown)} are not among {names}")
        members: dict[tuple[int, ...], list[int]] = {}
        for rank in range(self.world):
            digits = self._digits(rank, expert)
            members.setdefault(tuple(digits[axis] for axis in names if axis not in inside), []).append(rank)
        return tuple(tuple(group) for group in members.values())

    def subgroups(self, axis: str, size: int) -> tuple[tuple[int, ...], ...]:
        """The axis' groups cut into runs of ``size`` neighbours (ranks that hold copies of one kv head, say)."""
        if getattr(self, axis) % size:
            raise ValueError(f"runs of {size} do not divide {axis}={getattr(self, axis)}")
        return tuple(group[start : start + size] for group in self.groups(axis) for start in range(0, len(group), size))

    def describe(self) -> str:
        """A short name such as ``tp2 x pp2 x dp4`` (axes of size 1 are left out)."""
        sizes = [f"{axis}{getattr(self, axis)}" for axis in ("tp", "pp", "cp", "dp", "ep") if getattr(self, axis) > 1]
        return " x ".join(sizes) or "one process"

    def _digits(self, rank: int, expert: bool) -> dict[str, int]:
        digits = {}
        for axis, size in reversed(self.radices(expert)):
            rank, digits[axis] = divmod(rank, size)
        return digits
