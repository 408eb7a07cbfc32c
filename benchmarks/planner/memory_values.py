"""Memory as formulas and single values have it (../shared/reference/memory.csv) beside what the planner says.

    python benchmarks/planner/memory_values.py [--reference ../shared/reference]

Rows are named by their numbers. Claims, recommended layouts, volumes of communication and times are left out, and so is
what only repeats another row.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from statistics import median

from published import DROPS, GB, GIB, add_reference, is_missing, read

from megacore.config.load import load
from megacore.config.resolve import resolve
from megacore.cost.memory import RankMemory, memory_by_rank
from megacore.cost.practice import Practice
from megacore.layout import Layout

OLD = Practice(attention="explicit", grad_bytes=4, logit_bytes=6, waste=0.0, context_gb=0.0)
NEW = replace(OLD, attention="fused-masks")
BARE = replace(OLD, grad_bytes=2)
GPT = ("model.family=gpt2", "model.vocab_size=51200", "train.seq_len=2048", "precision.dtype=fp16", *DROPS)
SHARDED = ("parallel.sequence_parallel=true", "parallel.regather_inputs=true")
SELECTIVE = "parallel.recompute=selective"


def shape(layers: int, hidden: int, heads: int) -> tuple[str, ...]:
    """Of a model, as overrides."""
    return f"model.num_layers={layers}", f"model.hidden_size={hidden}", f"model.num_heads={heads}"


def interleaved(ranks: int, chunks: int, samples: int) -> tuple[str, ...]:
    """A pipeline, as overrides."""
    kind = "interleaved" if chunks > 1 else "1f1b"
    names = (f"pp={ranks}", f"chunks={chunks}", f"schedule={kind}")
    return *(f"parallel.{name}" for name in names), f"train.global_batch_size={samples}"


# Korthikanti et al. 2022, table 3
MODELS = {
    "22B": (*GPT, *shape(48, 6144, 64), "train.micro_batch_size=4", "train.global_batch_size=4", "parallel.tp=8"),
    "175B": (*GPT, *shape(96, 12288, 96), *interleaved(8, 3, 64), "parallel.tp=8",
             f"parallel.stage_layers={[4] * 24}"),
    "530B": (*GPT, *shape(105, 20480, 128), *interleaved(35, 3, 280), "parallel.tp=8",
             f"parallel.stage_layers={[1] * 105}"),
    "1T": (*GPT, *shape(128, 25600, 160), *interleaved(64, 1, 512), "parallel.tp=8",
           f"parallel.stage_layers={[2] * 64}"),
}  # fmt: skip
GPT3_7B = (
    "model.family=gpt2", *shape(32, 4096, 32), "model.num_kv_heads=8", "model.vocab_size=131072",
    "model.tie_embeddings=false", "model.position=rope", *DROPS,
    "train.seq_len=8192", "precision.dtype=bf16", "parallel.zero=1", "train.global_batch_size=8",
)  # fmt: skip
SEVEN_AND_A_HALF = (*GPT, *shape(36, 4096, 32), "train.global_batch_size=64")
ZERO_BUBBLE = {  # Qi et al. 2024, table 3: model, ranks, samples of a microbatch, layers of stages
    "1.5B": (shape(22, 2304, 24), 8, 6, [2, *[3] * 6, 2]),
    "6.2B": (shape(30, 4096, 32), 8, 3, [3, *[4] * 6, 3]),
    "14.6B": (shape(46, 5120, 40), 16, 1, [2, *[3] * 14, 2]),
    "28.3B": (shape(62, 6144, 48), 32, 1, [1, *[2] * 30, 1]),
}


def ranks(world: int, practice: Practice, *overrides: str) -> tuple[RankMemory, ...]:
    """What the planner says of a run."""
    config = resolve(load(None, overrides), world)
    return memory_by_rank(config, Layout.of(config.parallel, world), practice)


def state(rank: RankMemory) -> float:
    return rank.params + rank.grads + rank.optimizer


def activations(rank: RankMemory) -> float:
    return rank.activations


def korthikanti(name: str, *overrides: str) -> RankMemory:
    world = {"22B": 8, "175B": 64, "530B": 280, "1T": 512}[name]
    return ranks(world, OLD, *MODELS[name], *overrides)[0]


def share(name: str, *overrides: str) -> float:
    """Activations in per cent of those with tp alone."""
    return 100 * activations(korthikanti(name, *overrides)) / activations(korthikanti(name))


def zero_bubble(name: str, kind: str) -> float:
    model, pp, micro, layers = ZERO_BUBBLE[name]
    cut = (f"parallel.pp={pp}", f"parallel.stage_layers={layers}", f"parallel.schedule={kind}")
    batch = (f"train.micro_batch_size={micro}", f"train.global_batch_size={micro * 4 * pp}", "train.seq_len=1024")
    found = ranks(pp, OLD, *GPT, *model, "model.vocab_size=50304", *cut, *batch)
    return max(rank.allocated for rank in found) / GIB


def zero(stage: int) -> float:
    return state(ranks(64, BARE, *SEVEN_AND_A_HALF, f"parallel.zero={stage}")[0]) / GB


def predictions() -> dict[str, Callable[[], float]]:
    """What each row's value is to be compared with."""
    found: dict[str, Callable[[], float]] = {f"M00{19 + stage}": partial(zero, stage) for stage in range(4)}
    for number, name in zip(range(27, 37, 3), MODELS):
        found[f"M00{number}"] = partial(of_korthikanti, state, name)
        found[f"M00{number + 1}"] = partial(of_korthikanti, activations, name)
        found[f"M00{number + 2}"] = partial(of_korthikanti, activations, name, *SHARDED, SELECTIVE)
    modes = (SHARDED, (SELECTIVE,), (*SHARDED, SELECTIVE), ("parallel.recompute=full",))
    for first, name in ((39, "22B"), (43, "175B"), (47, "530B")):
        found |= {f"M00{number}": partial(share, name, *mode) for number, mode in enumerate(modes, first)}
    pipeline = (*GPT3_7B, *interleaved(4, 8, 8), f"parallel.stage_layers={[1] * 32}")
    tensor = (*GPT3_7B, "parallel.tp=4", "train.micro_batch_size=2")
    found["M0068"] = lambda: state(ranks(8, NEW, *pipeline)[-1]) / GB
    found["M0069"] = lambda: ranks(8, NEW, *pipeline)[-1].allocated / GB
    found["M0070"] = lambda: state(ranks(8, NEW, *tensor)[0]) / GB
    found["M0071"] = lambda: ranks(8, NEW, *tensor)[0].allocated / GB
    return found


