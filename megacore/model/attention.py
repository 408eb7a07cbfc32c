"""Causal self-attention with grouped query heads (Vaswani et al. 2017; Ainslie et al. 2023)."""

import torch
from torch import Tensor, nn

from megacore.config.schema import ModelConfig
from megacore.kernels import counter
from megacore.kernels.table import Kernels
from megacore.model.inputs import Shared
from megacore.model.norm import RMSNorm
from megacore.model.recompute import recomputed
from megacore.parallel.dropout import keep_mask
from megacore.parallel.head_norm import HeadNorm
from megacore.parallel.linear import make_column, make_row
from megacore.parallel.parameters import ParameterMaker
from megacore.parallel.tensor import TensorParallel


class Attention(nn.Module):
    """x [t, h] -> [t, h]: project, norm and rotate heads, attend, project back."""

    def __init__(
        self,
        model: ModelConfig,
        make: ParameterMaker,
        tp: TensorParallel,
        kernels: Kernels,
        seed: int,
        recompute: bool = False,
        window: int = 0,
    ) -> None:
        super().__init__()
        self.d = model.head_dim
        self.n = model.num_heads // tp.group.size
        self.m = max(1, model.num_kv_heads // tp.group.size)
        self.first_head, self.num_heads = tp.group.rank * self.n, model.num_heads
        self.scale = model.attention_scale_dim**-0.5
        self.qkv = make_column(make.below("qkv"), tp)
        if model.qk_norm:
            self.q_norm = RMSNorm(make.below("q_norm"), model, kernels.rms_norm)
            self.k_norm = RMSNorm(make.below("k_norm"), model, kernels.rms_norm)
        # of all heads at once: copies of key heads count as often as they are held
        counts = self.n * self.d * tp.group.size, self.m * self.d * tp.group.size
        across = model.qk_norm and model.qk_norm_over == "all"
        self.norm_across = HeadNorm(counts, model.norm_eps, float(model.norm_unit_offset), tp.group) if across else None
        self.out = make_row(make.below("out"), tp)
        self.qk_norm, self.recompute, self.window = model.qk_norm, recompute, window
        self.rope = kernels.rope
        self.attend = kernels.attention
        self.attend_dropping = kernels.attention_dropout
        self.softcap: tuple[float, ...] = ()
        if model.attention_softcap:
            self.attend = self.attend_dropping = kernels.attention_softcap
            self.softcap = (model.attention_softcap,)
        self.dropout = model.attention_dropout
        self.key = counter.key_of("dropout", seed, make.prefix)

    def forward(self, x_th: Tensor, shared: Shared) -> Tensor:
        return self.out(self.mixed(x_th, shared))

    def mixed(self, x_th: Tensor, shared: Shared) -> Tensor:
        """What goes into the last product, [t, nd]."""
        qkv_to = self.qkv(x_th)
        if self.recompute:
            return recomputed(lambda x: self.core(x, shared), lambda x, _: self.core(x, shared), qkv_to)
        return self.core(qkv_to, shared)

    def core(self, qkv_to: Tensor, shared: Shared) -> Tensor:
        """Everything between the projections: [t, (n+2m)d] -> [t, nd]."""
        b, s = shared.shape
        q, k, v = self.heads(qkv_to, b, s, shared.cos, shared.sin)
        mask, causal = shared.visible[self.window]
        if shared.training and self.dropout:
            keep = self.keep(shared, b, s)
            y_bnsd = self.attend_dropping(q, k, v, mask, causal, self.scale, keep, *self.softcap)
        else:
            y_bnsd = self.attend(q, k, v, mask, causal, self.scale, None, *self.softcap)
        return y_bnsd.transpose(1, 2).reshape(b * s, self.n * self.d)

    def heads(
        self, qkv_to: Tensor, b: int, s: int, cos: Tensor | None, sin: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [b, n, s, d], keys and values [b, m, s, d], normed and rotated."""
        n, m, d = self.n, self.m, self.d
        qk_bsnd, v_bsmd = qkv_to.view(b, s, n + 2 * m, d).split((n + m, m), 2)
        if self.norm_across:
            qk_bsnd = self.norm_across(qk_bsnd, self.q_norm.weight, self.k_norm.weight)
        elif self.qk_norm:
            q_bsnd, k_bsmd = qk_bsnd.split((n, m), 2)
            qk_bsnd = torch.cat((self.q_norm(q_bsnd), self.k_norm(k_bsmd)), 2)
        if cos is not None:
            qk_bsnd = self.rope(qk_bsnd, cos, sin)
        q_bsnd, k_bsmd = qk_bsnd.split((n, m), 2)
        return q_bsnd.transpose(1, 2), k_bsmd.transpose(1, 2), v_bsmd.transpose(1, 2)

    def keep(self, shared: Shared, b: int, s: int) -> Tensor:
        """The dropout mask of the probabilities [b, n, s, s], keyed by (sample, query, head, key)."""
        row_bs = shared.token_t.view(b, s)
        head_n = torch.arange(self.first_head, self.first_head + self.n, device=row_bs.device)
        index = row_bs[:, None, :] * self.num_heads + head_n[:, None]
        index = index[..., None] * s + torch.arange(s, device=row_bs.device)
        return keep_mask(self.key, index, self.dropout, shared.dtype)
