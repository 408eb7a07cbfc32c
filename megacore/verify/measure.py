"""Holds what the ranks of a layout have against what one process has.

Each rank measures its own pieces of every parameter: nothing large travels. From the findings of all ranks follows that
the pieces make up every parameter, that copies are the same bits, and how far the worst element or parameter is off.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from megacore.layout.buffer import BufferLayout
from megacore.sharding.flat import FlatBuffer
from megacore.spec import ModelSpec, ParamSpec
from megacore.train.build import Built

BOUND = 1e-10
"""|a - b| <= BOUND * max(|b|, FLOOR * global norm), in float64."""

FLOOR = 1e-4
"""Some parameters have a gradient that is zero but for round-off, such as the key bias without RoPE."""

ROUNDINGS = 2
"""An error as small as this is luck: one process of a small model in float32 is off by 0.8 to 2.2 roundings, another
order of summation by as many, and the ratio of the two says nothing."""

WHAT = ("gradient", "weight")


class Piece(NamedTuple):
    """What a rank holds of a parameter: ``tensor``, which is [start, start + size) of the whole along ``dim``."""

    name: str
    dim: int
    start: int
    size: int
    tensor: Tensor

    def of(self, whole: Tensor) -> Tensor:
        """The same part of a whole parameter."""
        return whole.narrow(self.dim, self.start, self.size)


def pieces_of(buffer: FlatBuffer, specs: Sequence[ParamSpec], tp_rank: int, tp_size: int) -> Iterator[Piece]:
    """All pieces in a rank's buffer, owned or copied; their tensors are views of it."""
    views = buffer.views()
    for spec in specs:
        if spec.name in views:
            for piece in spec.pieces(tp_rank, tp_size):
                part = views[spec.name].narrow(spec.dim, piece.local, piece.size)
                yield Piece(spec.name, spec.dim, piece.start, piece.size, part)


@dataclass(frozen=True)
class Yardstick:
    """What one process computed in float64: every ``gradient`` and ``weight``, whole, by name. ``floors`` are FLOOR of
    the norm of all gradients and of all weights."""

    loss: float
    grad_norm: float
    floors: Mapping[str, float]
    wholes: Mapping[str, Mapping[str, Tensor]]

    @staticmethod
    def write(built: Built, loss: float, grad_norm: float, folder: Path) -> None:
        """Keep what this process, which is alone, has computed. Raises ValueError if it is nothing to compare with."""
        if not (math.isfinite(loss) and math.isfinite(grad_norm) and grad_norm > 0):
            raise ValueError(
                f"one process alone has the loss {loss} and the gradient norm {grad_norm}: nothing can be compared "
                "with that; verify a run that trains"
            )
        folder.mkdir()
        wholes, floors = _whole_buffers(built.spec, folder), {}
        for what, buffer in _buffers(built):
            for name, view in buffer.views().items():
                wholes[what].views()[name].copy_(view)
            floors[what] = FLOOR * wholes[what].data.norm().item()
        facts = {"loss": loss, "grad_norm": grad_norm, "floors": floors}
        (folder / "yardstick.json").write_text(json.dumps(facts))

    @classmethod
    def read(cls, spec: ModelSpec, folder: Path) -> "Yardstick":
        """What `write` kept; the tensors are memory that all ranks share."""
        facts = json.loads((folder / "yardstick.json").read_text())
        return cls(**facts, wholes={what: buffer.views() for what, buffer in _whole_buffers(spec, folder).items()})


def _whole_buffers(spec: ModelSpec, folder: Path) -> dict[str, FlatBuffer]:
    """Files in ``folder``, made if need be, as memory."""
    layout = BufferLayout.of((param.name, param.shape) for param in spec.params)
    return {
        what: FlatBuffer(
            layout, torch.from_file(str(folder / f"{what}.f64"), shared=True, size=layout.size, dtype=torch.float64)
        )
        for what in WHAT
    }


def _buffers(built: Built) -> Iterator[tuple[str, FlatBuffer]]:
    """All of this rank's gradients and weights, by what they are; ranks that own parts of them call this together."""
    yield from zip(WHAT, map(built.storage.whole, ("grads", "params")), strict=True)


class Finding(NamedTuple):
    """One piece held against the yardstick. ``worst``: the largest |a - b| / max(|b|, floor) of its elements;
    ``squares``: the sum of (a - b)^2; ``digest``: of its bits."""

    what: str
    name: str
    start: int
    size: int
    digest: str
    worst: float
    squares: float


