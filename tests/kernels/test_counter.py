"""Random numbers from a counter: any part is a part of the whole, and they look random."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from megacore.kernels import counter

KEY = counter.key_of("test", 1)
SAMPLES = 200_000
MASK = 2**64 - 1


def splitmix64(state: int, step: int) -> int:
    """Steele, Lea and Flood's generator in plain integers."""
    z = (state + step * 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def test_the_published_first_outputs() -> None:
    """Of seed 1234567, as in the Rosetta Code task on splitmix64."""
    outputs = counter.hash64(1234567, torch.arange(1, 6)).tolist()
    assert [value & MASK for value in outputs] == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]


@given(st.integers(-(2**63), 2**63 - 1), st.integers(0, 2**62))
def test_hash_is_splitmix64_for_any_key_and_place(key: int, place: int) -> None:
    assert counter.hash64(key, torch.tensor(place)).item() & MASK == splitmix64(key & MASK, place)


@pytest.mark.parametrize("draw", [counter.hash64, counter.uniform, counter.normal])
def test_a_slice_of_the_whole_is_the_whole_of_the_slice(draw: object) -> None:
    index = torch.arange(60 * 35).view(60, 35)
    before = index.clone()
    whole: Tensor = draw(KEY, index)  # type: ignore[operator]
    for part in (index[7:19], index[:, 3:8], index[::2, ::3], index.t()):
        got: Tensor = draw(KEY, part)  # type: ignore[operator]
        assert torch.equal(got, whole.view(-1)[part])
    assert torch.equal(index, before)
    assert whole.shape == index.shape


@pytest.mark.parametrize("key", [KEY, counter.key_of("test", 2), 0, -1])
def test_uniforms_are_uniform(key: int) -> None:
    x = counter.uniform(key, torch.arange(SAMPLES))
    assert x.dtype == torch.float64
    assert 0 <= x.min() < 1e-4
    assert 1 - 1e-4 < x.max() < 1
    # the largest gap to the straight line (Kolmogorov-Smirnov; 1.95 / sqrt(n) is passed by chance once in 1000)
    gap = (x.sort().values - torch.arange(SAMPLES) / SAMPLES).abs().max().item()
    assert gap < 1.95 / math.sqrt(SAMPLES)
    assert_uncorrelated(x - 0.5)


@pytest.mark.parametrize("key", [KEY, counter.key_of("test", 2), 0, -1])
def test_normals_are_normal(key: int) -> None:
    x = counter.normal(key, torch.arange(SAMPLES))
    assert x.dtype == torch.float64
    assert x.isfinite().all()
    assert x.abs().max() < 6.8
    chance = 0.5 * (1 + torch.erf(x.sort().values / math.sqrt(2)))
    gap = (chance - torch.arange(SAMPLES) / SAMPLES).abs().max().item()
    assert gap < 1.95 / math.sqrt(SAMPLES)
    for power, moment, width in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):  # width: variance of x^power
        assert abs(x.pow(power).mean().item() - moment) < 4 * math.sqrt(width / SAMPLES), power
    assert_uncorrelated(x)


def assert_uncorrelated(x: Tensor) -> None:
    """Neighbours, near and far, tell nothing of each other."""
    for lag in (1, 2, 3, 64, 1000):
        correlation = (x[lag:] * x[:-lag]).mean() / x.square().mean()
        assert abs(correlation.item()) < 4.5 / math.sqrt(SAMPLES), lag


def test_streams_of_different_keys_differ() -> None:
    names = [("weights", seed, name) for seed in (0, 1) for name in ("a", "b", "layers.1", "layers.11")]
    keys = {counter.key_of(*name) for name in names}
    assert len(keys) == len(names)
    draws = torch.stack([counter.normal(key, torch.arange(20_000)) for key in sorted(keys)])
    correlation = torch.corrcoef(draws) - torch.eye(len(keys), dtype=torch.float64)
    assert correlation.abs().max() < 5 / math.sqrt(20_000)


def test_keys_keep_their_parts_apart() -> None:
    assert counter.key_of("a", "bc") != counter.key_of("ab", "c")
    assert counter.key_of("a", 1) != counter.key_of("a", 11)


def test_a_key_is_the_same_on_every_machine() -> None:
    """And in every version: a run's weights and masks hang on it."""
    assert counter.key_of("weights", 1234, "embedding.tokens.weight") == 1301822707758292697
