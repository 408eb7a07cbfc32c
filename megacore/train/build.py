"""Builds a run from its description: the only place that knows every room."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from megacore.config.schema import ModelConfig, RunConfig
from megacore.config.write import config_hash
from megacore.kernels.table import Choice, Kernels, resolve
from megacore.layout import Layout
from megacore.mesh import process_group
from megacore.mesh.group import CommLog
from megacore.mesh.mesh import ParallelMesh
from megacore.mesh.rank_info import RankInfo
from megacore.model.stage import TIED, Objective, Stage
from megacore.monitor.console import Phases
from megacore.optim.adamw import AdamW
from megacore.optim.groups import Optimizer
from megacore.optim.norm import BufferNorm
from megacore.optim.sgd import SGD
from megacore.parallel.parameters import ParameterMaker
from megacore.parallel.tensor import TensorParallel
from megacore.sharding.flat import FlatParameters
from megacore.sharding.reduce import GradientReducer
from megacore.spec import ModelSpec, ParamSpec
from megacore.spec.stages import layers_of_stages
from megacore.train.schedule import own_schedule_hash, plan_schedule
from megacore.train.step import Trainer

DTYPES = (("fp64", torch.float64), ("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16))


@dataclass(frozen=True)
class Built:
    """One rank's part of a run, ready to step."""

    config: RunConfig
    spec: ModelSpec
    mesh: ParallelMesh
    stages: Mapping[int, Stage]
    """The stages of this rank by their global number."""
    flat: FlatParameters
    trainer: Trainer
    kernels: tuple[Choice, ...]


def join(config: RunConfig, info: RankInfo) -> torch.device:
    """Meet the other ranks and return this one's device; every rank must bring the same run."""
    if config.train.deterministic:
        # cuBLAS refuses to work deterministically without a workspace of fixed size, read when CUDA starts
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    device = process_group.device_of(info, config.train.device)
    process_group.start(info, device, config_hash(config) + own_schedule_hash(config))
    return device


def build(
    config: RunConfig, info: RankInfo, device: torch.device, phases: Phases | None = None, log: CommLog | None = None
) -> Built:
    """Everything between the description and the first step.

    ``config`` must be checked and resolved for ``info.world_size`` ranks, with its vocabulary known; the ranks must
    have joined. ``log`` records every collective.
    """
    phases = phases or Phases()
    with phases.time("mesh"):
        layout = Layout.of(config.parallel, info.world_size)
        kv_replicas = max(1, layout.tp // config.model.num_kv_heads)
        mesh = ParallelMesh.build(layout, info.rank, device, kv_replicas, log)
    dtype = dict(DTYPES)[config.precision.dtype]
    kernels, choices = resolve(device, dtype)
    plan = partial(plan_schedule, config)
    home = plan(config.train.global_batch_size // (config.train.micro_batch_size * layout.dp)).home
    with phases.time("model"):
        parallel = config.parallel
        tp = TensorParallel(mesh.tp, parallel.sequence_parallel, parallel.regather_inputs, kernels.linear)
        spec = ModelSpec.of(config.model, tp.sequence)
        make = ParameterMaker(spec.by_name, mesh.tp, device, dtype, config.train.seed)
        stages = make_stages(config, make, tp, kernels, [rank == mesh.pp.rank for rank in home])
    with phases.time("buffers"):
        flat = FlatParameters.adopt(stages.values())
        names = {number: [name for name, _ in stage.named_parameters()] for number, stage in stages.items()}
        trainer = Trainer(
            spec,
            stages,
            home,
            plan,
            flat,
            mesh,
            tp.wgrad,
            GradientReducer(flat.grads, spec.by_name, mesh, names),
            BufferNorm(flat.grads, spec.params, mesh, () if 0 in stages else (TIED,)),
            make_optimizer(config, flat, spec.by_name),
            config.optim.clip_grad,
        )
    used = operations_of(config.model)
    return Built(config, spec, mesh, stages, flat, trainer, tuple(c for c in choices if c.operation in used))


def make_stages(
    config: RunConfig, make: ParameterMaker, tp: TensorParallel, kernels: Kernels, mine: Sequence[bool]
) -> dict[int, Stage]:
    """The stages that are this rank's own, by their global number."""
    layers = layers_of_stages(config.model, config.train.seq_len, len(mine), config.parallel.stage_layers)
    objective = Objective(config.train.label_smoothing, config.train.z_loss)
    stages: dict[int, Stage] = {}
    for number, own in enumerate(layers):
        if mine[number]:
            stages[number] = Stage(
                config.model,
                make,
                tp,
                kernels,
                objective,
                own,
                first=number == 0,
                last=number == len(mine) - 1,
                tied_to=stages.get(0),
                recompute=config.parallel.recompute,
            )
    return stages


def operations_of(model: ModelConfig) -> frozenset[str]:
    """The kernels that a model calls."""
    norms = {"rmsnorm": "rms_norm", "layernorm": "layer_norm"}
    used = {"linear", norms[model.norm], model.activation, "attention"}
    if model.position == "rope":
        used.add("rope")
    if model.qk_norm:
        used.add("rms_norm")
    if model.attention_dropout:
        used.add("attention_dropout")
    return frozenset(used)


def make_optimizer(config: RunConfig, flat: FlatParameters, specs: dict[str, ParamSpec]) -> Optimizer:
    """The optimizer that ``optim.name`` names."""
    if config.optim.name == "adamw":
        return AdamW(flat, specs, config.optim)
    return SGD(flat, specs, config.optim)
