"""How a token's place enters: rotary angles with their context extensions, and ALiBi's slopes."""

import math

import torch
from torch import Tensor

from megacore.config.resolve import rotary_dims
from megacore.config.schema import ModelConfig, RopeScaling


def rope_frequencies(model: ModelConfig, long: bool = False) -> tuple[Tensor, float]:
    """Angle per position of each pair of the d dims that rotate, float64 [d/2], and the factor on cos and sin (Su et
    al. 2021).

    Scalings: linear (Chen et al. 2023), ntk (a larger base, bloc97 2023), yarn (Peng et al. 2023, sections 3.2-3.4),
    llama3 (Llama 3.1's, by wavelength), longrope (Ding et al. 2024: found by search; others for ``long`` samples).
    """
    d, scaling = rotary_dims(model), model.rope_scaling
    base = model.rope_theta
    if scaling.type == "ntk":
        base *= scaling.factor ** (d / (d - 2))
    frequency = base ** (-torch.arange(0, d, 2, dtype=torch.float64) / d)
    if scaling.type == "linear":
        return frequency / scaling.factor, 1.0
    if scaling.type == "yarn":
        return _yarn(frequency, base, d, scaling), scaling.attention_factor
    if scaling.type == "llama3":
        return _llama3(frequency, scaling), 1.0
    if scaling.type == "longrope":
        factors = scaling.long_factor if long else scaling.short_factor
        return frequency / torch.tensor(factors, dtype=torch.float64), scaling.attention_factor
    return frequency, 1.0


def _yarn(frequency: Tensor, base: float, d: int, scaling: RopeScaling) -> Tensor:
    """Keep the fast dims, divide the slow ones, and blend linearly between (over dims, as published code does)."""

    def dim_that_turns(times: float) -> float:
        return d * math.log(scaling.original_seq_len / (times * 2 * math.pi)) / (2 * math.log(base))

    low = max(math.floor(dim_that_turns(scaling.beta_fast)), 0)
    high = min(math.ceil(dim_that_turns(scaling.beta_slow)), d - 1)
    steps = torch.arange(d // 2, dtype=torch.float64)
    slow = ((steps - low) / max(high - low, 0.001)).clamp(0, 1)
    return frequency / scaling.factor * slow + frequency * (1 - slow)


def _llama3(frequency: Tensor, scaling: RopeScaling) -> Tensor:
    """Keep short wavelengths, divide long ones, and blend between by how often a dim turns over the original length."""
    turns = scaling.original_seq_len * frequency / (2 * math.pi)
    keep = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    keep = keep.clamp(0, 1)
    return frequency * keep + frequency / scaling.factor * (1 - keep)


def rope_angles(model: ModelConfig, position_bs: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin [b, s, 1, d/2] of the angles at ``position`` [b, s]; angles are formed in float64."""
    frequency, factor = rope_frequencies(model)
    frequency = frequency.to(position_bs.device)
    if model.rope_scaling.type == "longrope":
        # each sample by itself, so that it does not matter with which others it is computed
        is_long_b = position_bs.amax(1) >= model.rope_scaling.original_seq_len
        of_long = rope_frequencies(model, long=True)[0].to(position_bs.device)
        frequency = torch.where(is_long_b[:, None, None, None], of_long, frequency)
    angle = position_bs[..., None, None].to(torch.float64) * frequency
    return (angle.cos() * factor).to(dtype), (angle.sin() * factor).to(dtype)


def alibi_slopes(num_heads: int) -> Tensor:
    """One slope per head, float64 [num_heads] (Press et al. 2022).

    Between powers of two every other slope of the next power is added.
    """
    power = 2 ** math.floor(math.log2(num_heads))
    slopes = [2.0 ** (-8.0 * (i + 1) / power) for i in range(power)]
    slopes += [2.0 ** (-4.0 * (2 * i + 1) / power) for i in range(num_heads - power)]
    return torch.tensor(slopes, dtype=torch.float64)
