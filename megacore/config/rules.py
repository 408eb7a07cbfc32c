"""The rules between keys: one function per subject, each a generator of lines that say what, value, rule and fix.

Here are those of ranks, data and records, and the table of all; what needs more room has a module of its own.

A rule reads only the keys named beside it in ``RULES``, and is run only when all of those are in range.
``world_size`` is None where the number of ranks does not matter yet.
"""

from collections.abc import Callable, Iterator

from megacore.config.batch import batch_problems
from megacore.config.fp8 import fp8_problems
from megacore.config.kernels import kernel_problems
from megacore.config.mixtures import latent_problems, mixture_problems
from megacore.config.modules import module_problems
from megacore.config.near import divisors
from megacore.config.param_groups import param_group_problems
from megacore.config.pipeline import cut_problem, num_chunks, schedule_problems
from megacore.config.schema import RunConfig
from megacore.config.shapes import model_problems, softcap_problems
from megacore.config.updates import (
    clipping_problems,
    copied_heads_problems,
    offload_problems,
    optim_problems,
    precision_problems,
)
from megacore.config.watching import alert_problems, guard_problems, watching_problems

Rule = Callable[[RunConfig, int | None], Iterator[str]]


def _of(problems: Callable[[RunConfig], Iterator[str]]) -> Rule:
    """A rule for which the number of ranks does not matter."""
    return lambda config, world_size: problems(config)


