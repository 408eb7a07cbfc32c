"""Normalisation over the last dim."""

from collections.abc import Callable

from torch import Tensor, nn

from megacore.config.schema import ModelConfig
from megacore.kernels.table import Kernels
from megacore.parallel.parameters import ParameterMaker


class RMSNorm(nn.Module):
    """x / rms(x) * (offset + weight): what is learned is the factor or, with an offset of 1, its difference from 1."""

    def __init__(self, make: ParameterMaker, model: ModelConfig, kernel: Callable[..., Tensor]) -> None:
        super().__init__()
        self.weight, self.eps, self.kernel = make("weight"), model.norm_eps, kernel
        self.offset = float(model.norm_unit_offset)

    def forward(self, x: Tensor) -> Tensor:
        return self.kernel(x, self.weight, self.eps, self.offset)


class LayerNorm(nn.Module):
    """(x - mean) / std * weight + bias."""

    def __init__(self, make: ParameterMaker, eps: float, kernel: Callable[..., Tensor]) -> None:
        super().__init__()
        self.weight, self.bias, self.eps, self.kernel = make("weight"), make("bias"), eps, kernel

    def forward(self, x: Tensor) -> Tensor:
        return self.kernel(x, self.weight, self.bias, self.eps)


def make_norm(model: ModelConfig, make: ParameterMaker, kernels: Kernels) -> nn.Module:
    """The model's norm of the residual stream."""
    if model.norm == "rmsnorm":
        return RMSNorm(make, model, kernels.rms_norm)
    return LayerNorm(make, model.norm_eps, kernels.layer_norm)
