"""Bytes of state by arithmetic against those of real buffers."""

import mmap
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from megacore.config.schema import OptimConfig, RunConfig
from megacore.layout.buffer import ALIGNMENT
from megacore.layout.policy import ShardingPolicy
from megacore.monitor.console import human_bytes
from megacore.optim.offload import Offloaded
from megacore.sharding.mapped import MappedMemory
from megacore.spec import ModelSpec, ParamSpec
from megacore.spec.memory import StateBytes, state_bytes
from megacore.spec.settings import is_frozen
from megacore.train.pipeline_overview import Pipeline
from tests.engine.common import built_rank, run_config
from tests.pool import WorkerPool


class Held(NamedTuple):
    """Of one rank: bytes of what lies in buffers, gaps left out; the elements it owns of each parameter; gaps."""

    params: int
    grads: int
    optimizer: int
    runs: dict[str, int]
    gaps: int
    host: int
    files: int


def held(rank: int, world_size: int, overrides: tuple[str, ...]) -> Held:
    built = built_rank(rank, world_size, run_config(world_size, *overrides))
    storage, state = built.storage, built.trainer.rule.state()
    own, whole = (sum(each.numel for each in parts) for parts in (storage.runs, storage.layout.slots))
    item = storage.params.element_size()
    params, grads = own if storage.policy.params else whole, own if storage.policy.grads else whole
    frozen = sum(
        param.numel() for stage in built.stages.values() for param in stage.parameters() if not param.requires_grad
    )
    gaps = len(storage.params) - params + len(storage.grads) - grads
    rule = built.trainer.rule
    remembered = sum(tensor.nbytes for tensors in state.values() for tensor in tensors)
    in_files = 0
    if isinstance(rule, Offloaded) and isinstance(rule.memory, MappedMemory):
        maps = [range_of(file.map) for files in rule.memory.files for file in files]
        tensors = [tensor for of in state.values() for tensor in of if tensor.numel()]
        in_files = sum(one.nbytes for one in tensors if any(one.data_ptr() in each for each in maps))
    optimizer, host = (0, remembered - in_files) if storage.on_host else (remembered - in_files, 0)
    runs = {run.name: run.numel for run in storage.runs}
    master = 0 if storage.master is None else own * storage.master.element_size()
    if storage.on_host:
        assert isinstance(rule, Offloaded) and rule.transfer is not None
        host += master + rule.transfer.nbytes
    else:
        optimizer += master
    optimizer += sum(lower.nbytes for lower in storage.lower or ())
    return Held((params + frozen) * item, grads * storage.grads.element_size(), optimizer, runs, gaps, host, in_files)


def range_of(map_: mmap.mmap) -> range:
    """The addresses of a file in memory."""
    start = torch.frombuffer(map_, dtype=torch.uint8).data_ptr()
    return range(start, start + len(map_))


def expected_of(config: RunConfig, params: Sequence[ParamSpec], runs: dict[str, int], tp_rank: int = 0) -> StateBytes:
    p, numbers = config.parallel, config.precision
    layout = (tp_rank, p.tp, p.zero, p.dp_shard)
    return state_bytes(params, config.optim, numbers.dtype, *layout, runs, numbers.master)


RULES = [
    ("optim.name=adamw",),
    ("optim.name=sgd",),
    ("optim.name=sgd", "optim.momentum=0.9"),
    ("optim.name=adafactor",),
    ("optim.name=adam-mini", "optim.state_dtype=bf16"),
    ("optim.name=muon", 'optim.freeze=["layers.1.*", "embedding.*"]'),
    ("optim.name=adamw", "optim.state_dtype=int8"),
]


@pytest.mark.parametrize("rule", RULES, ids=" ".join)
@pytest.mark.parametrize("dtype", ["fp32", "fp64"])
@pytest.mark.parametrize("tp", [1, 2])
def test_state_is_what_ranks_hold(pool: WorkerPool, tp: int, dtype: str, rule: tuple[str, ...]) -> None:
    overrides = (f"parallel.tp={tp}", f"precision.dtype={dtype}", *rule)
    config = run_config(tp, *overrides)
    spec = ModelSpec.of(config.model)
    for rank, ours in enumerate(pool.run(held, tp, tp, overrides)):
        state = expected_of(config, spec.params, ours.runs, rank)
        assert (state.params, state.grads, state.optimizer) == ours[:3]
        assert state.total == sum(ours[:3])


