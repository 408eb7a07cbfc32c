"""Bytes of state that a rank holds for training: parameters, gradients and what the optimizer remembers.

They follow from the specs alone (gaps of at most 63 elements per parameter in flat buffers are left out). Activations
depend on kernels and schedule and are not counted here yet. With ``optim.offload`` some of it is elsewhere.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from megacore.config.offload import on_host
from megacore.config.optimizers import kept, state
from megacore.config.schema import OptimConfig
from megacore.config.settings import settings
from megacore.layout.buffer import ALIGNMENT
from megacore.layout.policy import ShardingPolicy
from megacore.spec.matrices import is_hidden_matrix
from megacore.spec.params import ParamSpec
from megacore.spec.settings import is_frozen

ITEM_BYTES = MappingProxyType({"fp64": 8, "fp32": 4, "bf16": 2, "fp16": 2})

MASTER_BYTES = MappingProxyType({"fp32": 4, "split": 2, "none": 0})
"""Of an element of 16-bit weights."""

PER_ELEMENT = ("moment", "square", "element")
"""Kinds of state that have a number for every element."""

SCALE_BYTES = 4
"""Of a block of ``ALIGNMENT`` elements in 8 bits."""


@dataclass(frozen=True)
class StateBytes:
    """Bytes on one rank: in the memory of the device that trains, and elsewhere (``optim.offload``)."""

    params: int
    grads: int
    optimizer: int
    host: int = 0
    """In host memory for the optimizer's sake: the weights that it updates, what it remembers if that is not in files,
    and room for gradients on their way there and, if they change their format, weights on their way back. (On the CPU
    that is the same memory.)"""
    files: int = 0

    @property
    def total(self) -> int:
        """All that is in the device's memory."""
        return self.params + self.grads + self.optimizer


def state_bytes(
    params: Iterable[ParamSpec],
    optim: OptimConfig,
    dtype: str,
    tp_rank: int = 0,
    tp: int = 1,
    zero: int = 0,
    shards: int = 1,
    runs: Mapping[str, int] | None = None,
    master: str = "fp32",
    device: str = "cpu",
) -> StateBytes:
    """What member ``tp_rank`` of ``tp`` holds of ``params`` while no unit is at work: stages 2 and 3 then hold that
    unit's whole gradients and parameters, too.

    16-bit ``dtype``: gradients are in fp32, and ``master`` weights (see ``precision.master``) are optimizer state.

    ZeRO stage ``zero`` cuts state over ``shards`` ranks (Rajbhandari et al. 2020, section 5). ``runs`` are the elements
    of each parameter that one of them owns; an even share, rounded up, if they are not given. What is frozen is whole
    everywhere and has neither gradients nor state. ``device`` is cpu or cuda, which matters to state in files.
    """
    policy, item = ShardingPolicy.of(zero), ITEM_BYTES[dtype]
    half = item == 2
    extra = MASTER_BYTES[master] if half else 0
    updated = "fp32" if half and extra else dtype
    held = whole = owned = remembered = files = 0
    for param in params:
        numel = param.local_numel(tp_rank, tp)
        if is_frozen(param.name, optim):
            held += numel
            continue
        own = numel
        if policy.optimizer:
            own = -(-numel // shards) if runs is None else runs.get(param.name, 0)
        whole, owned = whole + numel, owned + own
        remembered += optimizer_bytes(optim, updated, param, own)
        files += _bytes_in_files(optim, updated, param, own) if optim.offload == "nvme" else 0
    held += owned if policy.params else whole
    item_of_grad = ITEM_BYTES["fp32"] if half else item
    grads = (owned if policy.grads else whole) * item_of_grad
    remembered -= files
    if not on_host(optim, device):
        return StateBytes(held * item, grads, remembered + extra * owned, files=files)
    # the weights are copies, in the format in which they are updated
    weight = ITEM_BYTES[updated]
    way_back = 0 if weight == item else item
    return StateBytes(held * item, grads, 0, remembered + owned * (weight + item_of_grad + way_back), files)


def optimizer_bytes(optim: OptimConfig, dtype: str, param: ParamSpec, numel: int) -> int:
    """What an optimizer remembers of ``numel`` neighbouring elements of ``param`` that it updates in ``dtype``.

    Statistics of rows and columns are whole on every rank that holds some of the parameter, and never in 16 bits.
    """
    kinds = kept(state(optim.name), settings(optim), is_hidden_matrix(param)).values()
    return sum(_kind_bytes(kind, optim.state_dtype, dtype, param, numel) for kind in kinds)


def _bytes_in_files(optim: OptimConfig, dtype: str, param: ParamSpec, numel: int) -> int:
    """What has a number per element; the rest, which is small, stays in memory."""
    kinds = kept(state(optim.name), settings(optim), is_hidden_matrix(param)).values()
    eight = sum(kind != "element" for kind in kinds if kind in PER_ELEMENT) if optim.state_dtype == "int8" else 0
    scales = eight * SCALE_BYTES * -(-numel // ALIGNMENT)
    return (
        sum(_kind_bytes(kind, optim.state_dtype, dtype, param, numel) for kind in kinds if kind in PER_ELEMENT) - scales
    )


def _kind_bytes(kind: str, state_dtype: str, dtype: str, param: ParamSpec, numel: int) -> int:
    if kind in ("row", "column"):
        return _num_margins(param, kind) * max(ITEM_BYTES[dtype], ITEM_BYTES["fp32"])
    assert kind in PER_ELEMENT, kind
    if kind == "element" or state_dtype == "auto":
        return numel * ITEM_BYTES[dtype]
    if state_dtype == "int8":
        return numel + SCALE_BYTES * -(-numel // ALIGNMENT)
    return numel * ITEM_BYTES[state_dtype]


def _num_margins(param: ParamSpec, kind: str) -> int:
    """Rows or columns of all the matrices that a parameter consists of: one per segment of its split."""
    rows, columns = param.shape[0], math.prod(param.shape[1:])
    matrices = len(param.split.segments) if param.split else 1
    if kind == "row":
        return rows * (1 if param.dim == 0 else matrices)
    return columns * (matrices if param.dim == 0 else 1)
