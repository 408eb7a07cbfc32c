"""One pre-norm transformer block."""

from functools import partial

from torch import Tensor, nn

from megacore.config.schema import ModelConfig
from megacore.kernels import counter
from megacore.kernels.table import Kernels
from megacore.model.attention import Attention
from megacore.model.inputs import Shared
from megacore.model.mlp import MLP
from megacore.model.norm import make_norm
from megacore.model.offload import offloaded
from megacore.model.recompute import Save, recomputed
from megacore.parallel.dropout import dropout
from megacore.parallel.parameters import ParameterMaker
from megacore.parallel.tensor import TensorParallel


class Block(nn.Module):
    """x [t, h] -> [t, h]: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(
        self,
        model: ModelConfig,
        make: ParameterMaker,
        tp: TensorParallel,
        kernels: Kernels,
        seed: int,
        recompute: str = "none",
    ) -> None:
        super().__init__()
        self.attention_norm = make_norm(model, make.below("attention_norm"), kernels)
        self.attention = Attention(model, make.below("attention"), tp, kernels, seed, recompute == "selective")
        self.mlp_norm = make_norm(model, make.below("mlp_norm"), kernels)
        self.mlp = MLP(model, make.below("mlp"), tp, kernels)
        self.dropout, self.recompute, self.offload = model.dropout, recompute == "full", recompute == "offload"
        self.attention_key = counter.key_of("dropout", seed, make.prefix, "attention output")
        self.mlp_key = counter.key_of("dropout", seed, make.prefix, "mlp output")

    def forward(self, x_th: Tensor, shared: Shared) -> Tensor:
        if self.recompute:
            return recomputed(partial(self.compute, shared=shared), partial(self.again, shared=shared), x_th)
        if self.offload:
            common = (tensor for tensor in (shared.cos, shared.sin, shared.mask) if tensor is not None)
            return offloaded(partial(self.compute, x_th, shared), tuple(self.parameters()), shared.kept, tuple(common))
        return self.compute(x_th, shared)

    def compute(self, x_th: Tensor, shared: Shared) -> Tensor:
        """The block."""
        x_th = self.attended(x_th, shared)
        return x_th + self.drop(self.mlp(self.mlp_norm(x_th)), shared, self.mlp_key)

    def again(self, x_th: Tensor, save: Save, shared: Shared) -> None:
        """What ``compute`` saves for backward, without the last product, whose result nobody needs."""
        x_th = self.attended(x_th, shared)
        save(self.mlp.widened(self.mlp_norm(x_th)))
        self.drop(x_th, shared, self.mlp_key)

    def attended(self, x_th: Tensor, shared: Shared) -> Tensor:
        """The block's first half."""
        return x_th + self.drop(self.attention(self.attention_norm(x_th), shared), shared, self.attention_key)

    def drop(self, x_th: Tensor, shared: Shared, key: int) -> Tensor:
        """Dropout on the way into the residual stream."""
        if not (shared.training and self.dropout):
            return x_th
        return dropout(x_th, shared.row_t, self.dropout, key)
