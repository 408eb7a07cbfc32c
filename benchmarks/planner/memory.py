"""Predicted memory against published memory: every row of the reference tables that says how much a run took.

    python benchmarks/planner/memory.py [--reference ../shared/reference] [--out TABLE.csv]

A source has one `Practice` for all of its rows: how its software keeps state, attention and loss, as its code and
documents say. Nothing is fitted to a row.
"""

import argparse
import csv
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from types import MappingProxyType

from published import DROPS, GB, GIB, Row, add_reference, config_of, is_missing, of_all, read_layouts

from megacore.cost.memory import memory_by_rank
from megacore.cost.practice import Practice


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
MEMORY_GIB = MappingProxyType({"A100-80": 79.3, "A800": 79.3, "H100": 79.1, "H100-96": 94.5, "B200": 178.0})


def compare(folder: Path) -> tuple[list[dict[str, object]], list[str]]:
    """A line for each row that speaks of memory, and why others were left out."""
    return of_all((row for row in read_layouts(folder) if row["peak_mem_gb"] or "OOM" in row["status"]), line_of)


def line_of(row: Row) -> dict[str, object]:
    """Predicted beside published. Raises ValueError where a row says too little."""
    source = next(source for source in SOURCES if source.has(row))
    config, layout = config_of(row, source.overrides)
    ranks = memory_by_rank(config, layout, source.practice)
    unit = GIB if "GiB" in row["mem_kind"] else source.unit
    predicted = max(getattr(rank, source.measured) for rank in ranks) / unit
    published = float(row["peak_mem_gb"]) if row["peak_mem_gb"] else None
    return {
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


def main(argv: list[str] | None = None) -> int:
    """Print the errors by source, the worst rows, and what ran out of memory but is said to fit."""
    parser = argparse.ArgumentParser(description="predicted memory against published memory")
    add_reference(parser)
    parser.add_argument("--out", type=Path, help="CSV file for all rows")
    arguments = parser.parse_args(argv)
    if is_missing(arguments.reference / "layouts.csv"):
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
