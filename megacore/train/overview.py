"""What is about to run, in a few lines: at its start, and in a dry run. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megacore.config.pipeline import is_own_schedule
from megacore.config.schema import ParallelConfig, RunConfig
from megacore.data.sampler import BatchPlan
from megacore.layout.layout import Layout
from megacore.layout.policy import ShardingPolicy
from megacore.monitor.console import human_bytes, human_count
from megacore.spec import ModelSpec
from megacore.spec.fp8 import fp8_history_bytes, fp8_layers, fp8_weight_bytes
from megacore.spec.memory import StateBytes, state_bytes
from megacore.spec.params import ParamSpec
from megacore.train.pipeline_overview import Pipeline
from megacore.train.schedule import num_microbatches

if TYPE_CHECKING:
    from megacore.data.source import Source


def overview(config: RunConfig, spec: ModelSpec, layout: Layout, device: str, data: str) -> list[str]:
    """Model, layout, pipeline, batch and data of a resolved run; ``data`` is `summary`'s, ``device`` cpu, cuda or auto.

    State is that of the rank that holds most.
    """
    m, t = config.model, config.train
    ranks = "1 process" if layout.world == 1 else f"{layout.world} processes"
    pipeline = Pipeline.of(config)
    states = [
        state_bytes(
            params,
            config.optim,
            config.precision.dtype,
            tp=layout.tp,
            zero=layout.zero,
            shards=layout.dp_shard,
            master=config.precision.master,
            device="cuda" if device == "cuda" else "cpu",
        )
        for params in pipeline.params(spec)
    ]
    state = max(states, key=lambda each: each.total + each.host)
    sequence = ", sequence parallel" if config.parallel.sequence_parallel and layout.tp > 1 else ""
    return [
        f"model    {m.family}, {human_count(spec.num_params)} parameters: {m.num_layers} layers, "
        f"hidden {m.hidden_size}, {m.num_heads} heads ({m.num_kv_heads} kv), vocabulary {m.vocab_size}",
        f"layout   {layout.describe()}{sequence}: {ranks} on {device}, {config.precision.dtype}",
        *sharding_lines(config, layout),
        *pipeline.lines(),
        f"batch    {t.global_batch_size} x {t.seq_len} tokens{ramp(config)}, microbatches of {t.micro_batch_size}; "
        f"{t.steps} steps",
        f"data     {data}",
        f"state    {'at most ' if len(states) > 1 else ''}{human_bytes(state.total)} per rank: parameters "
        f"{human_bytes(state.params)}, gradients {human_bytes(state.grads)}, optimizer {human_bytes(state.optimizer)}",
        *offload_lines(config, state, device),
        *fp8_lines(config, spec, max(fp8_bytes(config, spec, each, layout.tp) for each in pipeline.params(spec))),
    ]


def fp8_bytes(config: RunConfig, spec: ModelSpec, params: Sequence[ParamSpec], tp: int) -> int:
    """What a rank that holds ``params`` keeps for products in FP8."""
    layers = fp8_layers(spec, config.precision)
    of_weights = fp8_weight_bytes(layers, params, tp=tp, by_unit=config.parallel.zero == 3)
    return of_weights + fp8_history_bytes(len(layers), config.precision)


def fp8_lines(config: RunConfig, spec: ModelSpec, num_bytes: int) -> list[str]:
    """What multiplies in FP8 and what that takes; nothing where nothing does."""
    p, num_layers = config.precision, config.model.num_layers
    if p.fp8 == "off":
        return []
    formats = "E4M3" if p.fp8 == "block" else "E4M3, gradients in E5M2"
    skipped = [*range(p.fp8_skip_first), *range(num_layers - p.fp8_skip_last, num_layers)]
    kept = f"; layers {', '.join(map(str, skipped))} multiply in {p.dtype}" if skipped else ""
    of_one = " of a block in use" if config.parallel.zero == 3 else ""
    histories = " and histories" if p.fp8 == "delayed" else ""
    travel = "; weights travel between shards in FP8, too" if p.fp8_gather else ""
    return [
        f"fp8      {p.fp8} scaling, {formats}: {len(fp8_layers(spec, p))} matrices of layers{kept}; at most "
        f"{human_bytes(num_bytes)} more per rank for weights{of_one} in FP8{histories}{travel}"
    ]


def offload_lines(config: RunConfig, state: StateBytes, device: str) -> list[str]:
    """What is kept elsewhere than on the device; nothing where nothing is. ``state`` is one rank's."""
    nothing_saved = "; on the CPU that is where they are anyway: it saves nothing" * (device != "cuda")
    lines = []
    if state.host:
        lines.append(
            f"offload  {human_bytes(state.host)} more per rank in host memory: weights that are updated, "
            f"{'' if state.files else 'optimizer state, '}gradients on their way there{nothing_saved}"
        )
    if state.files:
        lines.append(f"offload  {human_bytes(state.files)} of optimizer state per rank in files")
    if config.parallel.recompute == "offload":
        lines.append(f"offload  what blocks keep for backward waits in host memory{nothing_saved}")
    return lines


def sharding_lines(config: RunConfig, layout: Layout) -> list[str]:
    """What ZeRO cuts and what that costs; nothing where nothing is cut."""
    policy, ranks = ShardingPolicy.of(layout.zero), layout.dp_shard
    if not policy.optimizer or ranks == 1:
        unused = f"parallel.dp_shard={ranks} cuts nothing with parallel.zero=0" if ranks != layout.dp else ""
        return [f"zero     {unused}"] if unused else []
    parts = ["optimizer state", *["gradients"] * policy.grads, *["parameters"] * policy.params]
    copies = f", {layout.dp_replicate} copies" if layout.dp_replicate > 1 else ""
    lines = [f"zero     stage {layout.zero}: {', '.join(parts)} cut over {ranks} ranks{copies}"]
    number = num_microbatches(config)
    if policy.grads and number > 1:
        price = f"gradients travel {number} times a step, once per microbatch"
        if policy.params:
            price += ", and parameters are gathered twice in each"
        if is_split(config.parallel):
            price += f"; {config.parallel.schedule} keeps whole gradients of units until their weights' turn"
        lines.append(f"warning  {price}; parallel.zero=1 sums once a step")
    return lines


def is_split(parallel: ParallelConfig) -> bool:
    """Whether the schedule takes weight gradients later than those of inputs; a list of one's own may."""
    return parallel.schedule.startswith("zb-") or parallel.schedule == "dualpipe-v" or is_own_schedule(parallel)


def ramp(config: RunConfig) -> str:
    """How the batch grows, if it does."""
    t = config.train
    if not t.batch_ramp:
        return ""
    stages = BatchPlan(t.global_batch_size, t.micro_batch_size, t.batch_ramp).stages
    return f" (grown from {stages[0].size} by step {stages[-1].first_step})"


def summary(sources: Sequence[Source], num_samples: int, seq_len: int) -> str:
    """How much there is to read, and how often it is read."""
    num_tokens = sum(source.num_tokens for source in sources)
    names = ", ".join(Path(source.dataset.prefix).name for source in sources[:3]) + (", ..." if sources[3:] else "")
    return f"{human_count(num_tokens)} training tokens in {names}: {num_samples * seq_len / num_tokens:.2f} epochs"
