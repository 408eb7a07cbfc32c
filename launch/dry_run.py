"""What `megacore train --dry-run` prints: what a run would do, found out by building ranks of it without numbers."""

import argparse
import json
from typing import TYPE_CHECKING

from megacore.config.schema import RunConfig
from megacore.config.secrets import without_secrets
from megacore.config.write import to_toml
from megacore.layout.layout import Layout
from megacore.spec import ModelSpec

if TYPE_CHECKING:
    from megacore.train.dry_run import DryRun


def show(config: RunConfig, world_size: int, args: argparse.Namespace) -> str:
    """The overview and the built ranks as comments, then the resolved run, which together are a run file; or JSON.

    ``config`` is checked and resolved; ``args`` has ``json`` and ``gpu``. Raises ValueError for an unknown GPU.
    """
    from megacore.train.dry_run import dry_run

    memory = memory_of(args.gpu) if args.gpu else 0.0
    found = dry_run(config, world_size, device_of(config, args.gpu), args.gpu or "", memory)
    if args.json:
        return json.dumps(found.as_json(), indent=1) + "\n"
    lines = [*overview_of(config, found), *found.lines()]
    return "".join(f"# {line}\n" for line in lines) + "\n" + to_toml(without_secrets(config))


def memory_of(gpu: str) -> float:
    """Bytes of a GPU's memory. Raises ValueError for a name that is not known."""
    from megacore.cost.machine import find_machine

    return find_machine(gpu).accelerator.memory_gb * 1e9


def device_of(config: RunConfig, gpu: str | None) -> str:
    """What the run would train on: what it says, else the GPU that was named, else what is here."""
    import torch

    device = config.train.device
    if device != "auto":
        return device
    return "cuda" if (gpu and gpu != "cpu") or torch.cuda.is_available() else "cpu"


def overview_of(config: RunConfig, found: "DryRun") -> list[str]:
    """What a run says at its start."""
    from megacore.data.sampler import BatchPlan
    from megacore.data.source import open_sources
    from megacore.train.overview import overview, summary

    t = config.train
    data = "none yet: data.blend is empty; to train, give a data set's prefix, or a list of [weight, prefix]"
    if config.data.blend:
        sources = open_sources(config.data, "train", config.model.vocab_size)
        num_samples = BatchPlan(t.global_batch_size, t.micro_batch_size, t.batch_ramp).num_samples(t.steps)
        data = summary(sources, num_samples, t.seq_len)
    layout = Layout.of(config.parallel, found.layout.world)
    return overview(config, ModelSpec.of(config.model), layout, t.device, data)
