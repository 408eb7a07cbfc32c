"""Bytes and indices against megatron-core itself, where it is installed."""

from pathlib import Path

import numpy as np
import pytest

from megacore.bench.baselines.megatron_core import open_package

torch = pytest.importorskip("torch")
if not open_package():
    pytest.skip("megatron-core is not installed", allow_module_level=True)

from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from megatron.core.datasets import helpers  # noqa: E402
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder  # noqa: E402
from megatron.core.datasets.blended_megatron_dataset_config import (  # noqa: E402
    convert_split_vector_to_split_matrix,
    parse_and_normalize_split,
)
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig  # noqa: E402
from megatron.core.datasets.indexed_dataset import IndexedDataset as OracleDataset  # noqa: E402
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder  # noqa: E402
from megatron.core.datasets.utils import Split  # noqa: E402

from megacore.config.schema import DataConfig  # noqa: E402
from megacore.data.blend import build_megatron_blend, normalised  # noqa: E402
from megacore.data.indexed import IndexedDataset, IndexedWriter, merge  # noqa: E402
from megacore.data.megatron_index import MegatronPlan, build_megatron_index  # noqa: E402
from megacore.data.splits import split_bounds  # noqa: E402
from megacore.data.stream import SampleStream  # noqa: E402


class Tokenizer:
    """What the oracle asks of one."""

    vocab_size, eod, pad = 60000, 0, -1
    unique_identifiers = {"class": "test"}


def oracle_config(blend: tuple, split: str, seq_len: int, seed: int, cache: Path) -> GPTDatasetConfig:
    return GPTDatasetConfig(
        random_seed=seed,
        sequence_length=seq_len,
        blend=blend,
        split=split,
        path_to_cache=str(cache),
        tokenizer=Tokenizer(),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
        mid_level_dataset_surplus=0.005,
    )


def oracle_dataset(prefix: str, first: int, last: int, num_samples: int | None, seq_len: int, seed: int, cache: Path):
    config = oracle_config(([prefix], None), "1,0,0", seq_len, seed, cache)
    documents = np.arange(first, last, dtype=np.int32)
    return GPTDataset(OracleDataset(prefix), prefix, documents, num_samples, Split.train, config)


def random_documents(rng: np.random.Generator, num: int, longest: int) -> list[list[int]]:
    return [rng.integers(1, 60000, rng.integers(0, longest + 1)).tolist() for _ in range(num)]


def oracle_write(prefix: str, documents: list[list[int]], dtype: type) -> None:
    builder = IndexedDatasetBuilder(prefix + ".bin", dtype=dtype)
    for document in documents:
        if document:
            builder.add_item(torch.tensor(document))
        builder.end_document()
    builder.finalize(prefix + ".idx")


def read(prefix: str) -> tuple[bytes, bytes]:
    return Path(prefix + ".bin").read_bytes(), Path(prefix + ".idx").read_bytes()


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.int64])
def test_bytes_both_ways(tmp_path: Path, dtype: type) -> None:
    rng = np.random.default_rng(1)
    documents = random_documents(rng, 200, 20)
    ours, theirs = str(tmp_path / "ours"), str(tmp_path / "theirs")
    with IndexedWriter(ours, dtype) as writer:
        for document in documents:
            writer.add_document(np.array(document, np.int64))
    oracle_write(theirs, documents, dtype)
    assert read(ours) == read(theirs)
    oracle, own = OracleDataset(ours), IndexedDataset(theirs)
    assert np.array_equal(oracle.document_indices, own.bounds)
    for sequence in range(len(own)):
        assert np.array_equal(oracle[sequence], own[sequence])


def test_merged_bytes(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    parts = [str(tmp_path / f"part{i}") for i in range(3)]
    for part in parts:
        oracle_write(part, random_documents(rng, 30, 9), np.int32)
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=np.int32)
    for part in parts:
        builder.add_index(part)
    builder.finalize(str(tmp_path / "theirs.idx"))
    merge(parts, tmp_path / "ours")
    assert read(str(tmp_path / "ours")) == read(str(tmp_path / "theirs"))


def test_modes(tmp_path: Path) -> None:
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=np.int32, multimodal=True)
    with IndexedWriter(tmp_path / "ours", np.int32, with_modes=True) as writer:
        for tokens, mode in (([1, 2], 0), ([3], 1)):
            builder.add_item(torch.tensor(tokens), mode)
            builder.end_document()
            writer.add_sequence(tokens, mode)
            writer.end_document()
    builder.finalize(str(tmp_path / "theirs.idx"))
    assert read(str(tmp_path / "ours")) == read(str(tmp_path / "theirs"))


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 1000), min_size=3, max_size=3).filter(any), st.integers(1, 5000))
def test_splits(shares: list[int], num_sequences: int) -> None:
    matrix = convert_split_vector_to_split_matrix(parse_and_normalize_split(",".join(map(str, shares))))
    ours = split_bounds(shares, num_sequences)
    for bookend, (first, last) in zip(matrix, ours, strict=True):
        if bookend is None:
            assert first == last
        else:
            assert (first, last) == tuple(int(round(bound * float(num_sequences))) for bound in bookend)


