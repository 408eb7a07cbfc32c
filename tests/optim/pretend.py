"""Parameters of a small model, cut into shards that are all in this process."""

import random
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from megacore.config.optimizers import defaults
from megacore.layout.partition import Segment
from megacore.layout.shards import Run
from megacore.mesh.group import Group
from megacore.optim.formats import StateFormat
from megacore.optim.rule import Rule, Share
from megacore.optim.rules import make_rule
from megacore.spec import ParamSpec
from megacore.spec.params import columns, rows

CPU = torch.device("cpu")
TAKEN = torch.ones(())
SPECS = (
    ParamSpec("embedding", (11, 6), rows(Segment(11)), decay=False),
    ParamSpec("fused", (28, 10), rows(Segment(16, 4), Segment(8, 4), Segment(4, 4)), is_matmul=True),
    ParamSpec("narrow", (9, 13), columns(Segment(13)), is_matmul=True),
    ParamSpec("nothing", (0, 6), rows(Segment(0))),
    ParamSpec("bias", (7,), decay=False),
    ParamSpec("one", (1,), decay=False),
    ParamSpec("norm", (200,), decay=False),
)
AUTO = StateFormat()
STEPS = 50
DECAY = 0.1
SCALES = {"embedding": 0.5, "bias": 2.0}
"""Of the learning rate, where it is not 1."""


def first_weight(spec: ParamSpec) -> Tensor:
    return torch.randn(spec.shape, generator=torch.Generator().manual_seed(len(spec.name)), dtype=torch.float64)


def gradient(spec: ParamSpec, step: int) -> Tensor:
    """Of very different sizes: some are far below eps."""
    place = SPECS.index(spec)
    make = torch.Generator().manual_seed(100 * step + place)
    return torch.randn(spec.shape, generator=make, dtype=torch.float64) * 10.0 ** (-2 * place)


def rate(step: int) -> float:
    return 1e-2 * (1 + step % 7)


def random_cuts(num_shards: int, seed: int, multiple: int = 1) -> list[list[tuple[int, int]]]:
    """Of every shard, what it has of each parameter: (start, stop), borders at multiples of ``multiple``."""
    draw = random.Random(seed)
    of_params = []
    for spec in SPECS:
        inner = [draw.randint(0, spec.numel) // multiple * multiple for _ in range(num_shards - 1)]
        borders = [0, *sorted(inner), spec.numel]
        of_params.append(list(zip(borders, borders[1:])))
    return [list(shard) for shard in zip(*of_params)]


def make_share(
    cut: Sequence[tuple[int, int]],
    dtype: torch.dtype = torch.float64,
    state: StateFormat = AUTO,
    scales: Mapping[str, float] = SCALES,
    decay: float = DECAY,
) -> Share:
    """A shard that holds elements (start, stop) of every parameter of ``SPECS``; empty ones are left out."""
    runs, specs, offset = [], [], 0
    for spec, (start, stop) in zip(SPECS, cut):
        if start < stop:
            runs.append(Run(spec.name, start, stop, offset))
            specs.append(spec)
            offset += -(-(stop - start) // 64) * 64
    return Share(
        tuple(runs),
        tuple(specs),
        tuple(first_weight(spec).view(-1)[run.start : run.stop].to(dtype) for spec, run in zip(specs, runs)),
        tuple(decay if spec.decay else 0.0 for spec in specs),
        tuple(scales.get(spec.name, 1.0) for spec in specs),
        Group.single("tp"),
        Group.single("dp"),
        dtype,
        CPU,
        state,
    )


def whole() -> list[tuple[int, int]]:
    """One shard that holds everything."""
    return [(0, spec.numel) for spec in SPECS]


def rule_of(name: str, share: Share, **given: float) -> Rule:
    return make_rule(name, share, {**defaults(name), **given})


def grads_of(share: Share, step: int) -> list[Tensor]:
    return [
        gradient(spec, step).view(-1)[run.start : run.stop].to(share.dtype)
        for spec, run in zip(share.specs, share.runs)
    ]


def run_steps(rule: Rule, steps: Sequence[int] = range(1, STEPS + 1)) -> None:
    for step in steps:
        rule.update(grads_of(rule.share, step), rate(step), TAKEN)


def put_together(shares: Sequence[Share]) -> dict[str, Tensor]:
    """Every parameter's weights, 1-D, from all shards."""
    found = {spec.name: torch.full((spec.numel,), torch.nan, dtype=shares[0].dtype) for spec in SPECS}
    for share in shares:
        for run, weight in zip(share.runs, share.weights):
            found[run.name][run.start : run.stop] = weight
    return found


def bits(rule: Rule) -> dict[str, Tensor]:
    """All that a rule may write, as integers: -0.0 is not 0.0 and nan is itself."""
    tensors = {f"weight {run.name}": weight for run, weight in zip(rule.share.runs, rule.share.weights)}
    tensors |= {f"{name} {i}": tensor for name, of in rule.state().items() for i, tensor in enumerate(of)}
    tensors["clock"] = rule.clock
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return {name: tensor.contiguous().view(kinds[tensor.element_size()]).clone() for name, tensor in tensors.items()}
