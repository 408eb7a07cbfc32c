"""Which data set serves a sample: weighted mixtures, looked up by the sample's ordinal alone.

Our own rule works in integers: the weights become shares of a period of at most 2^20 samples, and within the period
each sample goes to the data set that is furthest behind its share (Tijdeman's chairman assignment, 1980). The pattern
then repeats, so any ordinal is found at once, and a longer run never changes an earlier sample.
Megatron's rule is the same idea in float64 over the whole run; it is kept for runs that continue one.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megacore.data import native

MAX_PERIOD = 1 << 20  # samples: weights are met to about one in a million
MEGATRON_SURPLUS = 0.005  # of samples that Megatron builds beyond those it plans to use


def temperature_weights(tokens: Sequence[int], temperature: float) -> list[float]:
    """Weights ~ tokens^(1/temperature): 1 follows the sizes, larger values even them out.

    Source: Arivazhagan et al., "Massively Multilingual Neural Machine Translation in the Wild" (2019).
    """
    largest = max(tokens)
    powers = [(count / largest) ** (1 / temperature) for count in tokens]
    return [power / sum(powers) for power in powers]


def check_weights(weights: Sequence[float]) -> None:
    """Refuse weights that make no mixture.

    Raises:
        ValueError: there are none, one is negative or not finite, or all are 0.
    """
    if not weights:
        raise ValueError("data.blend is empty; give a prefix, or a list of [weight, prefix]")
    if not all(math.isfinite(weight) and weight >= 0 for weight in weights) or not any(weights):
        rule = "must be finite, not negative, and not all 0"
        raise ValueError(f"data.blend has the weights {list(weights)}, which {rule}")


def integer_shares(weights: Sequence[float]) -> NDArray[np.int64]:
    """Weights as whole shares of a period.

    Weights that are decimal fractions, as people write them, are met exactly by a short period (0.7 and 0.3 by 7 and
    3 of 10). Others become shares of 2^20, the largest remainders rounded up; none above 0 gets less than one.
    """
    fractions = [Fraction(repr(float(weight))) for weight in weights]
    parts = [fraction / sum(fractions) for fraction in fractions]
    period = math.lcm(*(part.denominator for part in parts))
    if period <= MAX_PERIOD:
        return np.array([int(part * period) for part in parts], np.int64)
    exact = [part * MAX_PERIOD for part in parts]
    shares = np.array([max(math.floor(value), 1) if value else 0 for value in exact], np.int64)
    order = sorted((d for d in range(len(exact)) if exact[d]), key=lambda d: (math.floor(exact[d]) - exact[d], d))
    for d in order[: max(MAX_PERIOD - int(shares.sum()), 0)]:
        shares[d] += 1
    shares[int(shares.argmax())] += MAX_PERIOD - int(shares.sum())  # below 0: for the tiny weights raised to one
    return shares


class Blend:
    """Our mixture: `pick(ordinal)` in constant time, for any ordinal.

    Args:
        weights: one per data set, in any unit.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        check_weights(weights)
        self.shares = integer_shares(weights)
        self.period = int(self.shares.sum())
        self.alone = int(self.shares.argmax()) if np.count_nonzero(self.shares) == 1 else None
        if self.alone is None:
            self.datasets, self.samples = native.loops.blend_pattern(self.shares)

    def pick(self, ordinal: int) -> tuple[int, int]:
        """(data set, how many samples it served before) of a sample."""
        if self.alone is not None:
            return self.alone, ordinal
        periods, rest = divmod(ordinal, self.period)
        dataset = int(self.datasets[rest])
        return dataset, periods * int(self.shares[dataset]) + int(self.samples[rest])

    def counts(self, num_samples: int) -> list[int]:
        """Samples that each data set serves among the first `num_samples`."""
        if self.alone is not None:
            return [num_samples if d == self.alone else 0 for d in range(len(self.shares))]
        periods, rest = divmod(num_samples, self.period)
        within = np.bincount(self.datasets[:rest], minlength=len(self.shares))
        return [int(count) for count in periods * self.shares + within]


@dataclass(frozen=True)
class MegatronBlend:
    """Megatron-LM's mixture of a run of known length, sample for sample."""

    datasets: NDArray[np.int16]  # [size]
    samples: NDArray[np.int64]  # [size]

    def pick(self, ordinal: int) -> tuple[int, int]:
        """(data set, its sample) of a sample.

        Raises:
            ValueError: the run asks for more samples than it said it would.
        """
        if ordinal >= len(self.datasets):
            raise ValueError(
                f"sample {ordinal} lies beyond the {len(self.datasets)} that Megatron's blend was built for; "
                "its order depends on the run's length: set train.steps to the whole run, or use data.index=megacore"
            )
        return int(self.datasets[ordinal]), int(self.samples[ordinal])


def normalised(weights: Sequence[float]) -> list[float]:
    """Weights that sum to 1, rounded as Megatron rounds them."""
    values = np.array(weights, np.float64)
    return [float(value) for value in values / np.sum(values)]


def megatron_sizes(weights: Sequence[float], num_samples: int) -> list[int]:
    """Samples that Megatron builds of each data set for a blend of `num_samples`: a small surplus over its share."""
    needed = [math.ceil(num_samples * weight) for weight in normalised(weights)]
    return [math.ceil(count * (1 + MEGATRON_SURPLUS)) for count in needed]


def build_megatron_blend(weights: Sequence[float], num_samples: int) -> dict[str, NDArray[Any]]:
    """The arrays of a `MegatronBlend`."""
    once = normalised(weights)
    size = sum(math.ceil(num_samples * weight) for weight in once)
    twice = np.array(normalised(once), np.float64)  # Megatron divides a second time, which may change the last bit
    datasets, samples = native.loops.blend_megatron(twice, size)
    return {"datasets": datasets, "samples": samples}
