"""Norms of parameters, gradients and updates by part of the model, and what became of gradients: on demand.

A step that is looked at needs one collective more, and a copy of this rank's weights; the others nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megacore.mesh.collectives import all_reduce
from megacore.mesh.mesh import ParallelMesh
from megacore.optim.clipping import Clipped
from megacore.optim.norm import GlobalNorm
from megacore.spec import ParamSpec

PARTS = ("embedding", "attention", "mlp", "norms", "head")
NORMS = ("parameter_norm", "gradient_norm", "update_norm")


@dataclass(frozen=True)
class Statistics:
    """Figures of a step, still on the device."""

    parts: tuple[str, ...]
    values: Tensor
    """float64: each of ``NORMS`` of each part, the fractions of clipped steps and of zeros among gradients."""

    def record(self) -> dict[str, Any]:
        """As metrics.jsonl has them; waits for the device.

        ``clipped_fraction`` is of the steps since the last statistics, and gradients are those of the mean loss
        before they are clipped.
        """
        *norms, clipped, zeros = self.values.tolist()
        rows = (norms[start : start + len(self.parts)] for start in range(0, len(norms), len(self.parts)))
        by_part = {name: dict(zip(self.parts, row)) for name, row in zip(NORMS, rows, strict=True)}
        return {**by_part, "clipped_fraction": clipped, "zero_fraction": zeros}


class Watch:
    """Looks at steps. Of each that is due: ``before``, then the clipping, then ``after`` the update."""

    def __init__(self, norm: GlobalNorm, specs: Sequence[ParamSpec], mesh: ParallelMesh) -> None:
        """``norm`` is that of the gradients, ``specs`` all parameters of the model in global order."""
        self.norm, self.counted, self.mesh = norm, norm.counted, mesh
        parts = [part_of(spec.name) for spec in specs]
        self.parts = tuple(part for part in PARTS if part in parts)
        numbers = torch.tensor([self.parts.index(part) for part in parts], dtype=torch.long)
        self.part_of_param = numbers.to(mesh.device)
        self.part_of_counted = self.part_of_param[norm.places]
        self.changed: list[Tensor] = []

    def clipped(self, clipped: Clipped) -> None:
        """Every step, due or not: remembers whether clipping changed something."""
        assert clipped.changed is not None, "the clipping must be watched"
        self.changed.append(clipped.changed)

    @torch.no_grad()
    def before(self, grads: Sequence[Tensor], weights: Sequence[Tensor]) -> None:
        """``grads`` and ``weights`` (one 1-D tensor per run) before clipping and update; weights are copied."""
        zeros = [(part == 0).sum() for part in self.counted.of(grads)]
        device = self.mesh.device
        self.zeros = torch.stack(zeros).sum() if zeros else torch.zeros((), dtype=torch.int64, device=device)
        self.weights = [weight.clone() for weight in weights]

    @torch.no_grad()
    def after(self, weights: Sequence[Tensor], clipped: Clipped) -> Statistics:
        """The figures of a step that was taken or skipped; ``weights`` are those of before, updated."""
        num = len(self.parts)
        squares = [self._squares(self.weights)]
        for old, new in zip(self.weights, weights, strict=True):
            old.sub_(new)
        squares.append(self._squares(self.weights))
        self.weights = []
        counts = torch.stack((self.zeros, torch.full_like(self.zeros, self.counted.numel)))
        local = torch.cat([*squares, counts.to(torch.float64), torch.stack(self.changed).to(torch.float64)])
        total = self._sum(local)
        gradients = torch.zeros(num, dtype=torch.float64, device=total.device)
        gradients.index_add_(0, self.part_of_param, clipped.norms.square())
        changed, self.changed = total[2 * num + 2 :] > 0, []
        fractions = torch.stack((changed.to(torch.float64).mean(), total[2 * num] / total[2 * num + 1]))
        parameters, updates = total[:num], total[num : 2 * num]
        norms = torch.cat((parameters, gradients, updates)).sqrt()
        return Statistics(self.parts, torch.cat((norms, fractions)))

    def _squares(self, tensors: Sequence[Tensor]) -> Tensor:
        """[num_parts], of what counts here."""
        return self.norm.sums(self.counted.of(tensors), self.part_of_counted, len(self.parts))

    def _sum(self, local: Tensor) -> Tensor:
        """Over all ranks, of which several hold the same where state is not shared among all."""
        different = self.mesh.model.size * self.norm.shards.size
        return all_reduce(local, self.mesh.world) / (self.mesh.world.size // different)


def part_of(name: str) -> str:
    """The part of the model that a parameter belongs to: one of ``PARTS``."""
    modules = name.split(".")[:-1]
    if modules[-1].endswith("norm"):
        return "norms"
    for part in PARTS:
        if part in modules:
            return part
    raise ValueError(f"the parameter {name} belongs to none of {', '.join(PARTS)}; give it a place in part_of")
