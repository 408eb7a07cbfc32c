"""Predicted memory against published memory: every row of the reference tables that says how much a run took.

    python benchmarks/planner/memory.py [--reference ../shared/reference] [--out TABLE.csv]

A source has one `Practice` for all of its rows: how its software keeps state, attention and loss, as its code and
documents say. Nothing is fitted to a row.
"""

import argparse
import csv
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from types import MappingProxyType

from megacore.config.load import load
from megacore.config.resolve import resolve
from megacore.config.schema import RunConfig
from megacore.cost.memory import memory_by_rank
from megacore.cost.practice import Practice
from megacore.layout import Layout

GIB, GB = float(1 << 30), 1e9
Row = Mapping[str, str]


@dataclass(frozen=True)
class Source:
    """How a source's software runs, what it measured (allocated, reserved, or total: all that the driver counts) and in
    which unit, and what its rows leave out."""

    begins: str
    practice: Practice
    measured: str
    unit: float = GIB
    overrides: tuple[str, ...] = ()
    model: str = ""
    precision: str = ""

    def has(self, row: Row) -> bool:
        """Whether a row is of this source."""
        pairs = ((row["source"], self.begins), (row["model"], self.model), (row["precision"], self.precision))
        return all(text.startswith(beginning) for text, beginning in pairs)


MEGATRON = Practice(grad_bytes=4, logit_bytes=6, waste=0.03, shards_over_cp=True)
OLD_MEGATRON = replace(MEGATRON, attention="explicit")
# fp32 shards of parameters, gathered in bf16; with a pipeline whole ones stay; the loss in fp32 beside bf16 logits
TORCHTITAN = Practice(
    param_bytes=4, grad_bytes=4, optimizer_bytes=8, unit_grad_bytes=4, shards_over_cp=True, logit_bytes=11,
    selective="matmuls", whole_units=True, waste=0.06,
)  # fmt: skip
# buckets of 5e8 elements to sum and to gather; outputs of stages are kept; fp32 gradients of what a rank owns
DEEPSPEED = replace(OLD_MEGATRON, grad_bytes=2, optimizer_bytes=16, buffer_gb=2, parcels=2, waste=0.1, context_gb=3.5)
# its gradients, and so its buckets, are in fp32 beside bf16
DEEPSPEED_BF16 = replace(DEEPSPEED, grad_bytes=6, optimizer_bytes=12, buffer_gb=4)
BRIDGE, BIGSCIENCE = "NVIDIA-NeMo/Megatron-Bridge", "bigscience-workshop"
SHARDED = ("parallel.zero=1", "parallel.regather_inputs=true")
DROPS = ("model.dropout=0.1", "model.attention_dropout=0.1")
SOURCES = (  # the first that has a row counts
    Source("pytorch/torchtitan", TORCHTITAN, "reserved"),
    # bf16 gradients, and less than fp32 state: said for the 70B, the recipe's own for Moonlight
    Source(
        BRIDGE,
        replace(MEGATRON, grad_bytes=2, optimizer_bytes=4, fp8_inputs=True),
        "allocated", GB, SHARDED, "Llama3-70B",
    ),
    Source(BRIDGE, replace(MEGATRON, grad_bytes=2, optimizer_bytes=8), "allocated", GB, SHARDED, "Moonlight"),
    Source(BRIDGE, MEGATRON, "allocated", GB, SHARDED),
    Source("InternLM/InternEvo", Practice(grad_bytes=4, optimizer_bytes=16, logit_bytes=10, waste=0.1), "total", GB),
    Source("Qi et al. 2024, Zero Bubble", OLD_MEGATRON, "allocated", GIB, DROPS),
    Source("BigScience BLOOM", DEEPSPEED_BF16, "total"),
    Source(BIGSCIENCE, DEEPSPEED_BF16, "total", precision="bf16"),
    Source(BIGSCIENCE, DEEPSPEED, "total"),
    Source("MooreThreads/SimuMax", MEGATRON, "allocated", GIB, SHARDED),
)  # fmt: skip
KINDS = MappingProxyType(
    {"ZB-1p": "zb-h1", "ZB-2p": "zb-h2", "ZB-2p*": "zb-h2", "ZB-V": "zb-v", "interleaved-1f1b": "interleaved"}
)
KEYS = MappingProxyType(
    {
        "model.num_layers": "layers",
        "model.hidden_size": "hidden",
        "model.num_heads": "heads",
        "model.num_kv_heads": "kv_heads",
        "model.head_dim": "head_dim",
        "model.ffn_hidden_size": "ffn_hidden",
        "model.vocab_size": "vocab",
        "model.num_experts": "experts",
        "model.top_k": "topk",
        "model.moe_ffn_hidden_size": "moe_ffn",
        "train.seq_len": "seq_len",
        "parallel.tp": "tp",
        "parallel.pp": "pp",
        "parallel.cp": "cp",
        "parallel.ep": "ep",
        "parallel.dp": "dp",
    }
)
PRESETS = MappingProxyType(
    {
        "Moonlight-16B-A3B": "moonlight-16b-a3b",
        "Qwen3-30B-A3B": "qwen3-30b-a3b",
        "Qwen3-235B-A22B": "qwen3-235b-a22b",
        "DeepSeek-V3": "deepseek-v3",
    }
)
LATENT = ("model.kv_lora_rank=512", "model.q_lora_rank=1536", "model.num_dense_layers=1")
SHAPES = MappingProxyType(  # what rows do not say of published models
    {
        "InternLM-20B": (
            "model.num_layers=60", "model.hidden_size=5120", "model.num_heads=40", "model.ffn_hidden_size=13824",
            "model.vocab_size=103168",
        ),
        "GPT-OSS-120B": (  # every second layer sees 128 tokens
            "model.activation=swiglu", "model.position=rope", "model.norm=rmsnorm", "model.sliding_window=128",
            "model.full_attention_every=2", "model.tie_embeddings=false",
        ),
        "deepseekv2-l4": (*LATENT, "model.num_shared_experts=2", "model.ffn_hidden_size=12288"),
        "deepseekv3-l4": (*LATENT, "model.num_shared_experts=1", "model.ffn_hidden_size=18432"),
    }
)  # fmt: skip
MEMORY_GIB = MappingProxyType({"A100-80": 79.3, "A800": 79.3, "H100": 79.1, "H100-96": 94.5, "B200": 178.0})


