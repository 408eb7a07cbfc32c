"""What a search has found, with its reasons: the whole answer of `megacore plan`."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megacore.cost.estimate import Estimate, with_notes
from megacore.cost.explain import Judge, Verdict, alternatives, difference, too_large, variants
from megacore.cost.planning import Wish, run_lines


@dataclass(frozen=True)
class Outcome:
    """``best``: fastest first, empty where nothing fits. ``runner_up``: why the second is second."""

    wish: Wish
    best: tuple[Estimate, ...]
    closest: Estimate | None
    counts: Mapping[str, int]
    verdicts: tuple[Verdict, ...] = ()
    runner_up: str = ""
    not_built: Estimate | None = None
    """A faster layout, of what the engine does not run yet."""

    def nothing(self) -> str:
        """What is said where no layout is left, with what would help."""
        wish = self.wish
        what = f"no layout of {wish.world:,} x {wish.machine.name} holds this run"
        if self.closest is None:
            batch = f" with a global batch of {wish.batch:,} samples" if wish.batch else ""
            keys = f" and {', '.join(sorted(wish.fixed))} as given" if wish.fixed else ""
            return f"no layout of {wish.world:,} devices is legal{batch}{keys}; give another batch, or fix fewer keys"
        return (
            f"{what}: {too_large(self.closest)}; use more devices or larger ones, a smaller --headroom or seq_len, or "
            "optim.offload=host"
        )

    def as_json(self) -> dict[str, Any]:
        """What the first of the list says besides its own figures."""
        return {
            "machine": self.wish.machine.name,
            "gpus": self.wish.world,
            "runner_up": self.runner_up,
            "alternatives": [each.as_json() for each in self.verdicts],
            "searched": dict(self.counts),
            "run_file": run_lines(self.best[0]),
        }


def judge(wish: Wish, top: int, reasons: bool = True) -> Outcome:
    """Search, and price what people take instead."""
    found = wish.search(max(top, 2))
    if not found.best or not reasons:
        return Outcome(wish, found.best[:top], found.closest, found.counts)
    winner, not_built = found.best[0], wish.not_built(found.best[0])
    best = found.best[:top]
    if not_built:
        best = (with_notes(winner, (faster_but(not_built, winner),)), *best[1:])
    judged = Judge(wish.space(), wish.machine, winner, wish.practice, wish.headroom)
    kinds = {
        name: allowed
        for name, allowed in {**alternatives(judged.space), **variants(winner)}.items()
        if not contradicts(wish, allowed)
    }
    runner_up = ""
    if len(found.best) > 1:
        second = found.best[1]
        runner_up = f"runner-up {second.name()}: {difference(winner, second)}"
    return Outcome(wish, best, found.closest, found.counts, judged.verdicts(kinds), runner_up, not_built)


def faster_but(not_built: Estimate, winner: Estimate) -> str:
    """What is said of a faster layout that the engine does not run yet."""
    gain = not_built.tokens_per_s_per_gpu / winner.tokens_per_s_per_gpu - 1
    return (
        f"{gain:.1%} faster, but not built yet: {not_built.name()}, {not_built.tokens_per_s_per_gpu:,.0f} tokens/s per "
        "GPU; --all ranks such layouts too"
    )


def contradicts(wish: Wish, allowed: Mapping[str, tuple[Any, ...]]) -> bool:
    """Whether a kind of layout needs another value of a key that the user has fixed."""
    p, t = wish.config.parallel, wish.config.train
    given = {
        name: getattr(section, name)
        for section, where in ((p, "parallel"), (t, "train"))
        for name in allowed
        if f"{where}.{name}" in wish.fixed
    }
    return any(value not in allowed[name] for name, value in given.items())
