"""The layers of a run that multiply in FP8: their kernels, the weights they keep, what they count and measure."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from enum import IntEnum
from functools import partial
from weakref import ref

import torch
from torch import Tensor

from megacore.kernels.fp8.formats import Scaled
from megacore.kernels.fp8.products import Product
from megacore.kernels.fp8.recipes import Current, Delayed, Recipe, Role
from megacore.kernels.linear import LinearKernel
from megacore.mesh.collectives import all_reduce
from megacore.mesh.group import Group


class Kind(IntEnum):
    """The three products of a linear layer."""

    FORWARD = 0
    DGRAD = 1
    WGRAD = 2


@dataclass(frozen=True)
class SignalToNoise:
    """What the products of a step are worth; still on the device."""

    layers: tuple[str, ...]
    powers: Tensor
    """float64 [layer, kind, 2]: sums of squares of exact products, and of what FP8 adds to them."""

    def decibels(self) -> dict[str, float]:
        """Of each product, such as ``layers.0.mlp.down.forward``; waits for the device."""
        signal, noise = self.powers.unbind(-1)
        found = (10 * torch.log10(signal / noise)).tolist()
        rows = zip(self.layers, found, strict=True)
        return {f"{layer}.{kind.name.lower()}": row[kind] for layer, row in rows for kind in Kind}


class Fp8:
    """All layers of the model that multiply in FP8, by their global names; a rank has some of them.

    Weights are brought into FP8 when they are first needed and kept, as they are and transposed, until there are new
    ones (``renew``) or they are let go (``forget``, of ZeRO-3): over microbatches, forward and backward.
    Inputs are kept in the format of training and brought into FP8 for each of their two products; so are gradients
    with a scale per block, others once.
    """

    def __init__(
        self, recipe: Recipe, product: Product, layers: Sequence[str], world: Group, device: torch.device
    ) -> None:
        self.recipe, self.product, self.layers, self.world = recipe, product, tuple(layers), world
        self.numbers = {name: number for number, name in enumerate(self.layers)}
        self.kernels: Mapping[str, LinearKernel] = {name: self._kernel(number) for name, number in self.numbers.items()}
        """Of each layer."""
        self.products: Counter[tuple[str, Kind]] = Counter()
        """How many products there were in FP8."""
        self.weights: dict[int, Scaled] = {}
        self.transposed: dict[int, Scaled] = {}
        self.recent: dict[int, tuple[ref[Tensor], Scaled]] = {}
        """Of each layer, the gradient whose first product was made, as long as the second one is outstanding."""
        self.measures = False
        self.powers = torch.zeros(len(self.layers), len(Kind), 2, dtype=torch.float64, device=device)

    everywhere = True
    """Whether all ranks remember the same."""

    def within(self) -> AbstractContextManager[None]:
        """Around the forward of a stage, or of a unit."""
        return nullcontext()

    def begin(self, measures: bool = False) -> None:
        """A training step begins; with ``measures`` every product is also made exactly, and compared."""
        self.measures = measures
        if measures:
            self.powers.zero_()
        if isinstance(self.recipe, Delayed):
            self.recipe.records = True

    def finish(self) -> SignalToNoise | None:
        """It ends, on all ranks, before there are new weights: with delayed scales, one message tells all of them what
        each has seen."""
        if isinstance(self.recipe, Delayed):
            self.recipe.records = False
            self.recipe.advance(lambda seen: all_reduce(seen, self.world, "max"))
        if not self.measures:
            return None
        self.measures = False
        return SignalToNoise(self.layers, all_reduce(self.powers.clone(), self.world))

    def renew(self) -> None:
        """All weights may have changed, and what is remembered."""
        self.weights.clear()
        self.transposed.clear()
        if isinstance(self.recipe, Delayed):
            self.recipe.renew()

    def forget(self, names: Iterable[str]) -> None:
        """These parameters have no memory any more; nor is any to be kept for them here."""
        for name in names:
            number = self.numbers.get(name.removesuffix(".weight"), -1)
            self.weights.pop(number, None)
            self.transposed.pop(number, None)

    def scales_of(self, names: Sequence[str]) -> Callable[[Tensor], Tensor]:
        """The largest elements of these weights [n] to their scales [n], when there are new weights."""
        assert isinstance(self.recipe, Current | Delayed), "scaled as a whole"
        numbers = [self.numbers[name.removesuffix(".weight")] for name in names]
        return partial(self.recipe.scales_of_weights, torch.tensor(numbers, device=self.powers.device))

    def encode(self, x: Tensor, scale: Tensor) -> Tensor:
        """A part of a weight, flat, in E4M3."""
        assert isinstance(self.recipe, Current | Delayed), "scaled as a whole"
        return self.recipe.kernel(x[None], scale, False)[0][0]

    def take(self, name: str, codes: Tensor, inverse: Tensor) -> None:
        """A weight's codes [out, in] were made elsewhere."""
        self.weights[self.numbers[name.removesuffix(".weight")]] = Scaled(codes, inverse)

    def state(self) -> Mapping[str, Tensor]:
        """What a checkpoint must hold, the same on all ranks, and a resumed run writes back into these very tensors
        before ``renew``: of each layer the largest elements of [step, role]. Another length is another state."""
        if not isinstance(self.recipe, Delayed):
            return {}
        history = self.recipe.history
        return {f"amax{history.shape[1]}/{name}": history[number] for name, number in self.numbers.items()}

    @property
    def num_bytes(self) -> int:
        """Of codes of weights that are kept now."""
        return sum(each.codes.nbytes for each in (*self.weights.values(), *self.transposed.values()))

    def _kernel(self, number: int) -> LinearKernel:
        """Of one layer, to the contract of all linear layers."""
        recipe, name = self.recipe, self.layers[number]

        def forward(x_ti: Tensor, weight_oi: Tensor) -> Tensor:
            y_to = self.product(recipe.rows(x_ti, Role.INPUT, number), self._weight(weight_oi, number), x_ti.dtype)
            return self._count(Kind.FORWARD, name, y_to, lambda: x_ti.float() @ weight_oi.float().t())

        def dgrad(grad_to: Tensor, weight_oi: Tensor) -> Tensor:
            if number not in self.transposed:
                self.transposed[number] = self._weight(weight_oi, number).t()
            grad = recipe.rows(grad_to, Role.GRADIENT, number)
            if recipe.one_scale:
                self.recent[number] = ref(grad_to), grad
            grad_ti = self.product(grad, self.transposed[number], grad_to.dtype)
            return self._count(Kind.DGRAD, name, grad_ti, lambda: grad_to.float() @ weight_oi.float())

        def wgrad(into_oi: Tensor, x_ti: Tensor, grad_to: Tensor) -> Tensor:
            known, codes = self.recent.pop(number, (None, None))
            if known is not None and codes is not None and known() is grad_to:
                grad = codes.t()
            else:  # another microbatch has come between
                grad = recipe.columns(grad_to, Role.GRADIENT, number)
            x = recipe.columns(x_ti, Role.INPUT, number)
            made_oi = self.product(grad, x, torch.float32)
            self._count(Kind.WGRAD, name, made_oi, lambda: grad_to.float().t() @ x_ti.float())
            return into_oi.add_(made_oi)

        return LinearKernel(forward, dgrad, wgrad)

    def _weight(self, weight_oi: Tensor, number: int) -> Scaled:
        if number not in self.weights:
            self.weights[number] = self.recipe.rows(weight_oi, Role.WEIGHT, number)
        return self.weights[number]

    def _count(self, kind: Kind, name: str, made: Tensor, exact: Callable[[], Tensor]) -> Tensor:
        """Note a product that was made, and compare it if that is asked for."""
        self.products[name, kind] += 1
        if self.measures:
            true = exact().double()
            powers = torch.stack((true.square().sum(), (made.double() - true).square().sum()))
            self.powers[self.numbers[name], kind] += powers
        return made
