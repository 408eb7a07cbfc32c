"""Writes `launch/recipes/`: run files for known models on 8 to 1,024 H100s, with layouts that `megacore plan` finds.

    python -m megacore.tools.recipes launch/recipes

No figure in them has been measured: each says what the planner predicts, and the command that shows why. Only what the
engine trains today is planned with; values of the optimizer are those that Llama 3's authors published, by size.
"""

import argparse
import math
import re
import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megacore.config.presets import preset_path
from megacore.config.write import toml_value

if TYPE_CHECKING:
    from megacore.cost.estimate import Estimate

MACHINE, PER_NODE, HEADROOM = "h100", 8, 0.15
"""The machine, and how much of its memory a recipe leaves free."""
TOKENS = 1e12
"""A run's length in tokens, which everybody will want to change."""
FIXED = ("parallel.cp=1",)
"""What the engine does not train yet is not planned with."""
RECIPES = (
    ("llama3-8b", (8, 64)),
    ("llama3-70b", (64, 128, 512)),
    ("llama3-405b", (512, 1024)),
    ("qwen3-8b", (8, 64)),
    ("qwen3-32b", (64, 256)),
)
LEARNING_RATES = ((20e9, 3e-4), (100e9, 1.5e-4), (math.inf, 8e-5))
"""Up to so many parameters: Llama 3 8B, 70B, 405B (arXiv:2407.21783, table 3)."""


def main(argv: list[str] | None = None) -> int:
    """Write them."""
    parser = argparse.ArgumentParser(prog="megacore.tools.recipes", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("folder", help="where to")
    folder = Path(parser.parse_args(argv).folder)
    folder.mkdir(parents=True, exist_ok=True)
    for preset, worlds in RECIPES:
        for world in worlds:
            path = folder / f"{name_of(preset, world)}.toml"
            path.write_text(recipe(preset, world))
            print(path)
    return 0


def name_of(preset: str, world: int) -> str:
    """Of a recipe's file, without the ending."""
    return f"{preset}-{world}x{MACHINE}"


def planned(preset: str, world: int) -> "Estimate":
    """The fastest layout that fits, of those that the engine trains today. Raises ValueError if none does."""
    from megacore.config.supported import unsupported
    from megacore.cost.machine import find_machine
    from megacore.cost.planning import read_wish

    found = read_wish(None, preset, FIXED, world, find_machine(MACHINE), 0, HEADROOM).search(5)
    usable = [each for each in found.best if not list(unsupported(each.config))]
    if not usable:
        raise ValueError(f"no layout of {preset} on {world} {MACHINE} that fits can be trained today")
    return usable[0]


def recipe(preset: str, world: int) -> str:
    """A run file; comments say what is expected, and that it is derived."""
    from megacore.cost.planning import run_lines
    from megacore.spec import ModelSpec

    best = planned(preset, world)
    name, nodes = name_of(preset, world), world // PER_NODE
    model = re.search(
        r"^\[model\]\n(?:(?!\[(?!model)).*\n)+", preset_path(preset).read_text(encoding="utf-8"), re.MULTILINE
    )
    assert model is not None, "every preset has a model"
    t, size = best.config.train, ModelSpec.of(best.config.model).num_params
    lr = next(rate for limit, rate in LEARNING_RATES if size <= limit)
    layout = tomllib.loads(run_lines(best))
    optim: dict[str, Any] = {
        "name": "adamw",
        "lr": lr,
        "min_lr": float(f"{lr / 10:g}"),
        "warmup_steps": 2000,
        "weight_decay": 0.1,
    }
    optim |= {"beta2": 0.95, "clip_grad": 1.0, "lr_schedule": "cosine"}
    steps = round(TOKENS / (t.global_batch_size * t.seq_len))
    sections: dict[str, Mapping[str, Any]] = {
        "parallel": layout["parallel"],
        "train": {"steps": steps, **layout["train"]},
        "optim": optim,
        "precision": layout["precision"],
        "checkpoint": {"save_every": 250, "keep": 3},
    }
    head = [
        f"# {preset} on {world:,} {MACHINE.upper()}s, {nodes} node{'s' if nodes > 1 else ''} of {PER_NODE}.",
        "# derived: planned, not measured. The planner predicts",
        f"#   {best.step.seconds:.1f} s a step, {best.tokens_per_s_per_gpu:,.0f} tokens/s per GPU, "
        f"MFU {best.mfu or 0:.0%}, {best.worst.total / 1e9:.0f} GB on the fullest GPU",
        f"#   megacore plan --preset {preset} --gpus {world} --gpu {MACHINE} --headroom {HEADROOM:g} {' '.join(FIXED)}",
        "# To train (steps are for 1T tokens, the learning rate is Llama 3's for this size):",
        f"#   megacore launch slurm launch/recipes/{name}.toml --nodes {nodes} \\",
        "#       data.blend=PREFIX data.tokenizer=TOKENIZER",
        f'out = "runs/{name}"',
    ]
    body = [
        "\n".join([f"[{section}]", *(f"{key} = {toml_value(value)}" for key, value in keys.items())])
        for section, keys in sections.items()
    ]
    return "\n\n".join(["\n".join(head), model[0].rstrip(), *body]) + "\n"


if __name__ == "__main__":
    from megacore.exits import run

    sys.exit(run("megacore.tools.recipes", sys.argv[1:]))
