"""Normalisation over the last dim."""

from collections.abc import Callable

from torch import Tensor, nn

from megacore.config.schema import ModelConfig
from megacore.kernels.table import Kernels
from megacore.parallel.parameters import ParameterMaker

Adding = Callable[..., tuple[Tensor, Tensor]]


class RMSNorm(nn.Module):
    """x / rms(x) * (offset + weight): what is learned is the factor or, with an offset of 1, its difference from 1."""

    def __init__(
        self, make: ParameterMaker, model: ModelConfig, kernel: Callable[..., Tensor], adding: Adding | None = None
    ) -> None:
        super().__init__()
        self.weight, self.eps, self.kernel = make("weight"), model.norm_eps, kernel
        self.offset, self.adding = float(model.norm_unit_offset), adding

    def forward(self, x: Tensor) -> Tensor:
        return self.kernel(x, self.weight, self.eps, self.offset)

    def added(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """The norm of the sum, and the sum."""
        assert self.adding is not None, "norms of heads add nothing"
        return self.adding(x, residual, self.weight, self.eps, self.offset)


class LayerNorm(nn.Module):
    """(x - mean) / std * weight + bias."""

    def __init__(self, make: ParameterMaker, eps: float, kernel: Callable[..., Tensor], adding: Adding) -> None:
        super().__init__()
        self.weight, self.bias, self.eps, self.kernel, self.adding = make("weight"), make("bias"), eps, kernel, adding

    def forward(self, x: Tensor) -> Tensor:
        return self.kernel(x, self.weight, self.bias, self.eps)

    def added(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """The norm of the sum, and the sum."""
        return self.adding(x, residual, self.weight, self.bias, self.eps)


def make_norm(model: ModelConfig, make: ParameterMaker, kernels: Kernels) -> RMSNorm | LayerNorm:
    """The model's norm of the residual stream."""
    if model.norm == "rmsnorm":
        return RMSNorm(make, model, kernels.rms_norm, kernels.rms_norm_add)
    return LayerNorm(make, model.norm_eps, kernels.layer_norm, kernels.layer_norm_add)
