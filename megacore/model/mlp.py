"""The feed-forward half of a block."""

from torch import Tensor, nn

from megacore.config.resolve import GATED
from megacore.config.schema import ModelConfig
from megacore.kernels.table import Kernels
from megacore.parallel.linear import ColumnParallelLinear, make_column, make_row
from megacore.parallel.parameters import ParameterMaker
from megacore.parallel.tensor import TensorParallel


class MLP(nn.Module):
    """x [t, h] -> [t, h]: widen to [t, f] ([t, 2f] for gated activations), activate, narrow."""

    def __init__(self, model: ModelConfig, make: ParameterMaker, tp: TensorParallel, kernels: Kernels) -> None:
        super().__init__()
        self.name = "gate_up" if model.activation in GATED else "up"
        wide = make_column(make.below(self.name), tp)
        self.add_module(self.name, wide)
        self.activate = getattr(kernels, model.activation.replace("-", "_"))
        # in one with what the bias is added to; linear layers that are somebody else's add theirs themselves
        fuses = model.activation == "gelu" and isinstance(wide, ColumnParallelLinear) and wide.bias is not None
        self.bias_gelu = kernels.bias_gelu if fuses else None
        self.down = make_row(make.below("down"), tp)

    def forward(self, x_th: Tensor) -> Tensor:
        return self.down(self.widened(x_th))

    def widened(self, x_th: Tensor) -> Tensor:
        """What goes into the last product, [t, f]."""
        wide = self.get_submodule(self.name)
        if self.bias_gelu is not None:
            assert isinstance(wide, ColumnParallelLinear)
            return self.bias_gelu(wide.product(x_th), wide.bias)
        return self.activate(wide(x_th))