def of_korthikanti(part: Callable[[RankMemory], float], name: str, *overrides: str) -> float:
    return part(korthikanti(name, *overrides)) / GIB


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    add_reference(parser)
    table = parser.parse_args(argv).reference / "memory.csv"
    if is_missing(table):
        return 2
    rows = {row["id"]: row for row in read(table)}
    errors = []
    for number, predict in sorted(predictions().items()):
        row, said = rows[number], predict()
        errors.append(said / float(row["value"]) - 1)
        print(f"{number}  {row['quantity'][:58]:58s} {row['config'][:30]:30s} {float(row['value']):8.2f} {said:8.2f} "
              f"{row['unit']:4s} {errors[-1]:+7.1%}")  # fmt: skip
    for name, published in zip(ZERO_BUBBLE, ((30, 59), (39, 70), (32, 51), (43, 74))):
        said_by = [zero_bubble(name, kind) for kind in ("1f1b", "zb-h2")]
        errors += [said / value - 1 for said, value in zip(said_by, published)]
        print(f"M0077  peak of 1F1B and ZB-2p, {name:33s} {published}  {said_by[0]:.1f} {said_by[1]:.1f}")
    print(f"{len(errors)} values, median |error| {median(map(abs, errors)):.1%}, worst {max(errors, key=abs):+.1%}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
