"""Continues token sequences with a model that is split over tp and pp, or not.

Every rank computes the same tokens: logits are gathered whole, and chance comes from a counter, so nothing needs to be
agreed on. The prefix is computed anew for each token (there is no cache yet): meant for looking in on a training run.
"""

import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from megacore.kernels import counter
from megacore.layout.partition import balanced
from megacore.mesh.collectives import all_gather, broadcast
from megacore.mesh.mesh import ParallelMesh
from megacore.model.inputs import Inputs

STEP = 32
"""Sequences are padded to a multiple of it, so that they come in few shapes."""


class Model(Protocol):
    """What generation needs of a model on its ranks."""

    @property
    def mesh(self) -> ParallelMesh: ...

    @property
    def home(self) -> Sequence[int]:
        """The pipeline rank of every stage."""

    @property
    def vocab_size(self) -> int: ...

    def logits(self, inputs: Inputs) -> Tensor | None:
        """This rank's part of the vocabulary [t, v] on ranks that hold the last stage, None on the others."""


@torch.no_grad()
def continue_tokens(
    model: Model,
    prompt: Sequence[int],
    num_tokens: int,
    context: int,
    temperature: float = 0.8,
    stop: int | None = None,
    seed: int = 0,
    num_choices: int | None = None,
) -> list[int]:
    """The tokens that follow ``prompt``, at most ``num_tokens``; ends behind token ``stop``.

    ``context`` is the longest sequence the model takes: older tokens fall off. ``temperature`` 0 takes the likeliest
    token. Only ids below ``num_choices`` are drawn: a model may have more rows than its tokenizer has tokens. Raises
    ValueError for an empty prompt.
    """
    if not prompt:
        raise ValueError("generation needs at least one token to begin with; give a prompt")
    tokens = list(prompt)
    key = counter.key_of("sample", seed, *prompt)
    for place in range(num_tokens):
        logits = next_logits(model, tokens[-context:])[:num_choices]
        tokens.append(choose(logits, temperature, key, place))
        if tokens[-1] == stop:
            break
    return tokens[len(prompt) :]


def next_logits(model: Model, tokens: Sequence[int]) -> Tensor:
    """Logits [V] of the token behind ``tokens``, in float64, equal on all ranks."""
    device, tp, pp = model.mesh.device, model.mesh.tp, model.mesh.pp
    multiple = math.lcm(STEP, tp.size)  # sequence parallelism cuts the tokens into equal shards
    length = -(-len(tokens) // multiple) * multiple
    token_bs = torch.zeros((1, length), dtype=torch.long, device=device)  # causality hides the padding
    token_bs[0, : len(tokens)] = torch.tensor(tokens, device=device)
    # padding stands where the last token stands: a table of learned positions may end there
    position_bs = torch.arange(length, device=device).clamp(max=len(tokens) - 1)[None]
    ordinal_b = torch.zeros(1, dtype=torch.long, device=device)
    local_tv = model.logits(Inputs(token_bs, token_bs, ordinal_b, position_bs, training=False))
    logits = torch.empty(model.vocab_size, dtype=torch.float64, device=device)
    if local_tv is not None:
        sizes = [balanced(model.vocab_size, tp.size, rank)[1] for rank in range(tp.size)]
        logits.copy_(all_gather(local_tv[len(tokens) - 1].contiguous(), tp, sizes=sizes))
    return broadcast(logits, pp, model.home[-1])


def choose(logits: Tensor, temperature: float, key: int, place: int) -> int:
    """A token drawn from softmax(logits / temperature) by inverting its distribution at a counter's uniform."""
    if temperature == 0:
        return int(logits.argmax())
    cumulative = (logits / temperature).softmax(-1).cumsum(-1)
    chance = counter.uniform(key, torch.tensor([place], device=logits.device)) * cumulative[-1]
    return int(torch.searchsorted(cumulative, chance, right=True).clamp(max=logits.numel() - 1))
