"""Whether two sources hold the same weights, and whether they compute the same logits."""

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from megacore.checkpoint.hf.family import differences
from megacore.checkpoint.source import WeightSource
from megacore.config.schema import ModelConfig
from megacore.kernels.table import resolve
from megacore.model.inputs import Inputs
from megacore.model.stage import Objective, Stage
from megacore.parallel.parameters import ParameterMaker
from megacore.parallel.tensor import TensorParallel
from megacore.spec import ModelSpec, ParamSpec

SLICE_BYTES = 1 << 26
VOCABULARY = ("embedding.tokens.weight", "head.weight")


@dataclass(frozen=True)
class Compared:
    """What was found of all weights. ``rounded`` are those that one side has in a shorter format, and whose numbers are
    the other's to the nearest; ``different`` lists the others, ``max_difference`` is over all."""

    num: int
    equal: int
    rounded: int
    different: tuple[str, ...]
    max_difference: float

    @property
    def is_exact(self) -> bool:
        """All weights are the same to the last bit."""
        return self.equal == self.num

    @property
    def agrees(self) -> bool:
        """None differs by more than its format."""
        return not self.different


def model_differences(one: ModelConfig, other: ModelConfig) -> list[str]:
    """Keys of [model] that differ and matter to what is computed; vocabularies are compared by the weights."""
    return [
        f"model.{name} is {mine} in the first and {theirs} in the second"
        for name, mine, theirs in differences(one, other)
        if name != "vocab_size"
    ]


def compare_weights(one: WeightSource, other: WeightSource) -> Compared:
    """All weights of two models of the same shape; rows that only one vocabulary has must be zeros.

    Raises ValueError where the models have other parameters.
    """
    theirs = ModelSpec.of(other.model).by_name
    params = ModelSpec.of(one.model).params
    if strange := {param.name for param in params} ^ theirs.keys():
        raise ValueError(f"{sorted(strange)[0]} is a weight of only one of {one.what} and {other.what}")
    equal = rounded = 0
    different, worst = [], 0.0
    for param in params:
        verdict, difference = _compare(one, other, param, theirs[param.name])
        equal, rounded = equal + (verdict == "equal"), rounded + (verdict == "rounded")
        worst = max(worst, difference)
        if verdict == "different":
            different.append(param.name)
    return Compared(len(params), equal, rounded, tuple(different), worst)


def _compare(one: WeightSource, other: WeightSource, mine: ParamSpec, theirs: ParamSpec) -> tuple[str, float]:
    """("equal", "rounded" or "different"; the largest difference) of one weight."""
    name, rest = mine.name, mine.shape[1:]
    if rest != theirs.shape[1:] or (mine.shape[0] != theirs.shape[0] and name not in VOCABULARY):
        raise ValueError(f"{name} has shape {list(mine.shape)} in {one.what}, {list(theirs.shape)} in {other.what}")
    common = min(mine.shape[0], theirs.shape[0])
    step = max(1, SLICE_BYTES // max(1, prod(rest) * 8))
    same, worst = True, 0.0
    for row in range(0, max(mine.shape[0], theirs.shape[0]), step):
        sides = []
        for source, param in ((one, mine), (other, theirs)):
            count = min(step, param.shape[0] - row)
            if count > 0:
                sides.append(source.read(name, (row, *(0 for _ in rest)), (count, *rest)))
        longest = max(sides, key=len)
        shared = max(0, min(len(longest), common - row))
        if longest[shared:].count_nonzero():
            return "different", float(longest[shared:].abs().max())
        if shared:
            a, b = (side[:shared] for side in sides)
            same = same and torch.equal(*_narrowed(a, b))
            worst = max(worst, float((a.double() - b.double()).abs().max()))
    if not same:
        return "different", worst
    return ("equal" if one.dtype(name) == other.dtype(name) else "rounded"), worst


def _narrowed(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the shorter of their formats, as integers: so that NaNs and signs of zeros count, too."""
    dtype = min(a.dtype, b.dtype, key=lambda each: torch.finfo(each).bits)
    bits = {8: torch.int64, 4: torch.int32, 2: torch.int16}[dtype.itemsize]
    return a.to(dtype).view(bits), b.to(dtype).view(bits)


@torch.no_grad()
def engine_logits(source: WeightSource, token_bs: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """[b, s, V]: what the engine makes of ``token_bs`` in one process on the CPU, with weights from ``source``."""
    model, tp, device = source.model, TensorParallel.single(), torch.device("cpu")
    kernels, _ = resolve(device, dtype)
    specs = ModelSpec.of(model).by_name
    make = ParameterMaker(specs, tp.group, device, dtype, seed=0, filled=False)
    stage = Stage(model, make, tp, kernels, Objective(), range(model.num_layers))
    for name, parameter in stage.named_parameters():
        parameter.data = torch.empty(parameter.shape, dtype=dtype)
        _fill(parameter, source, name)
    ordinal_b = torch.arange(len(token_bs))
    logits_tv = stage(Inputs(token_bs, token_bs, ordinal_b, training=False), logits=True)
    return logits_tv.view(*token_bs.shape, model.vocab_size)


def _fill(parameter: Tensor, source: WeightSource, name: str) -> None:
    rest = parameter.shape[1:]
    step = max(1, SLICE_BYTES // max(1, prod(rest) * parameter.dtype.itemsize))
    for row in range(0, parameter.shape[0], step):
        count = min(step, parameter.shape[0] - row)
        parameter[row : row + count] = source.read(name, (row, *(0 for _ in rest)), (count, *rest))


def made_up_tokens(model: ModelConfig, number: int, seed: int = 0) -> Tensor:
    """[2, s]: random tokens, ``number`` of them as far as the model's length allows."""
    length = max(1, min(number // 2, model.max_positions))
    return torch.randint(model.vocab_size, (2, length), generator=torch.Generator().manual_seed(seed))


def largest(one: Tensor, other: Tensor) -> float:
    """The largest difference of two logits over the tokens that both vocabularies have; NaNs are infinitely far."""
    width = min(one.shape[-1], other.shape[-1])
    difference = (one[..., :width].double() - other[..., :width].double()).abs().max()
    return float("inf") if bool(difference.isnan()) else float(difference)