def findings(built: Built, yardstick: Yardstick) -> list[Finding]:
    """All pieces that this rank holds, measured."""
    tp = built.mesh.tp
    found = []
    for what, buffer in _buffers(built):
        for piece in pieces_of(buffer, built.spec.params, tp.rank, tp.size):
            ours = piece.tensor.detach().to("cpu", torch.float64) + 0.0  # no -0.0, whose bits are others
            expected = piece.of(yardstick.wholes[what][piece.name])
            off = (ours - expected).abs()
            worst = (off / expected.abs().clamp(min=yardstick.floors[what])).max().item()
            digest = hashlib.blake2b(ours.contiguous().numpy().data, digest_size=8).hexdigest()
            squares = off.square().sum().item()
            found.append(Finding(what, piece.name, piece.start, piece.size, digest, worst, squares))
    return found


Of = tuple[str, str]
"""gradient or weight, and the parameter's name."""


@dataclass(frozen=True)
class Comparison:
    """All ranks' findings together: of each parameter the worst element, and the norm of its difference. ``problems``:
    parts that no rank holds, copies that differ."""

    worst: Mapping[Of, float]
    distance: Mapping[Of, float]
    problems: tuple[str, ...]

    @classmethod
    def of(cls, spec: ModelSpec, found: Sequence[Finding]) -> "Comparison":
        """Put the findings of all ranks together."""
        by_place: dict[Of, dict[tuple[int, int], list[Finding]]] = {}
        for finding in found:
            places = by_place.setdefault((finding.what, finding.name), {})
            places.setdefault((finding.start, finding.size), []).append(finding)
        worst, distance, problems = {}, {}, []
        for what in WHAT:
            for param in spec.params:
                places = by_place.get((what, param.name), {})
                copies = list(places.values())
                worst[what, param.name] = max((_number(one.worst) for each in copies for one in each), default=math.inf)
                squares = sum(max(_number(one.squares) for one in each) for each in copies)
                distance[what, param.name] = math.sqrt(squares)
                if not _tile(sorted(places), param.shape[param.dim]):
                    problems.append(f"{param.name}: the pieces that ranks hold do not make up the {what}")
                if any(len({one.digest for one in each}) > 1 for each in copies):
                    problems.append(f"{param.name}: ranks hold copies of the {what} that differ in their bits")
        return cls(worst, distance, tuple(problems))


def _tile(places: Sequence[tuple[int, int]], length: int) -> bool:
    """Whether (start, size) places lie end to end and fill ``length``."""
    end = 0
    for start, size in places:
        if start != end:
            return False
        end += size
    return end == length


def _number(value: float) -> float:
    """nan, which nothing compares with, as infinity."""
    return math.inf if math.isnan(value) else value


@dataclass(frozen=True)
class Bound:
    """How far a layout may be off: in float64 BOUND for each element; in the run's own dtype twice the error of one
    process (``own``), which is taken to be at least ROUNDINGS (of ``eps`` each) of a parameter's norm."""

    yardstick: Yardstick
    eps: float = 0.0
    own: Comparison | None = None
    own_loss: float = 0.0
    own_grad_norm: float = 0.0

    def excess(self, comparison: Comparison) -> dict[Of, float]:
        """Each parameter's difference in units of the bound: more than 1 is too much."""
        if self.own is None:
            return {of: worst / BOUND for of, worst in comparison.worst.items()}
        return {of: distance / self._allowed(of, self.own) for of, distance in comparison.distance.items()}

    def _allowed(self, of: Of, own: Comparison) -> float:
        what, name = of
        size = max(self.yardstick.wholes[what][name].norm().item(), self.yardstick.floors[what])
        return 2 * max(own.distance[of], ROUNDINGS * self.eps * size)

    def scalar_problems(self, loss: float, grad_norm: float) -> Iterator[str]:
        """What is wrong with a layout's loss and gradient norm."""
        for name, ours, exact, own in (
            ("loss", loss, self.yardstick.loss, self.own_loss),
            ("gradient norm", grad_norm, self.yardstick.grad_norm, self.own_grad_norm),
        ):
            rounding = ROUNDINGS * self.eps * abs(exact)
            allowed = BOUND * abs(exact) if self.own is None else 2 * max(abs(own - exact), rounding)
            if not abs(ours - exact) <= allowed:  # nan is not
                yield f"{name} {ours!r}, of one process {exact!r}: more than {allowed:.1e} apart"
