"""Building sample indices: ours against megatron-core's, on the same files, taking turns in one run.

Each side starts from a closed data set and ends with its indices on disk, as at the start of a run: `megatron` builds
the very same arrays as megatron-core, `megacore` our own order. `arrays` leaves out opening, fingerprint and files.
"""

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from megacore.bench.baselines.megatron_core import open_package
from megacore.bench.harness import Comparison, alternate, comparison
from megacore.config.schema import DataConfig
from megacore.data import native
from megacore.data.indexed import IndexedDataset, IndexedWriter
from megacore.data.megatron_index import MegatronPlan, build_megatron_index
from megacore.data.stream import SampleStream

SEED = 1234
BASELINE = "megatron-core"


@dataclass(frozen=True)
class Case:
    """A corpus and what is asked of it."""

    name: str
    num_documents: int
    longest: int  # lengths are uniform from 1
    seq_len: int
    epochs: float


CASES = (
    Case("a million short documents", 1_000_000, 60, 1024, 1.0),
    Case("three epochs of web pages", 200_000, 2000, 2048, 2.7),
    Case("one huge document", 1, 100_000_000, 2048, 1.0),
)


def write_corpus(prefix: Path, case: Case) -> int:
    """Write a data set of zeros with the case's lengths; returns its tokens."""
    random = np.random.default_rng(SEED)
    whole = case.num_documents == 1
    lengths = np.array([case.longest]) if whole else random.integers(1, case.longest + 1, case.num_documents)
    with IndexedWriter(prefix, "uint16") as writer:
        for part in np.array_split(lengths, max(1, case.num_documents // 10_000)):
            writer.add_documents(np.zeros(int(part.sum()), np.uint16), part)
    return int(lengths.sum())


def oracle_build(prefix: str, case: Case, num_samples: int, folder: Path) -> Callable[[], object]:
    """megatron-core's GPTDataset over the whole data set."""
    gpt = import_module("megatron.core.datasets.gpt_dataset")
    indexed = import_module("megatron.core.datasets.indexed_dataset")
    split = import_module("megatron.core.datasets.utils").Split.train
    tokenizer = SimpleNamespace(vocab_size=50000, eod=0, pad=-1, unique_identifiers={})
    config = gpt.GPTDatasetConfig(
        random_seed=SEED,
        sequence_length=case.seq_len,
        blend=([prefix], None),
        split="1,0,0",
        path_to_cache=str(folder),
        tokenizer=tokenizer,
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )

    def build() -> object:
        dataset = indexed.IndexedDataset(prefix)
        documents = np.arange(case.num_documents, dtype=np.int32)
        return gpt.GPTDataset(dataset, prefix, documents, num_samples, split, config)

    return build


def our_build(prefix: str, order: str, case: Case, num_samples: int, folder: Path) -> Callable[[], object]:
    """Our stream, opened with its indices built."""
    config = DataConfig(blend=((1.0, prefix),), split=(1.0,), index=order, cache=str(folder))

    def build() -> object:
        stream = SampleStream(config, seq_len=case.seq_len, seed=SEED, num_samples=num_samples)
        stream.build()
        return stream

    return build


def measure(case: Case, rounds: int) -> Comparison:
    """One case: all sides in turn.

    Raises:
        ValueError: megatron-core is not installed, so there is nothing to compare with.
    """
    if not open_package():
        fix = "pip install --no-deps --ignore-requires-python megatron-core==0.19.2"
        raise ValueError(f"megatron-core is not installed, and it is what this benchmark compares with; {fix}")
    with tempfile.TemporaryDirectory(prefix="megacore-bench-") as name:
        folder, caches = Path(name), Path(name) / "caches"
        prefix = str(folder / "data")
        tokens = write_corpus(folder / "data", case)
        num_samples = int(tokens * case.epochs) // case.seq_len - 1
        dataset = IndexedDataset(prefix)
        plan = MegatronPlan.make(tokens, case.seq_len, num_samples)
        sides = {
            "megacore": our_build(prefix, "megacore", case, num_samples, caches / "own"),
            "megatron": our_build(prefix, "megatron", case, num_samples, caches / "same"),
            "arrays": lambda: build_megatron_index(dataset.lengths, 0, len(dataset), plan, SEED),
            BASELINE: oracle_build(prefix, case, num_samples, caches / "oracle"),
        }
        seconds = alternate(sides, rounds, warmup=1, before=lambda: shutil.rmtree(caches, ignore_errors=True))
    settings = {"documents": case.num_documents, "tokens": tokens, "samples": num_samples, "loops": native.REASON}
    return comparison(f"indices: {case.name}", "megacore", seconds, settings)
