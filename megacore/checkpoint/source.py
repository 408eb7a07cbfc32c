"""Weights that lie in files, whatever wrote these: a checkpoint of ours, a Hugging Face folder, Megatron's."""

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from megacore.config.schema import ModelConfig


class WeightSource(Protocol):
    """A model's weights by their global names (see ``spec.model``), of which any slice can be read."""

    @property
    def what(self) -> str:
        """What this is, in a few words for messages: "the HF folder PATH"."""

    @property
    def model(self) -> ModelConfig:
        """The model's shape and features, resolved."""

    @property
    def attachments(self) -> Mapping[str, bytes]:
        """Small files that go with the weights, by name: those of the tokenizer, ``hf/config.json``, ..."""

    def dtype(self, name: str) -> torch.dtype:
        """The format in which a weight is stored."""

    def read(self, name: str, start: Sequence[int], size: Sequence[int]) -> Tensor:
        """[*size] of weight ``name`` from ``start`` on, contiguous, on the CPU, as stored.

        Raises ValueError where what is stored is not whole.
        """
