"""Moments in bf16 and in 8 bits: how near they are, and that no cut changes a bit of them."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megacore.layout import BufferLayout
from megacore.layout.shards import runs_of
from megacore.mesh.group import Group
from megacore.optim.elementwise import ElementWise
from megacore.optim.formats import StateFormat
from megacore.optim.quantise import BLOCK, codebook, decode, encode, lookup
from megacore.optim.rounding import GlobalIndex, to_bf16
from tests.optim.pretend import (
    CPU,
    SPECS,
    TAKEN,
    grads_of,
    make_share,
    put_together,
    random_cuts,
    rate,
    rule_of,
    run_steps,
    whole,
)

INT8, BF16, BY_CHANCE = StateFormat("int8"), StateFormat("bf16"), StateFormat("bf16", True, 3)
RULES = ("adam", "adamw", "lion", "sgd")


def momentum_of(name: str) -> dict[str, float]:
    return {"momentum": 0.9} if name == "sgd" else {}


@pytest.mark.parametrize("signed", [True, False])
def test_codes(signed: bool) -> None:
    """256 different numbers, dense near 0, up to 1; the largest gap is that of the highest decade."""
    codes = codebook(signed, CPU)
    assert codes.shape == (256,)
    assert (codes.diff() > 0).all()
    assert codes[-1] == 1.0 and 0.0 in codes
    positive = codes[codes > 0]
    assert positive[0] < 1e-6
    for low, high in ((1e-2, 0.1), (0.1, 1.0)):
        steps = positive[(positive >= low) & (positive <= high)]
        assert (steps.diff() / steps[1:]).max() < (0.21 if signed else 0.12)
    assert torch.equal(codes[codes < 0].flip(0), -positive[:-1]) == signed


@pytest.mark.parametrize("signed", [True, False])
def test_the_table_finds_the_nearest_code(signed: bool) -> None:
    codes = codebook(signed, CPU)
    make = torch.Generator().manual_seed(1)
    numbers = torch.rand(100_000, generator=make) * 10.0 ** -(8 * torch.rand(100_000, generator=make))
    if signed:
        numbers *= torch.randint(0, 2, (100_000,), generator=make) * 2 - 1
    numbers = torch.cat([numbers, codes])
    blocks = torch.cat([numbers.new_ones(len(numbers), 1), numbers[:, None].expand(-1, BLOCK - 1)], 1).view(-1)
    encoded, scales = encode(blocks, lookup(codes))
    assert (scales == 1).all()
    found = decode(encoded, scales, codes, torch.float32).view(-1, BLOCK)[:, 1]
    nearest = (codes[:, None] - numbers).abs().amin(0)
    if not signed:  # never down to nothing
        smallest = codes[1]
        nearest = torch.where((numbers > 0) & (numbers < smallest), smallest - numbers, nearest)
    assert ((found - numbers).abs() <= nearest + 0.0021 * numbers.abs()).all()
    assert torch.equal(found[-256:], codes)


@given(
    values=st.lists(st.floats(-(2.0**100), 2.0**100, width=32), max_size=3 * BLOCK),
    signed=st.booleans(),
    dtype=st.sampled_from((torch.float32, torch.float64)),
)
def test_what_comes_back_is_near_in_its_block(values: list[float], signed: bool, dtype: torch.dtype) -> None:
    given_ = torch.tensor(values, dtype=dtype)
    given_ = given_ if signed else given_.abs()
    codes = codebook(signed, CPU)
    encoded, scales = encode(given_, lookup(codes))
    assert encoded.dtype == torch.uint8 and encoded.shape == given_.shape
    assert scales.shape == (-(-len(values) // BLOCK),)
    back = decode(encoded, scales, codes, dtype)
    assert back.dtype == dtype
    for block in range(len(scales)):
        part = slice(block * BLOCK, (block + 1) * BLOCK)
        largest = given_[part].abs().max()
        assert scales[block] == largest
        # half of the largest gap between codes, and what the table's 18 bits leave open
        allowed = (0.0075 if signed else 0.0041) * largest + torch.finfo(torch.float32).tiny
        assert (back[part] - given_[part]).abs().max() <= allowed
        if not signed:
            seen = given_[part] > largest * 2.0**-120  # what is smaller has no normal number for its share
            assert (back[part][seen] > 0).all()


def test_zeros_stay_zeros() -> None:
    for signed in (True, False):
        codes = codebook(signed, CPU)
        assert not decode(*encode(torch.zeros(100), lookup(codes)), codes, torch.float32).any()


@pytest.mark.parametrize("state", [INT8, BF16, BY_CHANCE, StateFormat("fp32")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("num_shards", [2, 3])
@pytest.mark.parametrize("name", RULES)
def test_no_cut_changes_a_bit(name: str, num_shards: int, dtype: torch.dtype, state: StateFormat) -> None:
    """Shards are cut at multiples of 64 elements, and so are the blocks of 8-bit moments."""
    (one,) = (make_share(whole(), dtype, state),)
    shares = [make_share(cut, dtype, state) for cut in random_cuts(num_shards, num_shards, multiple=BLOCK)]
    for share in (one, *shares):
        rule = rule_of(name, share, **momentum_of(name))
        for step in range(1, 11):  # all in chunks: a kernel may round the ends of its runs otherwise
            ElementWise.update(rule, grads_of(share, step), rate(step), TAKEN)  # type: ignore[arg-type]
    expected = put_together([one])
    for what, found in put_together(shares).items():
        assert torch.equal(found, expected[what]), what


@given(sizes=st.lists(st.integers(0, 700), min_size=1, max_size=6), num_shards=st.integers(1, 4))
def test_the_layout_cuts_at_blocks(sizes: list[int], num_shards: int) -> None:
    layout = BufferLayout.in_buckets([[(f"p{i}", (size,)) for i, size in enumerate(sizes)]], num_shards)
    for shard in range(num_shards):
        for run in runs_of(layout, shard, num_shards):
            assert run.start % BLOCK == 0
            assert run.stop % BLOCK == 0 or run.stop == sizes[int(run.name[1:])]


def test_a_cut_through_a_block_is_refused() -> None:
    cut = [(0, 0), (65, 200), *[(0, 0)] * (len(SPECS) - 2)]
    with pytest.raises(AssertionError, match="inside a block"):
        rule_of("lion", make_share(cut, state=INT8))


@pytest.mark.parametrize(("state", "far"), [(BF16, 0.03), (BY_CHANCE, 0.03), (INT8, 0.12)])
@pytest.mark.parametrize("name", ["adam", "adamw", "sgd"])
def test_training_hardly_notices(name: str, state: StateFormat, far: float) -> None:
    """The way that weights went in 50 steps, against that with exact moments."""
    exact, rounded = make_share(whole()), make_share(whole(), state=state)
    for share in (exact, rounded):
        run_steps(rule_of(name, share, **momentum_of(name)))
    start = make_share(whole())
    for a, b, begin in zip(rounded.weights, exact.weights, start.weights):
        way = (b - begin).norm()
        assert (a - b).norm() <= far * way
        assert not torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rounding_by_chance_is_right_on_average(dtype: torch.dtype) -> None:
    values = torch.tensor([1.0 + 2**-10, -3.0 - 2**-9, 1e-3, -1e-30, 0.0, -0.0, 1.5, 1e30], dtype=dtype)
    index = torch.arange(len(values))
    draws = torch.stack([to_bf16(values, 7, index, torch.tensor(float(step))) for step in range(4000)])
    assert draws.dtype == torch.bfloat16
    as_float = values.float()
    below = (as_float.view(torch.int32) & -0x10000).view(torch.float32)
    above = ((as_float.view(torch.int32) & -0x10000) + 0x10000).view(torch.float32)
    assert ((draws == below) | (draws == above)).all()
    exact = as_float == below
    assert exact.tolist() == [False, False, False, False, True, True, True, False]
    assert (draws[:, exact] == values[exact].bfloat16()).all()
    share = ((as_float - below) / (above - below))[~exact]
    found = (draws != below)[:, ~exact].double().mean(0)
    assert ((found - share).abs() < 4 * (share * (1 - share) / 4000).sqrt() + 1e-9).all()


@pytest.mark.parametrize("state", [BF16, BY_CHANCE])
def test_weights_in_bf16_follow_small_steps_by_chance_alone(state: StateFormat) -> None:
    """Steps of an eighth of the distance between bf16 numbers round to nothing, but add up if it is by chance."""
    share = make_share(whole(), torch.bfloat16, state, scales={}, decay=0.0)
    for weight in share.weights:
        weight.fill_(1.5)
    rule = rule_of("sgd", share)
    for _ in range(64):
        rule.update([torch.ones_like(weight) for weight in share.weights], 2.0**-10, TAKEN)
    moved = torch.cat(share.weights).float() - 1.5
    if state.stochastic:
        assert moved.mean().item() == pytest.approx(-64 * 2.0**-10, rel=0.1)
    else:
        assert not moved.any()


def test_rounding_depends_on_seed_name_element_and_step() -> None:
    values = torch.full((1000,), 1.0 + 2**-9)
    index, step = torch.arange(1000), torch.tensor(1.0)
    base = to_bf16(values, 7, index, step)
    assert torch.equal(base, to_bf16(values, 7, index, step))
    for other in (
        to_bf16(values, 8, index, step),
        to_bf16(values, 7, index + 1000, step),
        to_bf16(values, 7, index, step + 1),
    ):
        assert 300 < (other != base).sum() < 700


@pytest.mark.parametrize("num", [1, 2, 4])
@pytest.mark.parametrize("spec", [spec for spec in SPECS if spec.numel], ids=lambda spec: spec.name)
def test_global_indices(spec, num: int) -> None:
    everything = torch.arange(spec.numel).view(spec.shape)
    for rank in range(num):
        # a group of its own making: only rank and size are looked at
        tp = Group("tp", tuple(range(num)), rank, handle=None if num == 1 else object())  # type: ignore[arg-type]
        pieces = [everything.narrow(spec.dim, piece.start, piece.size) for piece in spec.pieces(rank, num)]
        local = torch.cat(pieces, spec.dim).reshape(-1) if pieces else torch.empty(0, dtype=torch.long)
        index = GlobalIndex(spec, tp, CPU)
        for start, stop in ((0, len(local)), (len(local) // 3, len(local) // 2)):
            assert torch.equal(index(start, stop), local[start:stop])
