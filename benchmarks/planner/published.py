"""Tables of published runs: how they are read, and which run a row of them describes.

They are no part of this repository: commands look for them in ``--reference``.
"""

import argparse
import csv
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TypeVar

from megacore.config.load import load
from megacore.config.resolve import resolve
from megacore.config.schema import RunConfig
from megacore.layout import Layout

GIB, GB = float(1 << 30), 1e9
Row = Mapping[str, str]
T = TypeVar("T")
FILES = ("layouts.csv", "layouts_sweeps.csv")
"""The tables of layouts."""
DROPS = ("model.dropout=0.1", "model.attention_dropout=0.1")
"""Of the models of sources that follow GPT-2."""
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


def add_reference(parser: argparse.ArgumentParser) -> None:
    """The option that says where the tables are."""
    parser.add_argument("--reference", type=Path, default=Path("../shared/reference"))


def is_missing(path: Path) -> bool:
    """Whether a table is not there, which is then said."""
    if not path.is_file():
        print(f"there is no {path}; give --reference", file=sys.stderr)
    return not path.is_file()


def read(path: Path) -> Iterator[Row]:
    """The rows of one table."""
    with path.open(encoding="utf-8", newline="") as file:
        yield from csv.DictReader(file)


def read_layouts(folder: Path) -> Iterator[Row]:
    """All rows of the tables of layouts."""
    for name in FILES:
        yield from read(folder / name)


def named(row: Row) -> str:
    """A row of a table of layouts, in messages."""
    return f"{row['id']} {row['model']}"


def of_all(
    rows: Iterable[Row], make: Callable[[Row], T], name: Callable[[Row], str] = named
) -> tuple[list[T], list[str]]:
    """What is made of each row, and why others are left out: those of which ``make`` raises ValueError."""
    made: list[T] = []
    left: list[str] = []
    for row in rows:
        try:
            made.append(make(row))
        except ValueError as error:
            left.append(f"{name(row)}: {error}")
    return made, left


def config_of(row: Row, overrides: Sequence[str]) -> tuple[RunConfig, Layout]:
    """The run that a row describes, with what the row leaves out. Raises ValueError where too little is said."""
    numbers = {key: int(float(row[column])) for key, column in KEYS.items() if row[column]}
    preset, shape = PRESETS.get(row["model"]), SHAPES.get(row["model"], ())
    if preset:
        numbers = {key: number for key, number in numbers.items() if not key.startswith("model.")}
    elif "model.num_layers" not in numbers and not shape:
        raise ValueError("the shape of the model is not said")
    given = [f"{key}={number}" for key, number in numbers.items()]
    given += [*shape, *_family(row, bool(preset or shape)), *_practised(row), *overrides]
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


def micro_batch(row: Row) -> int:
    """That a row says. Where ZB-2p had half of the others', it stands behind a stroke."""
    first, _, half = row["micro_batch"].partition("/")
    return int(first) // 2 if half and row["schedule"].startswith("ZB-2p") else int(first)


def _micro_batch(row: Row, dp: int, pp: int) -> int:
    """Where none is said: torchtitan cuts a batch into pp microbatches."""
    if not row["micro_batch"]:
        return max(1, int(row["global_batch"]) // dp // pp) if pp > 1 and row["global_batch"] else 1
    return micro_batch(row)


def _stage_layers(row: Row, config: RunConfig) -> list[int]:
    """As many on each stage, or one less on the first and the last; empty where they are cut as the engine does it."""
    layers, stages, notes = config.model.num_layers, config.parallel.pp * config.parallel.chunks, row["notes"]
    as_layers = "one layer less" in notes or "embedding" in notes
    if as_layers or ("rounded to the stage count" in notes and (layers + 2) % stages == 0):
        each, rest = divmod(layers + 2, stages)
        counts = [each + (number < rest) for number in range(stages)]
        return [counts[0] - 1, *counts[1:-1], counts[-1] - 1]
    return [layers // stages] * stages if config.parallel.pp > 1 and layers % stages == 0 else []
