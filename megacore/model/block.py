"""One transformer block."""

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
    """x [t, h] -> [t, h]: x + attention(norm(x)), then x + mlp(norm(x)); with a parallel residual x + both, of one x.

    Norms stand before attention and MLP, after them (x + norm(attention(x))), or both.
    """

    def __init__(
        self,
        model: ModelConfig,
        make: ParameterMaker,
        tp: TensorParallel,
        kernels: Kernels,
        seed: int,
        recompute: str = "none",
        window: int = 0,
    ) -> None:
        super().__init__()
        self.pre, self.post = model.norm_placement != "post", model.norm_placement != "pre"
        self.parallel = model.parallel_residual
        self.attention_norm = make_norm(model, make.below("attention_norm"), kernels)
        self.attention = Attention(model, make.below("attention"), tp, kernels, seed, recompute == "selective", window)
        both = model.norm_placement == "both"
        if both:
            self.attention_post_norm = make_norm(model, make.below("attention_post_norm"), kernels)
        self.mlp_norm = make_norm(model, make.below("mlp_norm"), kernels)
        self.mlp = MLP(model, make.below("mlp"), tp, kernels)
        if both:
            self.mlp_post_norm = make_norm(model, make.below("mlp_post_norm"), kernels)
        self.dropout, self.recompute, self.offload = model.dropout, recompute == "full", recompute == "offload"
        self.attention_key = counter.key_of("dropout", seed, make.prefix, "attention output")
        self.mlp_key = counter.key_of("dropout", seed, make.prefix, "mlp output")

    def forward(self, x_th: Tensor, shared: Shared) -> Tensor:
        if self.recompute:
            return recomputed(partial(self.compute, shared=shared), partial(self.again, shared=shared), x_th)
        if self.offload:
            run, params, stays = partial(self.compute, x_th, shared), tuple(self.parameters()), tuple(shared.tensors())
            return offloaded(run, params, shared.kept, stays)
        return self.compute(x_th, shared)

    def compute(self, x_th: Tensor, shared: Shared) -> Tensor:
        """The block."""
        attended_th, read_th = self.joined(x_th, shared)
        return attended_th + self.fed(read_th, shared)

    def again(self, x_th: Tensor, save: Save, shared: Shared) -> None:
        """What ``compute`` saves for backward, without products whose results nobody needs: the last one and, where
        the MLP reads the block's own input, attention's. A norm behind them needs them."""
        if self.parallel and not self.post:
            save(self.attention.mixed(self.attention_norm(x_th), shared))
            self.drop(x_th, shared, self.attention_key)
            read_th = self.mlp_norm(x_th)
        else:
            read_th = self.joined(x_th, shared)[1]
        if self.post:
            self.fed(read_th, shared)
        else:
            save(self.mlp.widened(read_th))
            self.drop(x_th, shared, self.mlp_key)

    def attended(self, x_th: Tensor, shared: Shared) -> Tensor:
        """What attention adds to the residual stream."""
        y_th = self.attention(self.attention_norm(x_th) if self.pre else x_th, shared)
        if self.post:
            y_th = (self.attention_post_norm if self.pre else self.attention_norm)(y_th)
        return self.drop(y_th, shared, self.attention_key)

    def joined(self, x_th: Tensor, shared: Shared) -> tuple[Tensor, Tensor]:
        """The residual stream behind attention, and what the MLP reads."""
        y_th = self.attended(x_th, shared)
        if self.pre and not self.parallel:
            read_th, attended_th = self.mlp_norm.added(y_th, x_th)
            return attended_th, read_th
        attended_th = x_th + y_th
        read_th = x_th if self.parallel else attended_th
        return attended_th, self.mlp_norm(read_th) if self.pre else read_th

    def fed(self, read_th: Tensor, shared: Shared) -> Tensor:
        """What the MLP adds to the residual stream."""
        y_th = self.mlp(read_th)
        if self.post:
            y_th = (self.mlp_post_norm if self.pre else self.mlp_norm)(y_th)
        return self.drop(y_th, shared, self.mlp_key)

    def drop(self, x_th: Tensor, shared: Shared, key: int) -> Tensor:
        """Dropout on the way into the residual stream."""
        if not (shared.training and self.dropout):
            return x_th
        return dropout(x_th, shared.row_t, self.dropout, key)