def read(folder: Path) -> Iterator[Row]:
    """The rows that speak of memory."""
    for name in ("layouts.csv", "layouts_sweeps.csv"):
        with (folder / name).open(encoding="utf-8", newline="") as file:
            yield from (row for row in csv.DictReader(file) if row["peak_mem_gb"] or "OOM" in row["status"])


def config_of(row: Row, source: Source) -> tuple[RunConfig, Layout]:
    """The run that a row describes. Raises ValueError where too little is said."""
    numbers = {key: int(float(row[column])) for key, column in KEYS.items() if row[column]}
    preset, shape = PRESETS.get(row["model"]), SHAPES.get(row["model"], ())
    if preset:
        numbers = {key: number for key, number in numbers.items() if not key.startswith("model.")}
    elif "model.num_layers" not in numbers and not shape:
        raise ValueError("the shape of the model is not said")
    given = [f"{key}={number}" for key, number in numbers.items()]
    given += [*shape, *_family(row, bool(preset or shape)), *_practised(row), *source.overrides]
    if "parallel.sequence_parallel=true" not in given:
        given = [each for each in given if "regather" not in each]
    ranks = [numbers.get(f"parallel.{axis}", 1) for axis in ("tp", "pp", "cp")]
    world = int(row["gpus"])
    dp = numbers.get("parallel.dp") or world // (ranks[0] * ranks[1] * ranks[2])
    micro = _micro_batch(row, dp, ranks[1])
    samples = int(float(row["global_batch"])) if row["global_batch"] else micro * dp * 64
    given += [f"parallel.dp={dp}", f"train.micro_batch_size={micro}", f"train.global_batch_size={samples}"]
    config = resolve(load(None, given, preset), world)
    if layers := _stage_layers(row, config):
        config = resolve(load(None, [*given, f"parallel.stage_layers={layers}"], preset), world)
    return config, Layout.of(config.parallel, world)


def _family(row: Row, known: bool) -> list[str]:
    if known or row["model"].startswith(("Llama", "llama", "Intern", "deepseek")):
        return []
    untied = ["model.tie_embeddings=false"] if row["tied_emb"] == "0" else []
    return ["model.family=gpt2", f"model.max_positions={row['seq_len']}", *untied]


def _practised(row: Row) -> list[str]:
    """Schedule, recomputation, sharding and format."""
    recompute, zero, chunks = row["recompute"], row["zero_fsdp"], int(float(row["vpp"] or 1))
    mode = next((mode for mode in ("full", "selective") if recompute.startswith(mode)), "none")
    stage = 3 if "3" in zero or "fsdp" in zero else 1 if "1" in zero or "dist" in zero else 0
    kind = KINDS.get(row["schedule"], "interleaved" if chunks > 1 else "1f1b")
    given = [f"parallel.recompute={mode}", f"parallel.zero={stage}", f"parallel.schedule={kind}"]
    given += [f"parallel.chunks={chunks}"] * (chunks > 1)
    given += ["parallel.sequence_parallel=true"] * (row["sp"] == "1" and int(row["tp"] or 1) > 1)
    given += ["precision.fp8=current"] * row["precision"].startswith("fp8")
    return [*given, "precision.dtype=" + ("fp16" if row["precision"].startswith("fp16") else "bf16")]


