"""One step of every optimizer, beside torch's fused AdamW and beside what this machine's memory can do at best.

All sides update the same weights from the same gradients, laid out as one process holds them, and take turns (see
`harness`). What a step must move (weights and state read and written, gradients read) over its time is its bandwidth;
`copy` copies as many bytes as the weights have and counts them twice. Nothing but its own optimizer limits a side,
so AdamW cannot be much faster than the copy, and an optimizer with little state may be quick at a low bandwidth.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megacore.bench.harness import Comparison, alternate, comparison
from megacore.config.optimizers import defaults, optimizer_names
from megacore.config.schema import RunConfig
from megacore.layout.buffer import BufferLayout
from megacore.layout.shards import runs_of
from megacore.mesh.group import Group
from megacore.optim.formats import StateFormat
from megacore.optim.rule import Rule, Share
from megacore.optim.rules import make_rule
from megacore.spec import ModelSpec

OURS, TORCH, COPY = "adamw", "torch.optim.AdamW(fused=True)", "copy"
LR = 1e-6  # weights and gradients stay what they were, about


@dataclass(frozen=True)
class Case:
    """Optimizers (none named: all) with moments in a format; torch's AdamW knows only that of the weights."""

    name: str
    kind: str
    optimizers: tuple[str, ...] = ()


CASES = (Case("adamw", "auto", ("adamw",)), Case("fp32", "auto"), Case("bf16", "bf16"), Case("int8", "int8"))


@dataclass(frozen=True)
class Side:
    """What a side's step moves and keeps: bytes per parameter."""

    traffic: float
    state: float
    kernel: str = ""


@dataclass(frozen=True)
class Measured:
    """All sides of a case, timed in turns."""

    comparison: Comparison
    sides: Mapping[str, Side]
    num_params: int

    def bandwidth(self, name: str) -> float:
        """Bytes per second of a side, at its median."""
        return self.sides[name].traffic * self.num_params / self.comparison.side(name).median


class Weights:
    """fp32 weights and gradients of a model in flat buffers: of a share, and of torch's parameters."""

    def __init__(self, config: RunConfig) -> None:
        self.specs = ModelSpec.of(config.model).params
        self.layout = BufferLayout.of((spec.name, spec.shape) for spec in self.specs)
        torch.manual_seed(config.train.seed)
        self.weights = 0.02 * torch.randn(self.layout.size)
        self.pristine = 1e-3 * torch.randn(self.layout.size)
        self.grads = self.pristine.clone()
        self.runs = runs_of(self.layout, 0, 1)
        self.num_params = sum(run.numel for run in self.runs)

    def of(self, buffer: Tensor) -> list[Tensor]:
        """Each run's view."""
        return [buffer[run.offset : run.offset + run.numel] for run in self.runs]

    def share(self, state: StateFormat) -> Share:
        """What a rule is given."""
        by_name = {spec.name: spec for spec in self.specs}
        specs = tuple(by_name[run.name] for run in self.runs)
        return Share(
            self.runs,
            specs,
            tuple(self.of(self.weights)),
            tuple(0.1 if spec.decay else 0.0 for spec in specs),
            (1.0,) * len(specs),
            Group.single("tp"),
            Group.single("dp"),
            torch.float32,
            self.weights.device,
            state,
        )

    def restore(self) -> None:
        """Rules may overwrite gradients."""
        self.grads.copy_(self.pristine)


def measure(case: Case, config: RunConfig, rounds: int) -> Measured:
    """Time the case's optimizers with moments in its format."""
    weights = Weights(config)
    share = weights.share(StateFormat(case.kind))
    rules = {name: make_rule(name, share, defaults(name)) for name in case.optimizers or optimizer_names()}
    steps: dict[str, Callable[[], object]] = {COPY: _copy(weights), TORCH: _torch_step(weights)}
    steps |= {name: _rule_step(rule, weights) for name, rule in rules.items()}
    item = weights.weights.element_size()
    sides = {COPY: Side(2 * item, 0), TORCH: Side(3 * item + 2 * 2 * item, 2 * item)}
    for name, rule in rules.items():
        state = sum(tensor.nbytes for tensors in rule.state().values() for tensor in tensors) / weights.num_params
        kernel = ", ".join(choice.backend for choice in rule.kernels)
        sides[name] = Side(3 * item + 2 * state, state, kernel)
    seconds = alternate(steps, rounds, warmup=2, before=weights.restore)
    settings = {
        "parameters": weights.num_params,
        "tensors": len(weights.runs),
        "moments": case.kind,
        "threads": torch.get_num_threads(),
    }
    return Measured(comparison(f"optim, {case.name}", OURS, seconds, settings), sides, weights.num_params)


def _rule_step(rule: Rule, weights: Weights) -> Callable[[], object]:
    grads, taken = weights.of(weights.grads), torch.ones(())
    return lambda: rule.update(grads, LR, taken)


def _torch_step(weights: Weights) -> Callable[[], object]:
    shapes = {slot.name: slot.shape for slot in weights.layout.slots}
    groups: dict[float, list[nn.Parameter]] = {0.1: [], 0.0: []}
    parts = zip(weights.runs, weights.share(StateFormat()).weight_decay, weights.of(weights.weights))
    for (run, decay, weight), grad in zip(parts, weights.of(weights.grads)):
        param = nn.Parameter(weight.view(shapes[run.name]))
        param.grad = grad.view(shapes[run.name])
        groups[decay].append(param)
    parameters = [{"params": params, "weight_decay": decay} for decay, params in groups.items() if params]
    return torch.optim.AdamW(parameters, lr=LR, betas=(0.9, 0.95), fused=True).step


def _copy(weights: Weights) -> Callable[[], object]:
    target = torch.zeros_like(weights.weights)
    return lambda: target.copy_(weights.weights)