@pytest.mark.parametrize("rule", RULES, ids=" ".join)
@pytest.mark.parametrize(("zero", "dp", "dp_shard"), [(1, 2, 2), (2, 2, 2), (3, 4, 4), (3, 4, 2)])
def test_stages_hold_what_they_should(
    pool: WorkerPool, zero: int, dp: int, dp_shard: int, rule: tuple[str, ...]
) -> None:
    """To the byte, given where buffers are cut; and an even share is right but for gaps."""
    overrides = (f"parallel.zero={zero}", f"parallel.dp={dp}", f"parallel.dp_shard={dp_shard}", *rule)
    config = run_config(dp, *overrides)
    spec = ModelSpec.of(config.model)
    ranks = pool.run(held, dp, dp, overrides)
    for ours in ranks:
        state = expected_of(config, spec.params, ours.runs)
        assert (state.params, state.grads, state.optimizer) == ours[:3]
        # at most 63 elements behind each parameter, and what makes the pieces of a bucket equal
        most = ALIGNMENT * (len(spec.params) + dp_shard * (config.model.num_layers + 3))
        assert 0 <= ours.gaps <= 2 * most
        even = state_bytes(spec.params, config.optim, config.precision.dtype, 0, 1, zero, dp_shard)
        assert abs(even.grads - state.grads) <= most * 8 and abs(even.params - state.params) <= most * 8
    shards = ranks[:dp_shard]
    trained = sum(param.numel for param in spec.params if not is_frozen(param.name, config.optim))
    assert sum(sum(ours.runs.values()) for ours in shards) == trained, "every element is owned once"


@pytest.mark.parametrize(("numbers", "each"), [("fp16", 18), ("bf16", 18), ("split", 16), ("none", 10)])
@pytest.mark.parametrize("zero", [0, 1, 3])
def test_state_in_sixteen_bits(pool: WorkerPool, zero: int, numbers: str, each: int) -> None:
    """Per parameter 2 bytes, 4 of gradients in fp32, and Adam's moments with what is kept of the master weights."""
    formats = f"precision.dtype={numbers}" if numbers.endswith("16") else f"precision.master={numbers}"
    overrides = ("precision.dtype=bf16", formats, f"parallel.zero={zero}", "optim.name=adamw")
    config = run_config(2, *overrides)
    spec = ModelSpec.of(config.model)
    for ours in pool.run(held, 2, 2, overrides):
        state = expected_of(config, spec.params, ours.runs)
        assert (state.params, state.grads, state.optimizer) == ours[:3]
    alone = state_bytes(spec.params, config.optim, config.precision.dtype, master=config.precision.master)
    assert alone.total == each * spec.num_params


FORMATS = {
    "fp32": (("precision.dtype=fp32",), 4 + 4, 4 + 4),  # weights and gradients on the host; the device's
    "fp64": (("precision.dtype=fp64",), 8 + 8, 8 + 8),
    "fp16": (("precision.dtype=fp16",), 4 + 4 + 2, 2 + 4),
    "bf16": (("precision.dtype=bf16",), 4 + 4 + 2, 2 + 4),
    "none": (("precision.dtype=bf16", "precision.master=none"), 2 + 4, 2 + 4),
}


@pytest.mark.parametrize("rule", RULES, ids=" ".join)
@pytest.mark.parametrize("formats", FORMATS)
@pytest.mark.parametrize("zero", [0, 2])
def test_what_is_offloaded_is_on_the_host_alone(
    pool: WorkerPool, zero: int, formats: str, rule: tuple[str, ...]
) -> None:
    """On the device are parameters and gradients, and nothing else."""
    words, on_host, on_device = FORMATS[formats]
    overrides = (f"parallel.zero={zero}", "optim.offload=cpu", *words, *rule)
    config = run_config(2, *overrides)
    spec = ModelSpec.of(config.model)
    for ours in pool.run(held, 2, 2, overrides):
        state = expected_of(config, spec.params, ours.runs)
        assert (state.params, state.grads, state.optimizer, state.host, state.files) == (*ours[:3], ours.host, 0)
        assert state.optimizer == 0
        remembered = replace(config.optim, offload="none")
        there = state_bytes(
            spec.params, remembered, config.precision.dtype, 0, 1, zero, 2, ours.runs, config.precision.master
        )
        master = {"fp16": 4, "bf16": 4}.get(formats, 0) * sum(ours.runs.values())
        assert state.host == on_host * sum(ours.runs.values()) + there.optimizer - master
    if not config.optim.freeze:
        alone = state_bytes(spec.params, config.optim, config.precision.dtype, master=config.precision.master)
        assert alone.total == on_device * spec.num_params


