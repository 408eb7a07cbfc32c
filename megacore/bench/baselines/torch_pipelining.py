"""The plain model cut into stages under torch.distributed.pipelining: 1F1B, or interleaved 1F1B.

The interleaved class also takes one stage a rank: that is 1F1B with twice the forwards to warm up (and their memory),
whose sends nobody waits for, while `Schedule1F1B` waits for each.

Chosen as its documentation advises, and for speed: shapes are given to every stage, so that no metadata is ever sent
and receive buffers are made once; the loss carries 1/microbatches, so that no gradient is divided afterwards
(`scale_grads`); the last stage's outputs are not kept (`return_outputs`); the optimizer is one fused AdamW over all of
a rank's stages; the norm over ranks is one sum of squares.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, distributed, nn
from torch.distributed import ProcessGroup
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleInterleaved1F1B
from torch.distributed.pipelining.stage import _PipelineStageBase
from torch.nn import functional

from megacore.bench.baselines.plain_llama import PlainLlama, adamw
from megacore.config.schema import OptimConfig


class LlamaStage(nn.Module):
    """Blocks of ``whole``, with its embedding if ``first`` and its norm and output matrix if ``last``; names stay.

    Tokens [b, s] or x [b, s, h] -> x [b, s, h] or logits [b, s, V].
    """

    def __init__(self, whole: PlainLlama, layers: range, first: bool, last: bool):
        super().__init__()
        self.tok_embeddings = whole.tok_embeddings if first else None
        self.layers = nn.ModuleDict({str(i): whole.layers[i] for i in layers})
        self.norm = whole.norm if last else None
        self.output = whole.output if last else None
        self.register_buffer("cos_sd", whole.cos_sd, persistent=False)
        self.register_buffer("sin_sd", whole.sin_sd, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x_bsh = x if self.tok_embeddings is None else self.tok_embeddings(x)
        for layer in self.layers.values():
            x_bsh = layer(x_bsh, self.cos_sd, self.sin_sd)
        return x_bsh if self.norm is None or self.output is None else self.output(self.norm(x_bsh))


class TorchPipeline:
    """A training step of ``whole``, whose stage i holds the layers ``cut[i]`` and lives on rank i % ranks of ``group``.

    ``micro_batch``: (samples, length) of one. ``schedule``: 1f1b (one stage a rank) or interleaved. Every rank
    gives the same batch: tokens and labels [b, s].
    """

    def __init__(
        self,
        whole: PlainLlama,
        cut: Sequence[range],
        optim: OptimConfig,
        micro_batch: tuple[int, int],
        num_microbatches: int,
        schedule: str,
        group: ProcessGroup | None = None,
    ):
        self.group, self.clip_grad, self.num_microbatches = group, optim.clip_grad, num_microbatches
        mine = range(distributed.get_rank(group), len(cut), distributed.get_world_size(group))
        self.stages = {i: LlamaStage(whole, cut[i], i == 0, i == len(cut) - 1) for i in mine}
        self.has_first, self.has_last = 0 in self.stages, len(cut) - 1 in self.stages
        self.parts: list[_PipelineStageBase] = [self._part(whole, i, len(cut), micro_batch) for i in mine]
        self.schedule: Schedule1F1B | ScheduleInterleaved1F1B
        if schedule == "1f1b":
            (part,) = self.parts
            self.schedule = Schedule1F1B(part, num_microbatches, self._loss, scale_grads=False)
        else:
            self.schedule = ScheduleInterleaved1F1B(self.parts, num_microbatches, self._loss, scale_grads=False)
        self.parameters = [parameter for stage in self.stages.values() for parameter in stage.parameters()]
        self.optimizer = adamw(self.parameters, optim, fused=True)

    def __call__(self, tokens: Tensor, labels: Tensor) -> Tensor | None:
        """One step: forward, backward, clip, update. Returns what ``forward_backward`` does."""
        loss = self.forward_backward(tokens, labels)
        if self.clip_grad:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, self.clip_grad, self.global_norm(), foreach=True)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss

    def forward_backward(self, tokens: Tensor, labels: Tensor) -> Tensor | None:
        """Adds the batch's gradients to the parameters'. Returns the mean loss on the rank of the last stage only."""
        losses: list[Tensor] = []
        self.schedule.step(
            *((tokens,) if self.has_first else ()),
            target=labels if self.has_last else None,
            losses=losses,
            return_outputs=False,
        )
        return torch.stack(losses).sum().detach() if self.has_last else None

    def global_norm(self) -> Tensor:
        """Norm of the gradients of all stages."""
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        squared = torch.nn.utils.get_total_norm(gradients, foreach=True).square()
        distributed.all_reduce(squared, group=self.group)
        return squared.sqrt()

    def _part(self, whole: PlainLlama, index: int, num_stages: int, micro_batch: tuple[int, int]) -> PipelineStage:
        tokens = torch.empty(micro_batch, dtype=torch.int64, device="meta")
        x = torch.empty(*micro_batch, whole.output.in_features, device="meta", requires_grad=True)
        logits = torch.empty(*micro_batch, whole.output.out_features, device="meta", requires_grad=True)
        return PipelineStage(
            self.stages[index],
            index,
            num_stages,
            torch.device("cpu"),
            input_args=tokens if index == 0 else x,
            output_args=logits if index == num_stages - 1 else x,
            group=self.group,
        )

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return functional.cross_entropy(logits.flatten(0, 1), labels.flatten()) / self.num_microbatches
