"""The feed-forward half of a block."""

from torch import Tensor, nn

from megacore.config.resolve import GATED
from megacore.config.schema import ModelConfig
from megacore.kernels.table import Kernels
from megacore.parallel.linear import ColumnParallelLinear, RowParallelLinear
from megacore.parallel.parameters import ParameterMaker
from megacore.parallel.tensor import TensorParallel


class MLP(nn.Module):
    """x [t, h] -> [t, h]: widen to [t, f] ([t, 2f] for gated activations), activate, narrow."""

    def __init__(self, model: ModelConfig, make: ParameterMaker, tp: TensorParallel, kernels: Kernels) -> None:
        super().__init__()
        self.name = "gate_up" if model.activation in GATED else "up"
        self.add_module(self.name, ColumnParallelLinear(make.below(self.name), tp))
        self.activate = getattr(kernels, model.activation.replace("-", "_"))
        self.down = RowParallelLinear(make.below("down"), tp)

    def forward(self, x_th: Tensor) -> Tensor:
        return self.down(self.widened(x_th))

    def widened(self, x_th: Tensor) -> Tensor:
        """What goes into the last product, [t, f]."""
        return self.activate(self.get_submodule(self.name)(x_th))
