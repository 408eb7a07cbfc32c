"""Predicted memory against published memory: every row of the reference tables that says how much a run took.

    python benchmarks/planner/memory.py [--reference ../shared/reference] [--json OUT.json]

A source has one `Practice` for all of its rows: how that software keeps state, attention and loss, as its code and
documents say. Nothing is fitted to a row.
"""

import argparse
import csv
import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from types import MappingProxyType

from megacore.config.load import load
from megacore.config.resolve import resolve
from megacore.config.schema import RunConfig
from megacore.cost.memory import RankMemory, memory_by_rank
from megacore.cost.practice import Practice
from megacore.layout import Layout

GIB = 1 << 30
Row = Mapping[str, str]


@dataclass(frozen=True)
class Source:
    """How a source's software runs, what it measured, and what its rows leave out."""

    begins: str
    practice: Practice
    measured: str  # allocated, reserved or total
    unit: float = GIB
    overrides: tuple[str, ...] = ()
    model: str = ""

    def has(self, row: Row) -> bool:
        return row["source"].startswith(self.begins) and row["model"].startswith(self.model)


MEGATRON = Practice(grad_bytes=4, logit_bytes=6, waste=0.03, shards_over_cp=True)
OLD_MEGATRON = replace(MEGATRON, attention="explicit")
# buckets of 5e8 elements to sum and to gather; outputs of stages are kept; fp32 gradients of what a rank owns
DEEPSPEED = replace(
    OLD_MEGATRON, grad_bytes=2, optimizer_bytes=16, buffer_gb=2, parcels=2, waste=0.1, context_gb=3.5
)
DEEPSPEED_BF16 = replace(DEEPSPEED, grad_bytes=6, optimizer_bytes=12)
SHARDED = ("parallel.zero=1", "parallel.regather_inputs=true")
SOURCES = (
    # fp32 shards of parameters, gathered in bf16; loss in fp32 beside bf16 logits
    Source(
        "pytorch/torchtitan",
        Practice(
            param_bytes=4, grad_bytes=4, optimizer_bytes=8, unit_grad_bytes=4, shards_over_cp=True, logit_bytes=11,
            selective="matmuls", whole_units=True, waste=0.06,
        ),
        "reserved",
    ),
    # bf16 gradients, an optimizer with less than fp32 state: said for the 70B, the recipe's own for Moonlight
    Source("NVIDIA-NeMo/Megatron-Bridge", replace(MEGATRON, grad_bytes=2, optimizer_bytes=4, fp8_inputs=True),
           "allocated", 1e9, SHARDED, "Llama3-70B"),
    Source("NVIDIA-NeMo/Megatron-Bridge", replace(MEGATRON, grad_bytes=2, optimizer_bytes=8), "allocated", 1e9,
           SHARDED, "Moonlight-16B-A3B"),
    Source("NVIDIA-NeMo/Megatron-Bridge", MEGATRON, "allocated", 1e9, SHARDED),
    Source("InternLM/InternEvo", Practice(grad_bytes=4, optimizer_bytes=16, logit_bytes=10, waste=0.1), "total", 1e9),
    Source("Qi et al. 2024, Zero Bubble", OLD_MEGATRON, "allocated", GIB,
           ("model.dropout=0.1", "model.attention_dropout=0.1")),
    Source("BigScience BLOOM", DEEPSPEED_BF16, "total"),
    Source("bigscience-workshop", DEEPSPEED, "total"),
    Source("MooreThreads/SimuMax", MEGATRON, "allocated", GIB, SHARDED),
)
SCHEDULES = MappingProxyType({
    "ZB-1p": "zb-h1", "ZB-2p": "zb-h2", "ZB-2p*": "zb-h2", "ZB-V": "zb-v", "interleaved-1f1b": "interleaved",
})
KEYS = MappingProxyType({
    "model.num_layers": "layers", "model.hidden_size": "hidden", "model.num_heads": "heads",
    "model.num_kv_heads": "kv_heads", "model.head_dim": "head_dim", "model.ffn_hidden_size": "ffn_hidden",
    "model.vocab_size": "vocab", "model.num_experts": "experts", "model.top_k": "topk",
    "model.moe_ffn_hidden_size": "moe_ffn", "train.seq_len": "seq_len", "parallel.tp": "tp", "parallel.pp": "pp",
    "parallel.cp": "cp", "parallel.ep": "ep", "parallel.dp": "dp",
})
PRESETS = MappingProxyType({"Moonlight-16B-A3B": "moonlight-16b-a3b", "Qwen3-30B-A3B": "qwen3-30b-a3b"})
CAPACITY = MappingProxyType({"A100-80": 80, "A800": 80, "H100": 80, "H100-96": 95, "B200": 180})


