"""Published step times as cases to predict: a run, its layout, the machine and the practice of the software.

A source has one practice for all of its rows: how its software computes and communicates, as its code and documents
say. Where rows leave out the chunks of an interleaved pipeline, they are two where that divides the layers.
"""

import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType

from published import DROPS, Row, config_of, micro_batch, of_all, read_layouts

from megacore.config.schema import RunConfig
from megacore.cost.machine import Machine, find_machine
from megacore.cost.practice import Practice
from megacore.layout import Layout

GPUS = MappingProxyType(
    {
        "A100-40": "a100-40gb",
        "A100-80": "a100-80gb",
        "A800": "a800",
        "H100": "h100",
        "H100-94": "h100-96gb",
        "H100-96": "h100-96gb",
        "H200": "h200",
        "B200": "b200",
        "B300": "b300",
        "GB200": "gb200",
        "GB300": "gb300",
    }
)
# attention and its dropout by operations of their own, gradients summed after the pipeline
MEGATRON_2021 = Practice(attention="explicit", overlap_dp=0.0, p2p_split=True, traffic=1.2)
MEGATRON_2022 = replace(MEGATRON_2021, traffic=1.0)
DEEPSPEED = replace(MEGATRON_2021, p2p_split=False, reduce_bytes=2.0, launches=160.0, traffic=1.0)
ZERO_2021 = replace(DEEPSPEED, launches=30.0)  # parameters are gathered one by one, and waited for
MEGATRON_CORE = Practice(overlap_tp=0.5, overlap_dp=0.9, flash=0.8, launches=25.0)
BRIDGE = Practice(overlap_tp=0.8, overlap_ep=0.5, launches=6.0, passes=8.0)
TORCHTITAN = Practice(flash=0.53, selective="matmuls", whole_units=True, launches=20.0, loss_bytes=30.0)
ASYNC_TP = replace(TORCHTITAN, overlap_tp=0.5)
FOUNDRY = Practice(flash=0.53, traffic=1.6, reduce_bytes=2.0, loss_bytes=30.0)
INTERN = Practice(flash=0.8, traffic=1.2, reduce_bytes=2.0)
SHARDED = ("parallel.zero=1",)


@dataclass(frozen=True)
class Source:
    """A source's name, what its rows say of the software, and settings that they leave out."""

    name: str
    begins: str
    practice: Practice
    overrides: tuple[str, ...] = ()
    says: str = ""
    """What a row's notes must have."""
    network_gb_per_s: float = 0.0
    """Of one GPU, where its nodes are wired otherwise."""


SOURCES = (  # the first that has a row counts
    Source("ZeRO-3 of 2021", "Narayanan", ZERO_2021, DROPS, says="no model parallelism"),
    Source("Narayanan 2021", "Narayanan", MEGATRON_2021, DROPS),
    Source("Korthikanti 2022", "Korthikanti", MEGATRON_2022, DROPS),
    Source("Megatron-Core r0.8", "NVIDIA/Megatron-LM README", MEGATRON_CORE),
    Source("Megatron-LM llama", "NVIDIA/Megatron-LM examples", MEGATRON_CORE, SHARDED),
    Source("Llama 3", "Llama Team", replace(MEGATRON_CORE, whole_units=True)),
    Source("torchtitan, async TP", "pytorch/torchtitan", ASYNC_TP, says="AsyncTP"),
    Source("torchtitan A100", "pytorch/torchtitan docs/performance.md (history, FSDP2", replace(TORCHTITAN, flash=1.0)),
    Source("torchtitan", "pytorch/torchtitan", TORCHTITAN),
    Source("Megatron-Bridge skills", "NVIDIA-NeMo/Megatron-Bridge skills", BRIDGE, SHARDED),
    Source("Megatron-Bridge archive", "NVIDIA-NeMo/Megatron-Bridge docs/performance-summary-archive", BRIDGE, SHARDED),
    Source("Megatron-Bridge", "NVIDIA-NeMo/Megatron-Bridge", BRIDGE, SHARDED),
    Source("NeMo 24.07", "NVIDIA/NeMo", BRIDGE, SHARDED),
    Source("llm-foundry", "mosaicml/llm-foundry", FOUNDRY),
    Source("InternEvo", "InternLM/InternEvo", INTERN, network_gb_per_s=6.0),  # 4 x 100 Gb/s RoCE a node
    Source("Zero Bubble 2024", "Qi et al. 2024", MEGATRON_2022, DROPS),
    Source("LLaMA", "Touvron", MEGATRON_CORE),
    Source("OPT", "Zhang et al. 2022, OPT", replace(MEGATRON_2021, overlap_dp=0.9), DROPS),
    Source("BLOOM", "BigScience BLOOM", DEEPSPEED, DROPS),
    Source("BLOOM prequel", "bigscience-workshop", DEEPSPEED, DROPS),
    Source(
        "vTrain, nodes", "VIA-Research/vTrain (MICRO 2024, arXiv 2312.12391) data/ground_truth_multi", DEEPSPEED, DROPS
    ),
    Source("vTrain, one node", "VIA-Research/vTrain", DEEPSPEED, DROPS),
    Source("SimuMax", "MooreThreads/SimuMax", replace(BRIDGE, overlap_tp=0.0, launches=25.0), SHARDED),
    Source("picotron", "huggingface/picotron", TORCHTITAN),
)


