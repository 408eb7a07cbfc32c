"""Muon (Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks"): orthogonal updates of matrices.

    B = momentum * B + G
    O = orthogonalise(G + momentum * B)          or of B, without Nesterov
    W = (1 - lr * decay) * W - lr * scale * O

for each matrix of a hidden layer by itself (query, key and value, gate and up are matrices of their own, as the post
advises for the first three), and AdamW for everything else: embeddings, output matrix, norms, biases.

Weight decay and scale are those of Liu et al. 2025, "Muon is Scalable for LLM Training": with scale =
0.2 sqrt(max(rows, columns)) an update has the RMS of AdamW's (section 2.2, equation 4), so that both kinds of
parameters share learning rate and weight decay. ``update_rms=0`` takes the post's sqrt(max(1, rows / columns)).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from types import MappingProxyType

import torch
from torch import Tensor

from megacore.layout.buffer import ALIGNMENT
from megacore.optim.assemble import WholeMatrices
from megacore.optim.moments import make_moment, weights_of
from megacore.optim.orthogonal import cost, orthogonalise
from megacore.optim.rule import Rule, Share
from megacore.optim.rules.adamw import AdamW
from megacore.spec.matrices import Matrix, is_hidden_matrix

DEFAULTS = MappingProxyType(
    {
        "momentum": 0.95,  # Jordan et al., as the three after it
        "nesterov": 1.0,
        "newton_schulz_steps": 5.0,
        "norm_eps": 1e-7,  # added to a matrix' norm
        "update_rms": 0.2,  # Liu et al., section 2.2
        "weight_decay": 0.1,  # Liu et al.
        "beta1": 0.9,  # of AdamW, as in rules/adamw.py
        "beta2": 0.95,
        "eps": 1e-8,
        "compute_bits": 0.0,  # Newton-Schulz in 16 (bfloat16) or 32; 0: 16 on CUDA, else 32. float64 stays float64
        "round_mib": 128.0,  # bounds each buffer of matrices that are assembled
    }
)
STATE = MappingProxyType(
    {"momentum": "moment of hidden matrices", "first": "moment of the rest", "second": "square of the rest"}
)


class Muon(Rule):
    """Matrices are assembled from the ranks that share them, and each is orthogonalised on one of these."""

    def __init__(self, share: Share, settings: Mapping[str, float]) -> None:
        super().__init__(share, settings)
        self.hidden, self.others = (
            [run for run, spec in enumerate(share.specs) if is_hidden_matrix(spec) == which] for which in (True, False)
        )
        self.matrices = part_of(share, self.hidden)
        self.rest = AdamW(part_of(share, self.others), settings)
        self.clock, self.kernels = self.rest.clock, self.rest.kernels
        self.momentum = make_moment(self.matrices, "momentum", self.clock)
        self.weights = weights_of(self.matrices, self.clock)
        self.dtype = torch.promote_types(share.dtype, torch.float32)
        self.whole = WholeMatrices(
            self.matrices,
            compute_dtype(share, settings["compute_bits"]),
            int(settings["round_mib"] * 2**20),
            lambda matrix: cost(matrix.rows, matrix.columns),
        )

    @torch.no_grad()
    def update(self, grads: Sequence[Tensor], lr: float, taken: Tensor) -> None:
        """As ``Rule.update``; the gradients become the updates."""
        self.rest.update([grads[run] for run in self.others], lr, taken)
        go, updates = taken != 0, [grads[run] for run in self.hidden]
        for run, update in enumerate(updates):
            self._look_ahead(run, update, go)
        self.whole.apply(updates, self._orthogonal)
        for run, update in enumerate(updates):
            self._descend(run, update, lr, go)

    def _look_ahead(self, run: int, grad: Tensor, go: Tensor) -> None:
        """Momentum takes the gradient in, which becomes what is to be orthogonalised."""
        momentum, exact = self.settings["momentum"], grad.to(self.dtype)
        part = slice(0, grad.numel())
        velocity = self.momentum.read(run, part, self.dtype).mul(momentum).add_(exact)
        self.momentum.write(run, part, velocity, go)
        grad.copy_(exact.add(velocity, alpha=momentum) if self.settings["nesterov"] else velocity)

    def _descend(self, run: int, update: Tensor, lr: float, go: Tensor) -> None:
        """The weights shrink by their decay and take the update."""
        part, rate = slice(0, update.numel()), lr * self.matrices.lr_scale[run]
        decayed = self.weights.read(run, part, self.dtype) * (1 - rate * self.matrices.weight_decay[run])
        self.weights.write(run, part, decayed.sub_(update, alpha=rate), go)

    def _orthogonal(self, matrix: Matrix, values: Tensor) -> Tensor:
        steps, rms = int(self.settings["newton_schulz_steps"]), self.settings["update_rms"]
        rows, columns = matrix.rows, matrix.columns
        scale = rms * math.sqrt(max(rows, columns)) if rms else math.sqrt(max(1, rows / columns))
        return orthogonalise(values, steps, self.settings["norm_eps"]) * scale

    def state(self) -> Mapping[str, Sequence[Tensor]]:
        """As ``Rule.state``; runs that have nothing of a name have an empty tensor."""
        spread = partial(_spread, self.share)
        momentum = {f"momentum{part}": spread(self.hidden, own) for part, own in self.momentum.tensors().items()}
        return {**momentum, **{name: spread(self.others, own) for name, own in self.rest.state().items()}}


def compute_dtype(share: Share, bits: float) -> torch.dtype:
    """What Newton-Schulz computes in. Raises ValueError for a number of bits that is not offered."""
    if bits not in (0, 16, 32):
        raise ValueError(
            f'optim.options holds "compute_bits={bits:g}", which must be 16 (bfloat16), 32, or 0 for 16 on CUDA and 32 '
            "elsewhere"
        )
    if share.dtype == torch.float64:
        return torch.float64
    return torch.bfloat16 if bits == 16 or (bits == 0 and share.device.type == "cuda") else torch.float32


def part_of(share: Share, own: Sequence[int]) -> Share:
    """The runs of these numbers by themselves, laid one behind the other."""
    runs, offset = [], 0
    for number in own:
        runs.append(replace(share.runs[number], offset=offset))
        offset += -(-share.runs[number].numel // ALIGNMENT) * ALIGNMENT
    return replace(
        share,
        runs=tuple(runs),
        specs=tuple(share.specs[number] for number in own),
        weights=tuple(share.weights[number] for number in own),
        lower=share.lower and tuple(share.lower[number] for number in own),
        copies=(),  # which only some runs would get
        weight_decay=tuple(share.weight_decay[number] for number in own),
        lr_scale=tuple(share.lr_scale[number] for number in own),
    )


def _spread(share: Share, own: Sequence[int], tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """One tensor per run of the share: those of ``own``, and empty ones."""
    found = dict(zip(own, tensors, strict=True))
    return tuple(found[run] if run in found else weight.new_empty(0) for run, weight in enumerate(share.weights))