def _micro_batch(row: Row, dp: int, pp: int) -> int:
    """Where ZB-2p had half of the others', it stands behind a stroke; torchtitan cuts a batch into pp microbatches."""
    if not row["micro_batch"]:
        return max(1, int(row["global_batch"]) // dp // pp) if pp > 1 and row["global_batch"] else 1
    first, _, half = row["micro_batch"].partition("/")
    return int(first) // 2 if half and row["schedule"].startswith("ZB-2p") else int(first)


def _stage_layers(row: Row, config: RunConfig) -> list[int]:
    """As many on each stage, or one less on the first and the last; empty where they are cut as the engine does it."""
    layers, stages, notes = config.model.num_layers, config.parallel.pp * config.parallel.chunks, row["notes"]
    as_layers = "one layer less" in notes or "embedding" in notes
    if as_layers or ("rounded to the stage count" in notes and (layers + 2) % stages == 0):
        each, rest = divmod(layers + 2, stages)
        counts = [each + (number < rest) for number in range(stages)]
        return [counts[0] - 1, *counts[1:-1], counts[-1] - 1]
    return [layers // stages] * stages if config.parallel.pp > 1 and layers % stages == 0 else []


def compare(folder: Path) -> tuple[list[dict[str, object]], list[str]]:
    """A line for each row, and why others were left out."""
    lines: list[dict[str, object]] = []
    left: list[str] = []
    for row in read(folder):
        source = next(source for source in SOURCES if source.has(row))
        try:
            config, layout = config_of(row, source)
            ranks = memory_by_rank(config, layout, source.practice)
        except ValueError as error:
            left.append(f"{row['id']} {row['model']}: {error}")
            continue
        unit = GIB if "GiB" in row["mem_kind"] else source.unit
        predicted = max(getattr(rank, source.measured) for rank in ranks) / unit
        published = float(row["peak_mem_gb"]) if row["peak_mem_gb"] else None
        lines.append(
            {
                "id": row["id"],
                "source": source.begins,
                "model": row["model"],
                "layout": layout.describe(),
                "published": published,
                "predicted": round(predicted, 2),
                "error": None if published is None else round(predicted / published - 1, 4),
                "status": row["status"],
                "fits": max(rank.total for rank in ranks) / GIB <= MEMORY_GIB[row["gpu"]],
            }
        )
    return lines, left


def main(argv: list[str] | None = None) -> int:
    """Print the errors by source, the worst rows, and what ran out of memory but is said to fit."""
    parser = argparse.ArgumentParser(description="predicted memory against published memory")
    parser.add_argument("--reference", type=Path, default=Path("../shared/reference"))
    parser.add_argument("--out", type=Path, help="CSV file for all rows")
    arguments = parser.parse_args(argv)
    if not (arguments.reference / "layouts.csv").is_file():
        print(f"there is no {arguments.reference / 'layouts.csv'}; give --reference", file=sys.stderr)
        return 2
    lines, left = compare(arguments.reference)
    if arguments.out:
        with arguments.out.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(lines[0]))
            writer.writeheader()
            writer.writerows(lines)
    by_source: dict[str, list[float]] = {}
    for line in lines:
        if isinstance(line["error"], float):
            by_source.setdefault(str(line["source"]), []).append(line["error"])
    for name, errors in (*by_source.items(), ("all", [error for each in by_source.values() for error in each])):
        sizes = sorted(map(abs, errors))
        print(
            f"{name:32s} {len(errors):4d} rows: median |error| {median(sizes):5.1%}, 90th percentile "
            f"{sizes[int(0.9 * (len(sizes) - 1))]:5.1%}, mean {sum(errors) / len(errors):+6.1%}, "
            f"worst {max(errors, key=abs):+6.1%}"
        )
    out = [line for line in lines if "OOM" in str(line["status"])]
    wrong = [line for line in out if line["fits"]]
    print(f"{len(out)} rows ran out of memory, of which {len(wrong)} are said to fit:")
    for line in wrong:
        print("  ", ", ".join(f"{key} {line[key]}" for key in ("id", "model", "layout", "published", "predicted")))
    print("left out:", *left, sep="\n  ")
    return 0


if __name__ == "__main__":
    sys.exit(main())