CASES = [  # sequences, longest, seq_len, samples wanted
    (50, 30, 16, 20),
    (50, 30, 16, None),
    (50, 30, 16, 47),
    (50, 30, 16, 60),
    (50, 30, 16, 90),
    (50, 30, 16, 140),
    (7, 3, 16, 40),
    (1, 3000, 16, 400),
    (300, 2, 5, 700),
]


@pytest.mark.parametrize("num, longest, seq_len, wanted", CASES)
def test_index(tmp_path: Path, num: int, longest: int, seq_len: int, wanted: int | None) -> None:
    rng = np.random.default_rng(num * seq_len)
    prefix = str(tmp_path / "d")
    with IndexedWriter(prefix, np.uint16) as writer:
        for document in random_documents(rng, num, longest):
            writer.add_sequence(np.array(document, np.int64))  # empty ones too: they are sequences of length 0
            writer.end_document()
    data = IndexedDataset(prefix)
    first, last = (0, num) if num < 10 else (3, num - 5)
    oracle = oracle_dataset(prefix, first, last, wanted, seq_len, 1234, tmp_path / "cache")
    plan = MegatronPlan.make(int(data.lengths[first:last].sum()), seq_len, wanted)
    arrays = build_megatron_index(data.lengths, first, last, plan, 1234)
    assert len(oracle) == plan.num_samples
    for name in ("document_index", "sample_index", "shuffle_index"):
        theirs, ours = getattr(oracle, name), arrays[name]
        assert ours.dtype == theirs.dtype and np.array_equal(ours, theirs), name


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.floats(0.01, 5), min_size=1, max_size=6), st.integers(1, 300))
def test_blend(weights: list[float], num_samples: int) -> None:
    arrays = build_megatron_blend(weights, num_samples)
    size = len(arrays["datasets"])
    datasets, samples = np.zeros(size, np.int16), np.zeros(size, np.int64)
    helpers.build_blending_indices(datasets, samples, normalised(normalised(weights)), len(weights), size, False)
    assert np.array_equal(arrays["datasets"], datasets) and np.array_equal(arrays["samples"], samples)


def test_samples_of_a_run(tmp_path: Path) -> None:
    """A whole run through SampleStream meets the oracle's samples, masks of EOD boundaries included."""
    rng = np.random.default_rng(5)
    prefix = str(tmp_path / "d")
    documents = [[*document, 0] for document in random_documents(rng, 80, 25)]
    oracle_write(prefix, documents, np.uint16)
    oracle = oracle_dataset(prefix, 0, 80, 100, 32, 7, tmp_path / "cache")
    oracle.config.reset_position_ids, oracle.masks_and_position_ids_are_cacheable = True, False
    config = DataConfig(blend=((1.0, prefix),), split=(1.0,), index="megatron", reset_positions=True)
    stream = SampleStream(config, seq_len=32, seed=7, num_samples=100, eod=0)
    for ordinal in range(100):
        ours, theirs = stream.microbatch(ordinal, 1), oracle[ordinal]
        assert np.array_equal(ours.tokens[0], theirs["tokens"].numpy())
        assert np.array_equal(ours.labels[0], theirs["labels"].numpy())
        assert ours.positions is not None
        assert np.array_equal(ours.positions[0], theirs["position_ids"].numpy())


@pytest.mark.parametrize("weights", [None, (0.7, 0.2, 0.1), (3.0, 3.0, 1.0)])
def test_blended_run(tmp_path: Path, weights: tuple[float, ...] | None) -> None:
    """Training and validation of a run as Megatron's own builder makes them, sample for sample."""
    rng = np.random.default_rng(6)
    prefixes = [str(tmp_path / name) for name in ("a", "b", "c")][: 1 if weights is None else 3]
    for prefix in prefixes:
        oracle_write(prefix, random_documents(rng, 90, 25), np.uint16)
    config = oracle_config((prefixes, weights and list(weights)), "90,10,0", 32, 11, tmp_path / "cache")
    sizes = [150, 40, 0]
    train, valid, _ = BlendedMegatronDatasetBuilder(GPTDataset, sizes, lambda: True, config).build()
    blend = tuple(zip(weights or (1.0,), prefixes, strict=True))
    ours = DataConfig(blend=blend, split=(90.0, 10.0, 0.0), index="megatron")
    for name, oracle, size in (("train", train, 150), ("valid", valid, 40)):
        stream = SampleStream(ours, seq_len=32, seed=11, num_samples=size, split=name)
        for ordinal in range(size):
            assert np.array_equal(stream.microbatch(ordinal, 1).tokens[0], oracle[ordinal]["tokens"].numpy())
