"""What an optimizer is given and what it must do. Each is one file of ``rules/``, found by its name."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megacore.kernels.table import Choice
from megacore.layout.shards import Run
from megacore.mesh.group import Group
from megacore.optim.formats import StateFormat
from megacore.spec import ParamSpec
from megacore.spec.matrices import Matrix


def allocate_zeros(numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[numel] of 0 in the device's own memory."""
    return torch.zeros(numel, dtype=dtype, device=device)


@dataclass(frozen=True)
class Share:
    """What one rank's optimizer updates: parallel tuples, one entry per run.

    Empty runs are left out, so a rank may have none; ``dtype`` and ``device`` are those of the weights even then.
    Runs start and stop at multiples of ``layout.buffer.ALIGNMENT`` elements, or where their tensor ends.
    """

    runs: tuple[Run, ...]
    specs: tuple[ParamSpec, ...]
    weights: tuple[Tensor, ...]
    """1-D and contiguous, in the dtype that is updated: master weights under 16-bit training, unless they are these
    bf16 numbers and ``lower``, or these alone. (Gradients are float32 then, too.)"""
    weight_decay: tuple[float, ...]
    """0 where decay does not apply."""
    lr_scale: tuple[float, ...]
    """Multiplies the learning rate."""
    tp: Group
    """Ranks that hold other pieces of split parameters, and copies of the others."""
    shards: Group
    """Ranks that hold other runs of the same local tensors; of size 1, the runs are whole tensors."""
    dtype: torch.dtype
    device: torch.device
    format: StateFormat = StateFormat()
    """Of moments."""
    lower: tuple[Tensor, ...] | None = None
    """int16: the lower halves of weights of which ``weights`` are the upper ones (``kernels.halves``)."""
    allocate: Callable[[int, torch.dtype, torch.device], Tensor] = allocate_zeros
    """Gives the memory of ``zeros``."""
    kernel: str = ""
    """The backend of Adam and AdamW that is wanted, if one is."""
    copies: tuple[Tensor, ...] = ()
    """Where a rule may write the new weights, too, rounded: the parameters, if those are others. Empty if not."""

    def __post_init__(self) -> None:
        parts = (self.runs, self.specs, self.weights, self.weight_decay, self.lr_scale)
        assert len({len(part) for part in parts}) == 1, [len(part) for part in parts]
        for run, spec, weight in zip(self.runs, self.specs, self.weights):
            assert run.name == spec.name, (run.name, spec.name)
            assert weight.shape == (run.numel,), (run, weight.shape)
            assert (weight.dtype, weight.device.type) == (self.dtype, self.device.type), (run, weight.dtype)

    @property
    def updated(self) -> torch.dtype:
        """What is updated, in all its bits."""
        return self.dtype if self.lower is None else torch.float32

    def zeros(self, dtype: torch.dtype | None = None) -> tuple[Tensor, ...]:
        """One number per element, a 1-D tensor per run: views of one flat tensor that is laid out as the shard is.

        They are as exact as the weights if no dtype is given.
        """
        start = min((run.offset for run in self.runs), default=0)
        size = max((run.offset + run.numel for run in self.runs), default=0) - start
        flat = self.allocate(size, dtype or self.updated, self.device)
        return tuple(flat[run.offset - start :][: run.numel] for run in self.runs)


class Rule(ABC):
    """An optimizer: the one class of this kind in its file, which also holds two literals that are read unimported.

    ``DEFAULTS`` are its hyper-parameters with their usual values, ``STATE`` says what it remembers (see
    ``config.optimizers``). ``settings`` has a value for every name of ``DEFAULTS``. ``clock`` counts the steps taken.
    ``kernels`` are those that it chose, if any: a run says them at its start. ``writes_copies`` is whether ``update``
    leaves the new weights in the share's ``copies``, too.
    """

    def __init__(self, share: Share, settings: Mapping[str, float]) -> None:
        self.share, self.settings = share, settings
        self.clock = torch.zeros((), dtype=torch.float32, device=share.device)
        self.kernels: tuple[Choice, ...] = ()
        self.writes_copies = False

    @abstractmethod
    def update(self, grads: Sequence[Tensor], lr: float, taken: Tensor) -> None:
        """Make one step.

        ``grads`` are 1-D, one per run, in the weights' dtype, clipped and finite; they may be overwritten. ``taken``
        (float32 scalar on the device) is 1 or 0: at 0, where all gradients are 0, not a bit of weights, state or clock
        may change. It is never read on the host, which must not wait for the device.
        """

    def set_clock(self, clock: Tensor) -> None:
        """Count on from ``clock``, as after a checkpoint."""
        self.clock.copy_(clock)

    @property
    def state_matrices(self) -> Sequence[Matrix]:
        """What ``state`` has a tensor for, where it has one per logical matrix."""
        return ()

    @abstractmethod
    def state(self) -> Mapping[str, Sequence[Tensor]]:
        """What must be saved besides the clock: by name, one tensor per run, or one per logical matrix."""
