"""Why the winner wins and what people usually take loses: every answer is two prices, term by term."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from megacore.cost.estimate import GB, Estimate, terms
from megacore.cost.machine import Machine
from megacore.cost.practice import OURS, Practice
from megacore.cost.search import Search, by_everything
from megacore.cost.space import Mesh, Space
from megacore.cost.states import spec_of

SMALL = 0.002
"""Share of a step below which a difference is not worth a word."""

# The sizes that practitioners name for a model of up to so many parameters: (billions, tp, pp).
BY_SIZE = ((9, 1, 1), (20, 2, 1), (40, 4, 2), (100, 8, 4), (300, 8, 16), (float("inf"), 8, 32))


@dataclass(frozen=True)
class Verdict:
    """A kind of layout that people take: the best of its kind (None where none is legal), and why it is not the
    winner. ``slower``: its step against the winner's, per token; 0 where it is the winner, None where it cannot run."""

    name: str
    estimate: Estimate | None
    slower: float | None
    why: str

    def as_json(self) -> dict[str, Any]:
        """As `plan --json` gives it."""
        found = self.estimate.as_json() if self.estimate else None
        return {"name": self.name, "slower": self.slower, "why": self.why, "estimate": found}


def alternatives(space: Space) -> Mapping[str, Mapping[str, tuple[Any, ...]]]:
    """Name -> the only values that it allows (see ``Space.allowed``)."""
    node, world = min(space.gpus_per_node, space.world), space.world
    tp, pp = rule_of_thumb(spec_of(space.config.model).num_params)
    kinds: dict[str, dict[str, tuple[Any, ...]]] = {
        "data parallel alone": {"tp": (1,), "pp": (1,), "cp": (1,), "zero": (0, 1)},
        "fully sharded (FSDP, ZeRO-3)": {"tp": (1,), "pp": (1,), "cp": (1,), "zero": (3,), "dp_shard": (world,)},
        "tensor parallel in a node, data parallel across": {"tp": (node,), "pp": (1,), "cp": (1,), "zero": (0, 1)},
        "fully sharded + tensor parallel (2D)": {"tp": (node,), "pp": (1,), "cp": (1,), "zero": (3,)},
        f"Megatron's rule for this size: tp {tp}, pp {pp}": {"tp": (tp,), "pp": (pp,), "cp": (1,), "zero": (0, 1)},
    }
    if world > node:
        kinds["hybrid sharding (HSDP): ZeRO-3 in a node, copies across"] = {
            "tp": (1,), "pp": (1,), "cp": (1,), "zero": (3,), "dp_shard": (node,),
        }  # fmt: skip
    if (tp, pp) != (8, 4):
        kinds["tp 8, pp 4"] = {"tp": (8,), "pp": (4,), "cp": (1,), "zero": (0, 1)}
    return MappingProxyType(kinds)


def rule_of_thumb(num_params: int) -> tuple[int, int]:
    """(tp, pp) that practitioners name for a model's size."""
    return next((tp, pp) for most, tp, pp in BY_SIZE if num_params <= most * 1e9)


def variants(winner: Estimate) -> Mapping[str, Mapping[str, tuple[Any, ...]]]:
    """The winner with one thing changed: what each of its choices is worth."""
    p = winner.config.parallel
    same: dict[str, tuple[Any, ...]] = {
        name: (getattr(p, name),)
        for name in ("tp", "pp", "cp", "ep", "etp", "zero", "dp_shard", "schedule", "recompute")
    }
    same["micro_batch_size"] = (winner.config.train.micro_batch_size,)
    if p.schedule == "interleaved":
        same["chunks"] = (p.chunks,)
    changed: dict[str, dict[str, tuple[Any, ...]]] = {}
    if p.schedule != "1f1b":
        changed["the winner with plain 1F1B"] = {**same, "schedule": ("1f1b",)}
    for zero in (1, 2, 3):
        if p.dp > 1 and zero != p.zero:
            others = {name: value for name, value in same.items() if name not in ("dp_shard", "recompute")}
            changed[f"the winner with ZeRO-{zero}"] = {**others, "zero": (zero,)}
    if p.recompute != "full":
        changed["the winner with all blocks recomputed"] = {**same, "recompute": ("full",)}
    return MappingProxyType(changed)