def _world(config: RunConfig, world_size: int | None) -> Iterator[str]:
    """The sizes of the axes against the number of ranks."""
    p = config.parallel
    if world_size is None:
        return
    model_ranks = p.tp * p.pp * p.cp
    if world_size % model_ranks:
        more = (world_size // model_ranks + 1) * model_ranks
        fewer = more - model_ranks
        yield (
            f"parallel.tp*pp*cp={p.tp}*{p.pp}*{p.cp}={model_ranks} does not divide the {world_size} ranks; "
            f"start {f'{fewer} or {more}' if fewer else more} ranks"
        )
    elif p.dp and p.dp * model_ranks != world_size:
        yield (
            f"parallel.dp={p.dp} needs tp*pp*cp*dp={p.dp * model_ranks} ranks, but there are {world_size}; "
            f"leave dp out to derive {world_size // model_ranks}, or start {p.dp * model_ranks} ranks"
        )


def _mixture(config: RunConfig, world_size: int | None) -> Iterator[str]:
    yield from mixture_problems(config, world_size)
    yield from latent_problems(config.model)


def _layout(config: RunConfig, world_size: int | None) -> Iterator[str]:
    p, num_layers = config.parallel, config.model.num_layers
    if sorted(p.order.split("-")) != ["cp", "dp", "pp", "tp"] or not p.order.startswith("pp"):
        yield f"parallel.order={p.order} must begin with pp and name dp, cp and tp once each, as in pp-dp-cp-tp"
    if problem := cut_problem(num_layers, p.pp * num_chunks(p), p.stage_layers):
        yield problem
    if p.regather_inputs and not p.sequence_parallel:
        yield "parallel.regather_inputs=true needs parallel.sequence_parallel=true; set it, or leave both out"


def _schedule(config: RunConfig, world_size: int | None) -> Iterator[str]:
    yield from schedule_problems(config.parallel, config.train.batch_ramp)


def _zero(config: RunConfig, world_size: int | None) -> Iterator[str]:
    """What ZeRO cuts, and what cannot be seen of lists that are walked by unit."""
    p, timeline_step = config.parallel, config.log.timeline_step
    dp = p.dp or (world_size or 0) // (p.tp * p.pp * p.cp)
    if p.dp_shard and dp % p.dp_shard:
        yield f"parallel.dp_shard={p.dp_shard} does not divide parallel.dp={dp}; use {divisors(dp, p.dp_shard)}"
    if timeline_step and p.zero >= 2:
        yield (
            f"log.timeline_step={timeline_step} times stages, but parallel.zero={p.zero} walks them unit by unit; "
            "use parallel.zero=1, or leave timeline_step out"
        )


def _batch(config: RunConfig, world_size: int | None) -> Iterator[str]:
    """The global batch against what all ranks compute at once, at every size that a ramp passes."""
    p, t = config.parallel, config.train
    dp = p.dp or (world_size or 0) // (p.tp * p.pp * p.cp)
    yield from batch_problems(t.global_batch_size, t.micro_batch_size, t.batch_ramp, dp or 1)


def _param_groups(config: RunConfig, world_size: int | None) -> Iterator[str]:
    yield from param_group_problems(config.optim.groups)


def _data(config: RunConfig, world_size: int | None) -> Iterator[str]:
    d = config.data
    legal = 1 <= len(d.split) <= 3 and min(d.split) >= 0 and d.split[0] > 0
    if not legal:
        yield (
            f"data.split={list(d.split)} must be one to three shares, of train, validation and test documents, of "
            "which the first is more than 0, such as [969, 30, 1]"
        )
    for key, blend in (("data.blend", d.blend), ("data.eval_blend", d.eval_blend)):
        if blend and (min(weight for weight, _ in blend) < 0 or not any(weight for weight, _ in blend)):
            weights = [weight for weight, _ in blend]
            yield f"{key} has the weights {weights}; they must be at least 0, and one of them more"
        if not all(prefix for _, prefix in blend):
            yield f"{key} has an empty prefix; give the path that PREFIX.bin and PREFIX.idx have in common"
    if config.train.eval_every and not d.eval_blend and legal and not any(d.split[1:2]):
        yield (
            f"train.eval_every={config.train.eval_every} needs validation data, but data.split={list(d.split)} leaves "
            "none; give data.eval_blend or a second share above 0"
        )
    if d.fim_rate and len(d.fim_tokens) != 3:
        yield f"data.fim_tokens={list(d.fim_tokens)} must name the prefix, middle and suffix tokens"


def _log(config: RunConfig, world_size: int | None) -> Iterator[str]:
    log = config.log
    if log.sample_every and not log.sample_prompts:
        yield (
            f"log.sample_every={log.sample_every} has no prompts to continue; give log.sample_prompts, or leave it out"
        )
    if log.sample_prompts and not log.sample_every:
        yield (
            f"log.sample_prompts={list(log.sample_prompts)} would never be continued with log.sample_every=0; give the "
            "steps between samples, or leave the prompts out"
        )
    if not all(log.sample_prompts):
        yield f"log.sample_prompts={list(log.sample_prompts)} has an empty prompt; give each at least one letter"
    if log.timeline_step > config.train.steps:
        yield (
            f"log.timeline_step={log.timeline_step} comes after the last step, train.steps={config.train.steps}; "
            f"use at most {config.train.steps}"
        )


def _watching(config: RunConfig, world_size: int | None) -> Iterator[str]:
    yield from watching_problems(config, world_size)
    yield from guard_problems(config)
    yield from alert_problems(config)


def _checkpoint(config: RunConfig, world_size: int | None) -> Iterator[str]:
    c = config.checkpoint
    if c.keep_best and not config.train.eval_every:
        yield (
            f"checkpoint.keep_best={c.keep_best} needs validation losses, but train.eval_every=0; evaluate at the "
            "steps of checkpoint.save_every, or leave it out"
        )
    if c.init_from and c.resume not in ("auto", "never"):
        yield (
            f"checkpoint.init_from={c.init_from} and checkpoint.resume={c.resume} both say what to begin with; resume "
            "goes on with everything, init_from takes weights alone: leave one out"
        )
    if not c.resume:
        yield 'checkpoint.resume="" must be auto, never or a path; leave it out for auto'


def _out(config: RunConfig, world_size: int | None) -> Iterator[str]:
    if not config.out.strip():
        yield f'out="{config.out}" names no folder; give one, such as runs/run, or leave it out'


# Each rule with the keys that it reads: a section's name stands for all of its keys.
RULES: tuple[tuple[Rule, tuple[str, ...]], ...] = (
    (_world, ("parallel",)),
    (_of(model_problems), ("model", "parallel", "train.seq_len")),
    (_mixture, ("model", "parallel", "train.seq_len")),
    (_layout, ("parallel", "model.num_layers")),
    (_schedule, ("parallel.chunks", "parallel.schedule", "train.batch_ramp")),
    (_zero, ("parallel", "log.timeline_step")),
    (_batch, ("parallel", "train")),
    (_of(optim_problems), ("optim", "train.steps")),
    (_of(offload_problems), ("optim.offload", "optim.offload_folder", "precision.master", "train.device")),
    (_of(copied_heads_problems), ("model", "parallel.tp", "optim.state_dtype", "train.seq_len")),
    (_of(clipping_problems), ("optim.clip", "optim.clip_grad")),
    (_param_groups, ("optim.groups",)),
    (_of(precision_problems), ("precision",)),
    (
        _of(fp8_problems),
        (
            *("model", "parallel.tp", "parallel.zero", "precision", "kernels.use", "log.statistics_every"),
            *("train.seq_len", "train.micro_batch_size"),
        ),
    ),
    (_of(kernel_problems), ("kernels.use", "kernels.compile", "model", "optim.name", "parallel.tp")),
    (_of(module_problems), ("kernels.use", "parallel", "precision", "train.seq_len", "train.micro_batch_size")),
    (_of(softcap_problems), ("model.logit_softcap", "train.label_smoothing", "precision.dtype")),
    (_data, ("data", "train.eval_every")),
    (_out, ("out",)),
    (_checkpoint, ("checkpoint", "train.eval_every")),
    (_log, ("log.sample_every", "log.sample_prompts", "log.timeline_step", "train.steps")),
    (
        _watching,
        ("log.profile", "log.profile_ranks", "log.nvtx", "log.communication", "train.steps", "train.device"),
    ),
)