@pytest.mark.parametrize("rule", [*RULES, ("optim.name=muon", "optim.state_dtype=int8")], ids=" ".join)
@pytest.mark.parametrize("master", ["fp32", "split"])
def test_what_is_in_files_is_in_no_memory(pool: WorkerPool, tmp_path: Path, master: str, rule: tuple[str, ...]) -> None:
    """Moments are; weights and what is small stay."""
    formats = ("precision.dtype=bf16", f"precision.master={master}", f"out={tmp_path}")
    overrides = ("parallel.zero=1", "optim.offload=nvme", *formats, *rule)
    config = run_config(2, *overrides)
    spec = ModelSpec.of(config.model)
    for ours in pool.run(held, 2, 2, overrides):
        state = expected_of(config, spec.params, ours.runs)
        assert (state.params, state.grads, state.optimizer, state.host, state.files) == (*ours[:3], 0, ours.files)
        on_gpu = state_bytes(
            spec.params, config.optim, "bf16", 0, 1, 1, 2, ours.runs, config.precision.master, device="cuda"
        )
        assert (on_gpu.optimizer, on_gpu.files) == (0, state.files) and on_gpu.host >= (4 + 4 + 2) * sum(
            ours.runs.values()
        )


@pytest.mark.parametrize("schedule", ["1f1b", "zb-v"])
@pytest.mark.parametrize("tied", [False, True])
def test_state_of_a_pipeline_is_what_its_ranks_hold(pool: WorkerPool, schedule: str, tied: bool) -> None:
    overrides = ("parallel.pp=2", f"parallel.schedule={schedule}", f"model.tie_embeddings={str(tied).lower()}")
    config = run_config(2, *overrides)
    of_ranks = Pipeline.of(config).params(ModelSpec.of(config.model))
    for params, ours in zip(of_ranks, pool.run(held, 2, 2, overrides), strict=True):
        state = expected_of(config, params, ours.runs)
        assert (state.params, state.grads, state.optimizer) == ours[:3]


def test_published_example_in_full_precision() -> None:
    """AdamW in fp32 keeps 16 bytes per parameter."""
    config = run_config(1)
    spec = ModelSpec.of(config.model)
    assert state_bytes(spec.params, OptimConfig(), "fp32").total == 16 * spec.num_params


@pytest.mark.parametrize(
    ("row", "zero", "published"), [("M0019", 0, 120), ("M0020", 1, 31.4), ("M0021", 2, 16.6), ("M0022", 3, 1.9)]
)
def test_published_example_of_zero(row: str, zero: int, published: float) -> None:
    """GB per GPU of 7.5 billion parameters on 64 (Rajbhandari et al. 2020, figure 1): 2 bytes of parameters, 2 of
    gradients and 12 of optimizer state each. What the stages cut is `ShardingPolicy`'s."""
    policy = ShardingPolicy.of(zero)
    parts = ((2, policy.params), (2, policy.grads), (12, policy.optimizer))
    gigabytes = sum(7.5 * each / (64 if is_cut else 1) for each, is_cut in parts)
    assert gigabytes == pytest.approx(published, abs=0.05), row


@pytest.mark.parametrize("shards", [1, 2, 8])
def test_bytes_per_parameter_in_full_precision(shards: int) -> None:
    """M0017: fp32 parameters and gradients take 16 bytes, of which stage 1 cuts Adam's: 8 + 8/d."""
    param = ParamSpec("weight", (shards * 10, 64))
    assert state_bytes([param], OptimConfig(), "fp32").total == 16 * param.numel
    assert state_bytes([param], OptimConfig(), "fp32", zero=1, shards=shards).total == (8 + 8 / shards) * param.numel
    assert state_bytes([param], OptimConfig(), "fp32", zero=3, shards=shards).total == 16 / shards * param.numel


@pytest.mark.parametrize("shards", [1, 2, 8])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_bytes_per_parameter_in_sixteen_bits(dtype: str, shards: int) -> None:
    """M0014 and M0016: gradients in fp32 and Adam with master weights take 18 bytes, or 6 + 12/d."""
    param = ParamSpec("weight", (shards * 10, 64))
    assert state_bytes([param], OptimConfig(), dtype).total == 18 * param.numel
    assert state_bytes([param], OptimConfig(), dtype, zero=1, shards=shards).total == (6 + 12 / shards) * param.numel
    assert state_bytes([param], OptimConfig(), dtype, zero=3, shards=shards).total == 18 / shards * param.numel


@pytest.mark.parametrize(("number", "text"), [(950, "950 B"), (11_200, "11.2 kB"), (3.4e9, "3.40 GB"), (0, "0 B")])
def test_bytes_as_people_say_them(number: float, text: str) -> None:
    assert human_bytes(number) == text
