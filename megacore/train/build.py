"""Builds a run from its description: the only place that knows every room."""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from megacore.config.fp8 import TRANSFORMER_ENGINE as MODULES
from megacore.config.kernels import OPTIMIZER, operations_of, wanted, wanted_of_model
from megacore.config.offload import on_host, split_problem
from megacore.config.schema import PrecisionConfig, RunConfig
from megacore.config.settings import settings
from megacore.config.write import config_hash
from megacore.kernels.fp8.products import product_of
from megacore.kernels.fp8.recipes import Blocks, Current, Delayed, Recipe
from megacore.kernels.inductor import check_compiler, compiled, compiled_kernels
from megacore.kernels.table import Choice, Kernels, explain, packages, resolve
from megacore.layout import Layout
from megacore.layout.policy import ShardingPolicy
from megacore.mesh import process_group
from megacore.mesh.group import CommLog
from megacore.mesh.mesh import ParallelMesh
from megacore.mesh.rank_info import RankInfo
from megacore.model.attention import Attention
from megacore.model.stage import TIED, Objective, Stage
from megacore.monitor.console import Phases
from megacore.optim.clipping import make_clip
from megacore.optim.formats import StateFormat
from megacore.optim.loss_scale import LossScale
from megacore.optim.norm import GlobalNorm
from megacore.optim.offload import Transfer, place_rule
from megacore.optim.rule import Rule, Share
from megacore.optim.statistics import Watch
from megacore.parallel.fp8 import Fp8
from megacore.parallel.parameters import ParameterMaker, fill
from megacore.parallel.tensor import TensorParallel
from megacore.sharding.storage import Numbers, Storage
from megacore.spec import ModelSpec
from megacore.spec.fp8 import fp8_layers
from megacore.spec.settings import settings_of
from megacore.spec.stages import layers_of_stages
from megacore.train.failpoints import Failpoints
from megacore.train.modules import make_modules
from megacore.train.schedule import own_schedule_hash, plan_schedule
from megacore.train.spoiling import arm
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
    storage: Storage
    trainer: Trainer
    kernels: tuple[Choice, ...]
    kernel_reasons: tuple[str, ...]
    """Why others were not chosen, where that was asked for."""
    failpoints: Failpoints
    """Faults that tests ask for; none else."""


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
        log = CommLog(keeps=False, receives=True) if log is None else log
        mesh = ParallelMesh.build(layout, info.rank, device, kv_replicas(config), log)
    return build_on(config, mesh, device, phases)


