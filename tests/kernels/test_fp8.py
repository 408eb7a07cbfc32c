"""FP8: codes against their definition in float64, products against the products of what codes stand for."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from megacore.kernels.fp8.formats import (
    E4M3,
    E5M2,
    LEAST,
    ROW_BLOCK,
    SQUARE_BLOCK,
    Format,
    Scaled,
    amax_of,
    amax_of_blocks,
    encode,
    quantise_blocks,
    scale_of,
)
from megacore.kernels.fp8.products import block_reference, columns_first, in_fours, product_of, tensor_product
from megacore.kernels.fp8.recipes import Blocks, Current, Delayed, Recipe, Role

CPU = torch.device("cpu")
FORMATS = {"E4M3": (E4M3, 4, 3), "E5M2": (E5M2, 5, 2)}
SHAPES = ((1, 1), (0, 16), (16, 0), (7, 13), (33, 130), (128, 128), (129, 257))
BLOCKS = (ROW_BLOCK, SQUARE_BLOCK)


def table(exponent_bits: int, mantissa_bits: int) -> list[float]:
    """The finite numbers of a format that are not negative, in the order of their codes."""
    bias, numbers = 2 ** (exponent_bits - 1) - 1, []
    for code in range(128):
        exponent, mantissa = code >> mantissa_bits, code & (2**mantissa_bits - 1)
        if exponent:
            numbers.append((1 + mantissa / 2**mantissa_bits) * 2.0 ** (exponent - bias))
        else:
            numbers.append(mantissa / 2**mantissa_bits * 2.0 ** (1 - bias))
    # E4M3 has one code for nan and no infinities; in E5M2 the largest exponent is theirs
    return numbers[:127] if mantissa_bits == 3 else numbers[:124]


def nearest(x: Tensor, name: str) -> Tensor:
    """What each number becomes: the nearest one of the format, of two the one with the even code; float64."""
    _, exponent_bits, mantissa_bits = FORMATS[name]
    numbers = torch.tensor(table(exponent_bits, mantissa_bits), dtype=torch.float64)
    distance = (x.double().abs().clamp(max=1e6).unsqueeze(-1) - numbers).abs()
    odd = torch.arange(len(numbers)) % 2
    closest = distance == distance.amin(-1, keepdim=True)
    best = (closest * (2 - odd)).argmax(-1)
    made = numbers[best].copysign(x.double())
    return torch.where(x.isfinite(), made, torch.nan)


def with_one_scale(x: Tensor, scale: Tensor, kind: Format) -> Scaled:
    return Scaled(encode(x, scale, kind).contiguous(), 1 / scale)


def random(shape: tuple[int, int], seed: int, spread: float = 3.0) -> Tensor:
    """Normal numbers whose rows differ in size."""
    draw = torch.Generator().manual_seed(seed)
    rows = torch.exp(spread * torch.randn(shape[0], 1, generator=draw))
    return rows * torch.randn(shape, generator=draw)


def normal(m: int, k: int, seed: int) -> Tensor:
    return random((m, k), seed, 0.0)


@pytest.mark.parametrize("name", FORMATS)
def test_the_formats_are_what_they_are(name: str) -> None:
    kind, *bits = FORMATS[name]
    numbers = table(*bits)
    assert numbers[-1] == kind.largest == torch.finfo(kind.dtype).max
    codes = torch.arange(len(numbers), dtype=torch.uint8).view(kind.dtype)
    assert codes.double().tolist() == numbers


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FORMATS)
def test_codes_are_the_nearest_numbers(name: str, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    kind = FORMATS[name][0]
    x = random(shape, 1).to(dtype)
    for scale in (2.0**-9, 1.0, 2.0**20):
        made = encode(x, torch.tensor(scale), kind).double()
        assert torch.equal(made, nearest(x.double() * scale, name))


@pytest.mark.parametrize("name", FORMATS)
def test_ties_ends_and_what_is_no_number(name: str) -> None:
    kind, exponent_bits, mantissa_bits = FORMATS[name]
    numbers = torch.tensor(table(exponent_bits, mantissa_bits), dtype=torch.float64)
    ties = ((numbers[:-1] + numbers[1:]) / 2).float()
    one = torch.ones(())
    for x in (ties, -ties, torch.tensor([0.0, -0.0, kind.largest * 1.1, -1e38, torch.inf, -torch.inf, torch.nan])):
        assert torch.equal(encode(x, one, kind).double().nan_to_num(-1), nearest(x, name).nan_to_num(-1))
    # what a scale makes too large is still finite
    assert encode(torch.tensor([1e30, -1e30]), torch.tensor(2.0**100), kind).double().tolist() == [
        kind.largest,
        -kind.largest,
    ]


@pytest.mark.parametrize("kind", [E4M3, E5M2], ids=lambda kind: kind.name)
def test_scales_are_the_largest_powers_of_two_that_fit(kind: Format) -> None:
    amax = torch.cat((random((1, 200), 2, 20.0).abs().flatten(), torch.tensor([1.0, 448.0, 57344.0, 449.0, 3e38])))
    amax = amax.clamp(min=LEAST)
    scale = scale_of(amax, kind)
    mantissa, _ = torch.frexp(scale)
    assert (mantissa == 0.5).all()
    largest = amax.double() * scale.double()
    assert (largest <= kind.largest).all() and (2 * largest > kind.largest).all()
    assert torch.equal(scale_of(amax, kind, margin=3) * 8, scale)
    assert torch.equal(scale_of(torch.zeros(1), kind), scale_of(torch.tensor([LEAST]), kind))
    assert (1 / scale_of(torch.zeros(1), kind)).isfinite().all()
    assert scale_of(torch.tensor([torch.inf, torch.nan]), kind).isnan().all()


def test_codes_do_not_depend_on_scales_but_at_the_ends() -> None:
    x = normal(1, 1000, 6).abs().clamp(2.0**-3, 8) * normal(1, 1000, 7).sign()
    made = {scale: encode(x, torch.tensor(scale), E4M3).double() / scale for scale in (0.5, 1.0, 2.0, 32.0)}
    assert all(torch.equal(each, made[1.0]) for each in made.values())


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("shape", SHAPES)
def test_blocks_are_scaled_by_themselves(shape: tuple[int, int], block: tuple[int, int]) -> None:
    x = random(shape, 3)
    made = quantise_blocks(x, E4M3, block)
    (m, k), (rows, columns) = shape, block
    assert made.inverse.shape == amax_of_blocks(x, block).shape == (-(-m // rows), -(-k // columns))
    expected = torch.empty(shape)
    for row in range(0, m, rows):
        for column in range(0, k, columns):
            part = x[row : row + rows, column : column + columns]
            expected[row : row + rows, column : column + columns] = with_one_scale(
                part, scale_of(amax_of(part), E4M3), E4M3
            ).values()
    assert torch.equal(made.values(), expected)
    assert torch.equal(made.t().values(), expected.t()) and made.t().codes.is_contiguous()


def test_what_is_not_finite_is_seen() -> None:
    x = normal(32, 256, 8)
    x[3, 5] = torch.inf
    assert Current().rows(x, Role.INPUT, 0).values().isnan().all()
    blocks = Blocks().rows(x, Role.INPUT, 0).values().isnan()
    assert blocks[3, :128].all() and blocks.sum() == 128
    delayed = Delayed(1, 4, 0, CPU)
    delayed.history[0, 0] = 4.0
    delayed.renew()
    values = delayed.rows(x, Role.INPUT, 0).values()
    assert values[3, 5].isnan() and values.isnan().sum() == 1


PRODUCTS: dict[str, tuple[Callable[..., Tensor], Recipe, Role]] = {
    "tensors": (tensor_product, Current(), Role.INPUT),
    "weights in blocks": (block_reference, Blocks(), Role.WEIGHT),
    "all in blocks": (block_reference, Blocks(), Role.INPUT),
}


@pytest.mark.parametrize("which", PRODUCTS)
@pytest.mark.parametrize("sizes", [(1, 16, 16), (33, 48, 144), (130, 256, 272), (0, 16, 32), (5, 0, 16), (5, 16, 0)])
def test_products_are_those_of_what_codes_stand_for(which: str, sizes: tuple[int, int, int]) -> None:
    product, recipe, role = PRODUCTS[which]
    m, n, k = sizes
    a = recipe.rows(random((m, k), 4, 1.0), Role.GRADIENT, 0)
    b = recipe.rows(random((n, k), 5, 1.0), role, 0)
    exact = a.values().double() @ b.values().double().t()
    bound = a.values().double().abs() @ b.values().double().abs().t()
    for out, unit in ((torch.float32, 2.0**-20), (torch.bfloat16, 2.0**-8)):
        made = product(a, b, out)
        assert made.dtype == out and made.shape == (m, n)
        assert ((made.double() - exact).abs() <= unit * bound).all()


@pytest.mark.gpu
@pytest.mark.parametrize("which", ["tensors", "weights in blocks", "all in blocks"])
@pytest.mark.parametrize("sizes", [(32, 48, 144), (256, 256, 256), (128, 272, 640)])
def test_products_on_tensor_cores(which: str, sizes: tuple[int, int, int]) -> None:
    _, recipe, role = PRODUCTS[which]
    (m, n, k), device = sizes, torch.device("cuda")
    product, _ = product_of("current" if which == "tensors" else "block", device, torch.bfloat16)
    a = recipe.rows(random((m, k), 4, 1.0).to(device), Role.GRADIENT, 0)
    b = recipe.rows(random((n, k), 5, 1.0).to(device), role, 0)
    exact = a.values().double() @ b.values().double().t()
    bound = a.values().double().abs() @ b.values().double().abs().t()
    for out, unit in ((torch.float32, 2.0**-10), (torch.bfloat16, 2.0**-7)):
        assert ((product(a, b, out).double() - exact).abs() <= unit * bound).all()


def matrix(m: int, k: int, kind: Format = E4M3) -> Scaled:
    return with_one_scale(torch.ones(m, k), torch.ones(()), kind)


def test_what_tensor_cores_refuse_is_refused_everywhere() -> None:
    good = matrix(16, 32)
    refused = (
        (good, matrix(16, 48), "must have as many columns"),
        (matrix(16, 24), matrix(16, 24), "24 columns that are summed over"),
        (good, matrix(20, 32), "20 rows of the second"),
        (Scaled(matrix(32, 16).codes.t(), good.inverse), good, "make it row-major"),
        (matrix(16, 32, E5M2), matrix(16, 32, E5M2), "both are in E5M2"),
        (quantise_blocks(torch.ones(16, 32), E4M3, ROW_BLOCK), good, "need another product"),
    )
    for a, b, message in refused:
        with pytest.raises(ValueError, match=message):
            tensor_product(a, b, torch.float32)
    rows, square = (quantise_blocks(torch.ones(16, 32), E4M3, block) for block in BLOCKS)
    for a, b, message in (
        (square, rows, "need another product"),
        (quantise_blocks(torch.ones(16, 32), E5M2, ROW_BLOCK), rows, "must be in E4M3"),
    ):
        with pytest.raises(ValueError, match=message):
            block_reference(a, b, torch.float32)


def test_scales_of_blocks_lie_as_tensor_cores_read_them() -> None:
    inverse = torch.arange(15.0).view(3, 5)
    assert columns_first(inverse).stride() == (1, 3) and torch.equal(columns_first(inverse), inverse)
    filled = in_fours(inverse).t()
    assert filled.shape == (8, 3) and filled.stride() == (1, 8) and torch.equal(filled[:5], inverse.t())


@pytest.mark.parametrize("recipe", ["current", "delayed", "block"])
def test_the_choice_of_a_product_has_its_reasons(recipe: str) -> None:
    product, choice = product_of(recipe, CPU, torch.bfloat16)
    assert product is (block_reference if recipe == "block" else tensor_product)
    assert choice.backend.startswith(f"fp8 {recipe}, ")
    assert len(choice.rejected) == (recipe == "block")
    with pytest.raises(ValueError, match="made for float32 and bfloat16, not torch.float16"):
        product_of(recipe, CPU, torch.float16)


def decibels(exact: Tensor, made: Tensor) -> float:
    noise = (made.double() - exact.double()).square().sum()
    return float(10 * torch.log10(exact.double().square().sum() / noise))


def test_noise_is_that_of_the_formats() -> None:
    """Rounding to m bits is off by u = 2^-(m+1) at most; noise / signal is about u^2 / 6 on average over a binade."""
    x, w = normal(256, 512, 9), normal(128, 512, 10)
    for recipe, product in ((Current(), tensor_product), (Blocks(), block_reference)):
        of_x = recipe.rows(x, Role.INPUT, 0)
        assert 30.5 < decibels(x, of_x.values()) < 33
        y = product(of_x, recipe.rows(w, Role.WEIGHT, 0), torch.float32)
        assert 27.5 < decibels(x.double() @ w.double().t(), y) < 30
    gradient = Current().rows(x, Role.GRADIENT, 0)
    assert 24.5 < decibels(x, gradient.values()) < 27


def test_blocks_bear_what_one_scale_does_not() -> None:
    x = normal(64, 512, 11)
    x[0, 0] = 1e7
    rest = torch.ones_like(x, dtype=torch.bool)
    rest[0, :128] = False
    of_tensor, of_blocks = (r.rows(x, Role.INPUT, 0).values() for r in (Current(), Blocks()))
    assert decibels(x[rest], of_blocks[rest]) > 30 > 15 > decibels(x[rest], of_tensor[rest])


def test_delayed_scales_come_from_the_steps_before() -> None:
    """Two layers, three steps remembered, one power of two of margin."""
    delayed = Delayed(2, 3, 1, CPU)
    x = torch.full((16, 16), 3.0)

    def scale(layer: int, factor: float) -> float:
        return 1 / float(delayed.rows(factor * x, Role.INPUT, layer).inverse)

    def step(factor: float) -> None:
        delayed.records = True
        scale(1, factor)
        scale(1, factor / 2)
        delayed.records = False
        delayed.advance(lambda seen: seen)
        delayed.renew()

    assert scale(1, 1) == scale_of(torch.tensor(3.0), E4M3, 1)  # its own: nothing is known
    step(2.0)
    assert scale(1, 1) == scale(1, 100) == scale_of(torch.tensor(6.0), E4M3, 1)
    assert scale(0, 5) == scale_of(torch.tensor(15.0), E4M3, 1)
    step(0.5)
    step(torch.nan)  # a step that is skipped leaves no trace
    assert delayed.history[1, :, Role.INPUT].tolist() == [0.0, 1.5, 6.0]
    assert scale(1, 1) == scale_of(torch.tensor(6.0), E4M3, 1)
    step(0.25)
    assert scale(1, 1) == scale_of(torch.tensor(1.5), E4M3, 1)
    # weights are seen whenever they are brought into FP8, other tensors in training only
    delayed.rows(7 * x, Role.WEIGHT, 0)
    delayed.rows(7 * x, Role.GRADIENT, 0)
    assert delayed.seen.tolist() == [[0.0, 21.0, 0.0], [0.0, 0.0, 0.0]]