RELEASES = ("Megatron-Bridge", "Megatron-Bridge archive", "Megatron-Bridge skills", "llm-foundry")
"""Sources whose rows stand under the release, or the clusters, that they were measured with."""


@dataclass(frozen=True)
class Case:
    """One published measurement, in seconds of a step."""

    row: Row = field(repr=False, hash=False, compare=False)
    source: Source
    config: RunConfig
    layout: Layout
    machine: Machine
    practice: Practice
    seconds: float

    @property
    def id(self) -> str:
        """The row's."""
        return self.row["id"]

    @property
    def version(self) -> tuple[str, str]:
        """The source, and what its rows say of the software's release or way of running."""
        if self.source.name.startswith("torchtitan"):
            return self.source.name, self.row["notes"]
        told = self.row["locator"] if self.source.name in RELEASES else ""
        return self.source.name, told


def cases(folder: Path) -> tuple[list[Case], list[str]]:
    """All rows that say enough, and why others are left out."""
    return of_all(read_layouts(folder), case_of)


def case_of(row: Row) -> Case:
    """What a row describes. Raises ValueError where it says too little, or what the planner does not price."""
    source = next(
        (each for each in SOURCES if row["source"].startswith(each.begins) and each.says in row["notes"]), None
    )
    if source is None:
        raise ValueError("no practice is known of its source")
    if row["status"] != "ok":
        raise ValueError(f"it did not run: {row['status']}")
    if row["gpu"] not in GPUS:
        raise ValueError(f"{row['gpu']} is no machine of the planner's")
    if row["precision"].upper().startswith("NVFP4"):
        raise ValueError("products in FP4 are not priced")
    if "LoRA" in row["tflops_kind"] + row["notes"]:
        raise ValueError("adapters are not priced")
    said = dict(row)
    if not row["micro_batch"] and "pytorch" not in row["source"]:
        said["micro_batch"] = str(_micro(row))
    if row["recompute"].startswith("full on"):  # a few layers
        said["recompute"] = "none"
    if row["schedule"].startswith("interleaved") and not row["vpp"]:
        said["vpp"] = "2" if int(row["layers"]) % (2 * int(row["pp"])) == 0 else "1"
    if batch := _batch(row):
        said["global_batch"] = str(batch)
    fp8 = ("precision.fp8=current",) if re.match("(mx)?fp8", row["precision"], re.IGNORECASE) else ()
    config, layout = config_of(said, (*source.overrides, *fp8))
    if group := re.search(r"in groups of (\d+)", row["zero_fsdp"]):
        parallel = replace(config.parallel, dp_shard=int(group[1]))
        config, layout = replace(config, parallel=parallel), Layout.of(parallel, layout.world)
    if layout.world != int(row["gpus"]):
        raise ValueError(f"its layout takes {layout.world} ranks, not {row['gpus']}")
    machine = find_machine(GPUS[row["gpu"]])
    if source.network_gb_per_s:
        machine = replace(machine, network=replace(machine.network, gb_per_s=source.network_gb_per_s))
    practice = source.practice
    if machine.accelerator.fp8 is None and practice.attention == "fused":
        practice = replace(practice, flash=1.0)  # of Ampere nothing faster than flash attention 2 is known
    return Case(row, source, config, layout, machine, practice, _seconds(row, config))


def _micro(row: Row) -> int:
    """Where it is not said: one sample in a pipeline, else a rank's samples at once, but at most four unless under
    FSDP."""
    own = max(1, round(float(row["global_batch"] or 1) / float(row["dp"] or row["gpus"])))
    if int(row["pp"] or 1) > 1:
        return 1
    return own if "fsdp" in row["zero_fsdp"] or own < 4 else next(each for each in (4, 3, 2, 1) if own % each == 0)


def _batch(row: Row) -> int:
    """Samples of a step where only the number of microbatches is said."""
    told = re.search(r"(\d+) micro-batches", row["notes"])
    if row["global_batch"] or not told or not row["micro_batch"]:
        return 0
    return micro_batch(row) * int(row["dp"] or 1) * int(told[1])


def _seconds(row: Row, config: RunConfig) -> float:
    if row["sec_per_iter"]:
        return float(row["sec_per_iter"])
    if row["d_sec_per_iter"]:
        return float(row["d_sec_per_iter"])
    rate = row["d_tok_s_gpu"] or row["tok_s_gpu"]
    if not rate:
        raise ValueError("neither time nor tokens per second are said")
    return config.train.global_batch_size * config.train.seq_len / float(rate) / int(row["gpus"])