def kv_replicas(config: RunConfig) -> int:
    """Neighbours in tp that hold the same kv heads."""
    return max(1, config.parallel.tp // config.model.num_kv_heads)


def build_on(config: RunConfig, mesh: ParallelMesh, device: torch.device, phases: Phases | None = None) -> Built:
    """As `build`, with a mesh that is there; ``device`` is what kernels are chosen for, which is the mesh's own unless
    that is the meta device of a dry run."""
    phases, layout = phases or Phases(), mesh.layout
    dtype = dict(DTYPES)[config.precision.dtype]
    products = {name: backend for name, backend in wanted_of_model(config.kernels.use).items() if backend != MODULES}
    kernels, choices = resolve(device, dtype, products)
    if config.kernels.compile:
        check_compiler(device)
        kernels, choices = compiled_kernels(kernels, choices, wanted(config.kernels.use))
    plan = partial(plan_schedule, config)
    schedule = plan(config.train.global_batch_size // (config.train.micro_batch_size * layout.dp))
    home = schedule.home
    with phases.time("model"):
        parallel = config.parallel
        sequence = parallel.sequence_parallel and mesh.tp.size > 1
        spec = ModelSpec.of(config.model, sequence)
        modules, of_modules = make_modules(config, spec, mesh, schedule, dtype, device)
        fp8, of_fp8 = (None, ()) if modules else make_fp8(config, spec, mesh, dtype, device, kernels)
        linears = {} if fp8 is None else fp8.kernels
        tp = TensorParallel(
            mesh.tp, sequence, parallel.regather_inputs, kernels.linear, linears=linears, modules=modules
        )
        make = ParameterMaker(spec.by_name, mesh.tp, mesh.device, dtype, config.train.seed, filled=False)
        stages = make_stages(config, make, tp, kernels, [rank == mesh.pp.rank for rank in home])
        if modules:
            modules.prepare()
        if config.kernels.compile:
            compile_heads(stages.values())
    with phases.time("buffers"):
        coder = fp8 if config.precision.fp8_gather else None
        storage = make_storage(config, spec, stages, mesh, make, updates_on_host(config, device), coder)
        rule = make_optimizer(config, spec, storage)
        copies = () if 0 in stages else (TIED,)
        norm = GlobalNorm(storage.runs, spec.params, mesh, storage.shards, copies, kernels.squares)
        watched = config.log.statistics_every > 0
        trainer = Trainer(
            spec,
            stages,
            home,
            plan,
            storage,
            tp.wgrad,
            make_clip(config.optim, norm, watched),
            LossScale(config.precision, mesh.device),
            rule,
            Watch(norm, spec.params, mesh) if watched else None,
            modules or fp8,
        )
    used = operations_of(config.model, config.precision.fp8 if fp8 else "off")
    chosen = (*(c for c in choices if c.operation in used), *of_modules, *of_fp8, *rule.kernels)
    reasons = (*explain(device, dtype, chosen), *packages()) if config.kernels.explain else ()
    failpoints = Failpoints.of(os.environ, mesh.rank)
    arm(failpoints, trainer)
    return Built(config, spec, mesh, stages, storage, trainer, chosen, reasons, failpoints)


def compile_heads(stages: Iterable[Stage]) -> None:
    """Let what happens to heads before attention be one graph, which blocks of the same shape share."""
    for attention in (block.get_submodule("attention") for stage in stages for block in stage.blocks):
        assert isinstance(attention, Attention)
        attention.heads = compiled(attention.heads)  # type: ignore[method-assign]


def make_fp8(
    config: RunConfig,
    spec: ModelSpec,
    mesh: ParallelMesh,
    dtype: torch.dtype,
    device: torch.device,
    kernels: Kernels,
) -> tuple[Fp8 | None, tuple[Choice, ...]]:
    """The layers that multiply in FP8, if there are any, and the choice of their product. Raises ValueError where the
    device has none."""
    precision = config.precision
    if precision.fp8 == "off":
        return None, ()
    product, choice = product_of(precision.fp8, device, dtype)
    layers = fp8_layers(spec, precision)
    recipe: Recipe
    if precision.fp8 == "delayed":
        recipe = Delayed(len(layers), precision.fp8_history, precision.fp8_margin, mesh.device, kernels.quantise)
    else:
        recipe = Current(kernels.quantise) if precision.fp8 == "current" else Blocks()
    return Fp8(recipe, product, layers, mesh.world, mesh.device), (choice,)


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


def make_storage(
    config: RunConfig,
    spec: ModelSpec,
    stages: Mapping[int, Stage],
    mesh: ParallelMesh,
    make: ParameterMaker,
    on_host: bool = False,
    coder: Fp8 | None = None,
) -> Storage:
    """Buffers for what is trained; frozen parameters stay where they are, whole on every rank. ``on_host`` and
    ``coder``: as ``Storage`` takes them."""
    of = settings_of(spec.params, config.optim)

    def write(name: str, tensor: Tensor) -> None:
        fill(tensor, spec.by_name[name], mesh.tp, config.train.seed)

    units: dict[tuple[int, int], dict[str, nn.Parameter]] = {}
    for number, stage in stages.items():
        for unit, params in enumerate(stage.unit_parameters()):
            units[number, unit] = {name: param for name, param in params.items() if not of[name].frozen}
            for name, param in params.items():
                if of[name].frozen:
                    param.data = torch.empty(param.shape, dtype=param.dtype, device=param.device)
                    write(name, param.requires_grad_(False))
    alone = (TIED,) if config.model.tie_embeddings else ()
    policy = ShardingPolicy.of(config.parallel.zero)
    in_fp8 = frozenset(f"{layer}.weight" for layer in coder.layers) if coder else frozenset()
    numbers = numbers_of(config.precision)
    return Storage(units, spec.by_name, mesh, policy, numbers, write, alone, on_host, coder, in_fp8)


def updates_on_host(config: RunConfig, device: torch.device) -> bool:
    """Whether the optimizer updates copies of the weights in host memory. Raises ValueError where it cannot."""
    if not on_host(config.optim, device.type):
        return False
    if problem := split_problem(config, device.type):
        raise ValueError(problem)
    return True


def numbers_of(precision: PrecisionConfig) -> Numbers:
    """The formats of a run: 16-bit parameters have gradients and master weights in fp32 (Micikevicius et al. 2018,
    section 3.1)."""
    params = dict(DTYPES)[precision.dtype]
    reduce = dict(DTYPES)[precision.grad_reduce_dtype]
    if precision.master != "fp32":
        return Numbers(params, torch.float32, None, reduce, split=precision.master == "split")
    if params.itemsize == 2:
        return Numbers(params, torch.float32, torch.float32, reduce)
    return Numbers(params, params, None, reduce)


def make_optimizer(config: RunConfig, spec: ModelSpec, storage: Storage) -> Rule:
    """The optimizer that ``optim.name`` names, over what this rank owns."""
    of = settings_of(spec.params, config.optim)
    numbers, mesh = storage.numbers, storage.mesh
    transfer, device, tp, shards = None, mesh.device, mesh.tp, storage.shards
    if storage.on_host:
        transfer = Transfer(storage.weights, storage.own_params, storage.own_grads, device)
        tp, device = mesh.for_host("tp"), torch.device("cpu")
        shards = mesh.for_host("dp_shard") if shards.size > 1 else shards
    share = Share(
        runs=storage.runs,
        specs=tuple(spec.by_name[run.name] for run in storage.runs),
        weights=storage.weights,
        weight_decay=tuple(of[run.name].weight_decay for run in storage.runs),
        lr_scale=tuple(of[run.name].lr_scale for run in storage.runs),
        tp=tp,
        shards=shards,
        dtype=numbers.master or numbers.params,
        device=device,
        format=StateFormat.of(config.optim, config.train.seed, config.precision.master),
        lower=storage.lower,
        kernel=wanted(config.kernels.use).get(OPTIMIZER, ""),
        copies=() if storage.master is None else storage.own_params,
    )
    buckets = [[slot.name for slot in slots] for slots in storage.lending.slots]
    return place_rule(config.optim, share, settings(config.optim), buckets, Path(config.out) / "offload", transfer)
