"""Adafactor, CAME, SM3 and Adam-mini as their papers write them, on one whole matrix or vector at a time.

Each is ``step(memory, settings, t, weight, grad, blocks)``: what the learning rate is multiplied with. ``memory`` is a
dict of the matrix' own, empty at first; t counts steps from 1; ``blocks`` names Adam-mini's block of every element.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

Memory = dict[str, Tensor]
Settings = Mapping[str, float]
Step = Callable[[Memory, Settings, int, Tensor, Tensor, Tensor], Tensor]


def rms(x: Tensor) -> Tensor:
    return x.square().mean().sqrt()


def averaged(memory: Memory, name: str, value: Tensor, beta: float) -> Tensor:
    memory[name] = beta * memory.get(name, torch.zeros_like(value)) + (1 - beta) * value
    return memory[name]


def second_moment(memory: Memory, name: str, squares: Tensor, beta: float) -> Tensor:
    """Factored for matrices (Shazeer and Stern 2018, algorithm 4), whole for vectors (algorithm 5)."""
    if squares.dim() == 1:
        return averaged(memory, name, squares, beta)
    n, m = squares.shape
    row = averaged(memory, f"{name} rows", squares @ torch.ones(m, dtype=squares.dtype), beta)
    column = averaged(memory, f"{name} columns", torch.ones(n, dtype=squares.dtype) @ squares, beta)
    return torch.outer(row, column) / row.sum()


def adafactor(memory: Memory, settings: Settings, t: int, weight: Tensor, grad: Tensor, _: Tensor) -> Tensor:
    beta = 1 - t ** -settings["decay_rate"]
    update = grad / second_moment(memory, "v", grad**2 + settings["eps"], beta).sqrt()
    clipped = update / max(1.0, float(rms(update)) / settings["clip_threshold"])
    if not settings["scale_parameter"]:
        return clipped
    return max(settings["eps_scale"], float(rms(weight))) * clipped


def came(memory: Memory, settings: Settings, t: int, weight: Tensor, grad: Tensor, _: Tensor) -> Tensor:
    update = grad / second_moment(memory, "v", grad**2 + settings["eps"], settings["beta2"]).sqrt()
    clipped = update / max(1.0, float(rms(update)) / settings["clip_threshold"])
    mean = averaged(memory, "m", clipped, settings["beta1"])
    if grad.dim() == 1:
        return mean
    instability = (clipped - mean) ** 2 + settings["eps_deviation"]
    return mean / second_moment(memory, "s", instability, settings["beta3"]).sqrt()


def sm3(memory: Memory, settings: Settings, t: int, weight: Tensor, grad: Tensor, _: Tensor) -> Tensor:
    """Algorithm 2, its cover sets written out as masks: every row and every column; every element of a vector."""
    if grad.dim() == 1:
        cover = list(torch.eye(len(grad), dtype=torch.bool))
    else:
        n, m = grad.shape
        cover = [torch.arange(n)[:, None].expand(n, m) == i for i in range(n)]
        cover += [torch.arange(m).expand(n, m) == j for j in range(m)]
    old = memory.get("mu", torch.zeros(len(cover), dtype=grad.dtype))
    bound = torch.full_like(grad, torch.inf)
    for mask, mu in zip(cover, old, strict=True):
        bound[mask] = bound[mask].clamp(max=float(mu))
    nu = bound + grad**2
    memory["mu"] = torch.stack([nu[mask].max() for mask in cover])
    scaled = torch.where(nu == 0, 0, grad / nu.sqrt())
    return averaged(memory, "m", scaled, settings["momentum"])


def adam_mini(memory: Memory, settings: Settings, t: int, weight: Tensor, grad: Tensor, blocks: Tensor) -> Tensor:
    squares = torch.empty_like(grad)
    for block in blocks.unique():
        squares[blocks == block] = grad[blocks == block].square().mean()
    first = averaged(memory, "m", grad, settings["beta1"]) / (1 - settings["beta1"] ** t)
    second = averaged(memory, "v", squares, settings["beta2"]) / (1 - settings["beta2"] ** t)
    return first / (second.sqrt() + settings["eps"])


REFERENCES: Mapping[str, Step] = MappingProxyType(
    {"adafactor": adafactor, "came": came, "sm3": sm3, "adam-mini": adam_mini}
)