def read(folder: Path) -> Iterator[Row]:
    for name in ("layouts.csv", "layouts_sweeps.csv"):
        with (folder / name).open(encoding="utf-8", newline="") as file:
            yield from (row for row in csv.DictReader(file) if row["peak_mem_gb"] or "OOM" in row["status"])


def config_of(row: Row, source: Source) -> tuple[RunConfig, Layout]:
    """The run that a row describes. Raises ValueError (or KeyError) where too little is said."""
    num = {key: int(float(row[column])) for key, column in KEYS.items() if row[column]}
    preset = PRESETS.get(row["model"])
    if preset:
        num = {key: value for key, value in num.items() if not key.startswith("model.")}
    elif row["model"] == "InternLM-20B":  # huggingface.co/internlm/internlm-20b
        shape = {"num_layers": 60, "hidden_size": 5120, "num_heads": 40, "ffn_hidden_size": 13824, "vocab_size": 103168}
        num |= {f"model.{key}": value for key, value in shape.items()}
    elif not num.get("model.num_layers"):
        raise ValueError("the shape of the model is not said")
    given = [f"{key}={value}" for key, value in num.items()]
    if not preset and not row["model"].startswith(("Llama", "llama", "Intern", "deepseek")):
        given += ["model.family=gpt2", f"model.max_positions={row['seq_len']}"]
        if row["tied_emb"] == "0":
            given.append("model.tie_embeddings=false")
    if row["model"].startswith("deepseek"):
        v3 = "v3" in row["model"]
        given += [f"model.kv_lora_rank=512", "model.q_lora_rank=1536", "model.num_dense_layers=1",
                  f"model.num_shared_experts={1 if v3 else 2}", f"model.ffn_hidden_size={18432 if v3 else 12288}"]
    first, _, other = row["micro_batch"].partition("/")
    micro = first or "1"
    if other and row["schedule"].startswith("ZB-2p"):
        micro = str(int(first) // 2)
    dp = num.get("parallel.dp") or int(row["gpus"]) // (num.get("parallel.tp", 1) * num.get("parallel.pp", 1) * num.get("parallel.cp", 1))
    if not row["micro_batch"] and num.get("parallel.pp", 1) > 1:  # torchtitan: as many microbatches as stages
        micro = str(max(1, int(row["global_batch"]) // dp // num["parallel.pp"]))
    samples = int(float(row["global_batch"])) if row["global_batch"] else int(micro) * dp * 64
    given += [f"train.micro_batch_size={micro}", f"train.global_batch_size={samples}"]
    recompute = row["recompute"]
    given.append("parallel.recompute=" + ("full" if recompute.startswith("full") else "selective" if recompute.startswith("selective") else "none"))
    zero = row["zero_fsdp"]
    given.append("parallel.zero=" + ("3" if "3" in zero or "fsdp" in zero else "1" if "1" in zero or "dist" in zero else "0"))
    vpp = int(float(row["vpp"] or 1))
    pp = num.get("parallel.pp", 1)
    schedule = SCHEDULES.get(row["schedule"], "interleaved" if vpp > 1 else "1f1b")
    given.append(f"parallel.schedule={schedule}")
    if vpp > 1:
        given.append(f"parallel.chunks={vpp}")
    given.append("precision.dtype=" + ("fp16" if row["precision"].startswith("fp16") else "bf16"))
    if row["sp"] == "1" and num.get("parallel.tp", 1) > 1:
        given.append("parallel.sequence_parallel=true")
    if not row["dp"]:
        given.append(f"parallel.dp={dp}")
    given += source.overrides
    if "parallel.sequence_parallel=true" not in given:
        given = [each for each in given if "regather" not in each]
    if row["precision"].startswith("fp8"):
        given.append("precision.fp8=current")
    chunks = 2 if schedule == "zb-v" else max(vpp, 1)
    config = load(None, given, preset)
    layers = config.model.num_layers
    stages = pp * chunks
    if "one layer less" in row["notes"] or "embedding" in row["notes"] or (
        "rounded to the stage count" in row["notes"] and (layers + 2) % stages == 0
    ):
        given.append(f"parallel.stage_layers={split(layers, stages)}")
    elif pp > 1 and layers % stages == 0:
        given.append(f"parallel.stage_layers={[layers // stages] * stages}")
    config = load(None, given, preset)
    world = int(row["gpus"])
    config = resolve(config, world)
    return config, Layout.of(config.parallel, world)


def source_of(row: Row) -> Source:
    found = next(source for source in SOURCES if source.has(row))
    if found.practice is DEEPSPEED and row["precision"].startswith("bf16"):
        return replace(found, practice=DEEPSPEED_BF16)
    return found


def split(layers: int, stages: int) -> list[int]:
    """One layer less on the first and the last stage."""
    each, rest = divmod(layers + 2, stages)
    counts = [each + (number < rest) for number in range(stages)]
    counts[0] -= 1
    counts[-1] -= 1
    return counts


def worst(ranks: tuple[RankMemory, ...], measured: str) -> RankMemory:
    return max(ranks, key=lambda rank: getattr(rank, measured))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--reference", type=Path, default=Path("../shared/reference"))
    parser.add_argument("-v", action="store_true")
    a = parser.parse_args(argv)
    errors: dict[str, list[float]] = {}
    for row in read(a.reference):
        source = source_of(row)
        try:
            config, layout = config_of(row, source)
            ranks = memory_by_rank(config, layout, source.practice)
        except (ValueError, KeyError) as e:
            print(row["id"], row["model"], "left out:", str(e)[:100])
            continue
        rank = worst(ranks, source.measured)
        unit = GIB if "GiB" in row["mem_kind"] else source.unit
        said = getattr(rank, source.measured) / unit
        published = float(row["peak_mem_gb"]) if row["peak_mem_gb"] else float("nan")
        error = said / published - 1
        oom = "OOM" in row["status"]
        if published == published:
            errors.setdefault(source.begins, []).append(error)
        fits = rank.total / GIB <= CAPACITY[row["gpu"]] * (1e9/GIB if row["gpu"]!="H100-96" else 1)
        parts = {k: round(v / unit, 1) for k, v in asdict(rank).items() if v}
        print(f"{row['id']:6s} {row['model']:18s} tp{row['tp']} pp{row['pp']}x{row['vpp']} dp{row['dp']} mbs{row['micro_batch']} {row['recompute']:10.10s} {row['schedule']:12.12s} {published:6.1f} {said:6.1f} {error:+7.1%} {'OOM' if oom else ''} {'SAID TO FIT' if fits and oom else ''}", parts if a.v else "")
    for name, each in errors.items():
        print(f"{name:40s} {len(each):4d} rows, median |error| {median(map(abs, each)):.1%}, mean {sum(each) / len(each):+.1%}, worst {max(each, key=abs):+.1%}")
    every = [e for each in errors.values() for e in each]
    print("all", len(every), f"median {median(map(abs, every)):.1%}  90th {sorted(map(abs, every))[int(len(every)*.9)]:.1%}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