@dataclass(frozen=True)
class Judge:
    """Prices kinds of layouts against a winner, under the same constraints as it."""

    space: Space
    machine: Machine
    winner: Estimate
    practice: Practice = OURS
    headroom: float = 0.1

    def verdicts(self, kinds: Mapping[str, Mapping[str, tuple[Any, ...]]]) -> tuple[Verdict, ...]:
        """One for each kind."""
        return tuple(self.verdict(name, allowed) for name, allowed in kinds.items())

    def verdict(self, name: str, allowed: Mapping[str, tuple[Any, ...]]) -> Verdict:
        """The best of a kind, and why it loses."""
        space = replace(self.space, allowed=MappingProxyType({**self.space.allowed, **allowed}))
        found = Search(space, self.machine, self.practice, self.headroom).run(1, by_everything)
        if found.best:
            best = found.best[0]
            slower = self.winner.tokens_per_s / best.tokens_per_s - 1
            if best.layout_dict() == self.winner.layout_dict():
                return Verdict(name, best, 0.0, "this is the winner")
            return Verdict(name, best, slower, difference(self.winner, best))
        if found.closest:
            return Verdict(name, found.closest, None, too_large(found.closest))
        return Verdict(name, None, None, self.forbidden(space))

    def forbidden(self, space: Space) -> str:
        """Which rule keeps every layout of a kind from being run; what the batch forbids is one of them."""
        of = {name: values[0] for name, values in space.allowed.items()}
        tp, pp, cp = (int(of.get(name, 1)) for name in ("tp", "pp", "cp"))
        if space.world % (tp * pp * cp):
            return f"not legal: tp*pp*cp={tp * pp * cp} does not divide {space.world} devices"
        dp = space.world // (tp * pp * cp)
        mesh = Mesh(tp, pp, cp, dp, 1, tp, 1, space.wanted)
        way = next(iter(space.ways(mesh)), None)
        lines = space.problems(space.run(mesh, way)) if way else []
        if space.wanted % dp:
            if not space.batch:
                return (
                    f"the batch forbids it: {dp} replicas cannot share about {space.wanted} samples "
                    f"({space.wanted * space.config.train.seq_len:,} tokens); a larger --global-batch allows it"
                )
            return f"the batch forbids it: {lines[0] if lines else ''}"
        return f"not legal: {lines[0]}" if lines else "not legal together with the keys that are fixed"


def difference(winner: Estimate, other: Estimate) -> str:
    """Where the other's time goes: a sentence of terms per step of the winner's tokens, largest first."""
    ratio = winner.tokens / other.tokens
    slower = winner.tokens_per_s / other.tokens_per_s - 1
    gaps = [
        (name, seconds) for name, seconds in gaps_of(winner, other, ratio) if abs(seconds) > SMALL * winner.step.seconds
    ]
    words = ", ".join(f"{name} {seconds:+.3g} s" for name, seconds in gaps[:4])
    pace = f"{slower:.1%} slower" if slower >= 0.0005 else f"{-slower:.1%} faster" if slower <= -0.0005 else "as fast"
    return f"{pace}: {words}" if words else pace


def gaps_of(winner: Estimate, other: Estimate, ratio: float = 1.0) -> list[tuple[str, float]]:
    """(term, seconds that the other takes more), the largest first."""
    ours, theirs = terms(winner.step), terms(other.step)
    names = [*ours, *(name for name in theirs if name not in ours)]
    gaps = [(name, ratio * theirs.get(name, 0.0) - ours.get(name, 0.0)) for name in names]
    return sorted(gaps, key=lambda gap: -abs(gap[1]))


def too_large(closest: Estimate) -> str:
    """Which memory is missing, and what takes it."""
    worst = closest.worst
    parts = {name: getattr(worst, name) for name in ("params", "grads", "optimizer", "activations", "buffers")}
    most = sorted(parts.items(), key=lambda part: -part[1])[:2]
    takes = " and ".join(f"{name} {size / GB:.1f} GB" for name, size in most)
    return (
        f"does not fit: at least {worst.total / GB:.1f} GB of {closest.limit / GB:.1f} GB ({takes}), "
        f"as {closest.name()}"
    )
