"""Any rank of any world, built and stepped on the meta device: the engine's own path without numbers.

Every buffer, module and message of a real run has its shape here, so sizes are read off rather than predicted.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.fx.experimental import _config as fx_config

from megacore.config.schema import OptimConfig, RunConfig
from megacore.layout.layout import Layout
from megacore.mesh.collectives import NotThere
from megacore.mesh.group import CommLog, CommRecord
from megacore.mesh.mesh import ParallelMesh, Ranks, partitions_of
from megacore.model.inputs import Inputs
from megacore.spec.memory import StateBytes, state_bytes
from megacore.train.build import Built, build_on, kv_replicas
from megacore.train.live import FlashAttention, LiveBytes
from megacore.train.schedule import num_microbatches

META = torch.device("meta")
Traffic = tuple[str, str, int, float]
"""(axis, operation, how many, bytes that this rank sends under the bandwidth-optimal algorithm)."""


@dataclass(frozen=True)
class Held:
    """Bytes of a kind of state: ``used`` by numbers, and ``memory`` with the gaps that align them."""

    used: int
    memory: int


@dataclass(frozen=True)
class Imagined:
    """One rank: its state as built and as floor 0 counts it, and, if a step was walked, what that took."""

    rank: int
    at: Mapping[str, int]
    state: Mapping[str, Held]
    """Of ``params``, ``grads`` and, if it could be built, ``optimizer``."""
    spec: StateBytes
    step_bytes: int | None = None
    """The most memory that a step holds besides the state: activations, whole units, logits, temporaries."""
    records: tuple[tuple[CommRecord, float], ...] = ()
    """The collectives and messages of one step, and how often each."""
    sizes: Mapping[str, int] = field(default_factory=dict)
    """Ranks of each axis."""
    beside: float = 0.0
    """What a walk was asked to add up beside, for all of the step."""

    @property
    def traffic(self) -> tuple[Traffic, ...]:
        """Counts and bytes of the step by axis and operation."""
        counts: defaultdict[tuple[str, str], float] = defaultdict(float)
        sent: defaultdict[tuple[str, str], float] = defaultdict(float)
        for record, number in self.records:
            key = record.axis, record.operation
            counts[key] += number
            sent[key] += number * record.wire_elements(self.sizes[record.axis]) * record.dtype.itemsize
        return tuple((*key, round(counts[key]), sent[key]) for key in sorted(counts))

    @property
    def agrees(self) -> bool:
        """Whether buffers and spec have the same bytes."""
        return all(held.used == getattr(self.spec, kind) for kind, held in self.state.items())

    @property
    def state_bytes(self) -> int:
        """All state on the device, with gaps."""
        built = sum(held.memory for held in self.state.values())
        return built if "optimizer" in self.state else built + self.spec.optimizer


class Adding(Protocol):
    """A context that adds up seconds, or whatever else, of operations while a step is walked within it."""

    seconds: float

    def __enter__(self) -> Any: ...

    def __exit__(self, *error: Any) -> Any: ...


class Imagination:
    """Ranks of one run; partitions of the mesh are made once."""

    def __init__(self, config: RunConfig, world: int, device: str) -> None:
        """``config`` is checked and resolved for ``world`` ranks; ``device`` (cpu, cuda) is what they would train on,
        for which kernels are chosen."""
        self.layout, self.config, self.device = Layout.of(config.parallel, world), config, torch.device(device)
        self.partitions: Mapping[str, tuple[Ranks, ...]] = MappingProxyType(
            partitions_of(self.layout, kv_replicas(config))
        )
        self.unbuilt = ""
        """Why the optimizer is told by the spec alone, if it is."""
        if config.optim.offload != "none":
            self.unbuilt = "its state lies in host memory or files, which a dry run does not fill"

    def rank(self, number: int, walk: bool, beside: "Adding | None" = None) -> Imagined:
        """One rank, built; ``walk``: take it through a step, too, if that can be done, with ``beside`` entered."""
        log = CommLog()
        mesh = ParallelMesh.imagined(self.layout, number, self.partitions, log)
        try:
            built = build_on(self.built_config, mesh, self.device)
        except NotThere:
            self.unbuilt = "it asks other ranks what they hold before its first step"
            built = build_on(self.built_config, mesh, self.device)
        state = held(built)
        if self.unbuilt:
            del state["optimizer"]
        found = Imagined(number, self.layout.coordinate(number), state, self.spec_of(built))
        if not walk or self.unwalked:
            return found
        walk_of = walked(built, log, beside)
        sizes = {record.axis: getattr(mesh, record.axis).size for record in walk_of.records}
        records = tuple(walk_of.records.items())
        return replace(found, step_bytes=walk_of.peak, records=records, sizes=sizes, beside=walk_of.beside)

    @property
    def unwalked(self) -> str:
        """Why no rank can be taken through a step, or ''."""
        if self.config.parallel.recompute == "offload":
            return "parallel.recompute=offload knows tensors by their addresses, which they do not have here"
        if self.config.precision.fp8 == "block" and self.device.type == "cuda":
            return "torch has no shapes for precision.fp8=block of matrices whose sides are no multiples of 128"
        return ""

    @property
    def built_config(self) -> RunConfig:
        """The run as far as it is built."""
        plain = OptimConfig(name="sgd", lr=self.config.optim.lr, clip_grad=self.config.optim.clip_grad)
        return replace(self.config, optim=plain) if self.unbuilt else self.config

    def spec_of(self, built: Built) -> StateBytes:
        """What floor 0 says that this rank holds."""
        storage, mesh, c = built.storage, built.mesh, self.config
        names = {name for stage in built.stages.values() for name, _ in stage.named_parameters()}
        return state_bytes(
            [built.spec.by_name[name] for name in names],
            c.optim,
            c.precision.dtype,
            tp_rank=mesh.tp.rank,
            tp=mesh.tp.size,
            zero=mesh.layout.zero,
            shards=mesh.layout.dp_shard,
            runs={run.name: run.numel for run in storage.runs},
            master=c.precision.master,
            device=self.device.type,
        )


def held(built: Built) -> dict[str, Held]:
    """Parameters, gradients and optimizer state of a built rank."""
    storage, rule = built.storage, built.trainer.rule
    frozen = {
        name: param.data
        for stage in built.stages.values()
        for name, param in stage.named_parameters()
        if name not in storage.parameters
    }
    runs = sum(run.numel for run in storage.runs)
    whole = sum(param.numel() for param in storage.parameters.values())
    state = [tensor for tensors in rule.state().values() for tensor in tensors]
    if storage.master is not None:
        state += storage.weights
    state += storage.lower or ()
    of_frozen = sum(tensor.nbytes for tensor in frozen.values())
    params, grads = storage.params, storage.grads
    return {
        "params": Held(
            (runs if storage.policy.params else whole) * params.itemsize + of_frozen, params.nbytes + of_frozen
        ),
        "grads": Held((runs if storage.policy.grads else whole) * grads.itemsize, grads.nbytes),
        "optimizer": Held(sum(tensor.nbytes for tensor in state), memory_of(state)),
    }


def memory_of(tensors: Iterable[Tensor]) -> int:
    """Bytes of the memory that tensors lie in."""
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


@dataclass(frozen=True)
class Walk:
    """What a step of some microbatches took."""

    peak: int
    records: Counter[CommRecord]
    beside: float

    def longer(self, shorter: "Walk", times: float) -> "Walk":
        """A step in which what this one has more than a ``shorter`` one comes ``times`` more often."""

        def more(mine: float, its: float) -> float:
            return mine + (mine - its) * times

        records = {record: more(count, shorter.records[record]) for record, count in self.records.items()}
        peak = round(max(self.peak, more(self.peak, shorter.peak)))
        return Walk(peak, Counter(records), more(self.beside, shorter.beside))


def walked(built: Built, log: CommLog, beside: "Adding | None") -> Walk:
    """One step.

    Many microbatches are not walked one by one: what a further one adds is the same each time, and is taken from two
    shorter steps. (Lists for fewer are the beginnings of longer ones.)
    """
    config = built.config
    number = num_microbatches(config)
    round_ = config.parallel.pp if built.mesh.layout.chunks > 1 else 1  # chunks take turns by so many microbatches
    fewer = (config.parallel.pp + 1) * (2 if round_ > 1 else 1)
    most = fewer + round_
    if number <= most:
        return step_of(built, log, number, beside)
    shorter = step_of(built, log, fewer, beside)
    return step_of(built, log, most, beside).longer(shorter, (number - most) / (most - fewer))


def step_of(built: Built, log: CommLog, number: int, beside: "Adding | None" = None) -> Walk:
    """A step of ``number`` microbatches."""
    config, live = built.config, LiveBytes()
    microbatches = [inputs_of(config) for _ in range(number)]
    log.clear()
    before = beside.seconds if beside else 0.0
    # which of the tokens are this rank's rows of the embedding is not known: all, then
    all_of_them = fx_config.patch(meta_nonzero_assume_all_nonzero=True)  # type: ignore[attr-defined]
    with all_of_them, FlashAttention(), live, beside or nullcontext():
        built.trainer.step(microbatches, config.train.global_batch_size * config.train.seq_len, config.optim.lr)
        built.storage.arrive()
    return Walk(live.peak, Counter(log), beside.seconds - before if beside else 0.0)


def inputs_of(config: RunConfig) -> Inputs:
    """A microbatch with the shapes that the run's data will have."""
    shape = config.train.micro_batch_size, config.train.seq_len
    ids = torch.empty(shape, dtype=torch.int64, device=META)
    return Inputs(
        ids,
        ids,
        ids[:, 0],
        position_bs=ids if config.data.reset_positions else None,
        document_bs=ids if config.data.reset_attention else None,
    )
