"""Microbatches: what a run reads, from the config to the arrays, and every refusal."""

import multiprocessing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megacore.config.schema import DataConfig
from megacore.data import fallback, native
from megacore.data.fim import FimTokens
from megacore.data.indexed import IndexedDataset, IndexedWriter, merge
from megacore.data.meta import DataMeta, fingerprint, merge_metas
from megacore.data.sampler import BatchPlan
from megacore.data.stream import SampleStream

EOD = 0


def no_message(text: object) -> None:
    raise AssertionError(text)


def corpus(num: int, longest: int = 30, seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [[*rng.integers(1, 500, rng.integers(0, longest)).tolist(), EOD] for _ in range(num)]


def config_of(*prefixes: str, **more) -> DataConfig:
    return DataConfig(**{"blend": tuple((1.0, prefix) for prefix in prefixes), "split": (1.0,), **more})


def open_stream(config: DataConfig, **more) -> SampleStream:
    arguments = {"seq_len": 16, "seed": 1, "num_samples": 60, "notify": no_message, **more}
    return SampleStream(config, **arguments)


def everything(stream: SampleStream, count: int) -> list[list[int]]:
    return stream.microbatch(0, count).tokens.tolist()


@pytest.mark.parametrize("index", ["megacore", "megatron"])
def test_labels_follow_tokens(make_data, index: str) -> None:
    prefix = make_data(corpus(50))
    batch = open_stream(config_of(prefix, index=index)).microbatch(3, 4)
    assert batch.tokens.shape == batch.labels.shape == (4, 16) and batch.tokens.dtype == np.int64
    assert np.array_equal(batch.tokens[:, 1:], batch.labels[:, :-1])
    assert batch.positions is None and batch.documents is None
    assert batch.ordinals.tolist() == [3, 4, 5, 6]


@pytest.mark.parametrize("index", ["megacore", "megatron"])
def test_order_depends_on_the_ordinal_alone(make_data, index: str) -> None:
    config = config_of(make_data(corpus(50), "a"), make_data(corpus(30, seed=1), "b"), index=index)
    one_by_one = [open_stream(config).microbatch(ordinal, 1).tokens[0].tolist() for ordinal in range(60)]
    stream = open_stream(config)
    assert everything(stream, 60) == one_by_one
    for dp_size, ramp in ((1, ()), (2, ()), (4, (8, 8, 24))):
        plan, seen = BatchPlan(16, 2, ramp), {}
        for step in range(1, 4):
            for rank in range(dp_size):
                for first, count in plan.microbatches(step, rank, dp_size):
                    for row, ordinal in enumerate(range(first, first + count)):
                        assert ordinal not in seen
                        seen[ordinal] = stream.microbatch(first, count).tokens[row].tolist()
        assert [seen[ordinal] for ordinal in sorted(seen)] == one_by_one[: len(seen)]


def test_a_longer_run_keeps_its_samples(make_data) -> None:
    config = config_of(make_data(corpus(50)))
    assert everything(open_stream(config, num_samples=10), 60) == everything(open_stream(config, num_samples=500), 60)


def test_epoch_uses_each_sequence(make_data) -> None:
    """With one document per sample, an epoch meets each document once, in an order that changes."""
    config = config_of(make_data([[i] * 16 for i in range(1, 41)]))
    stream = open_stream(config)
    epochs = [stream.microbatch(40 * epoch, 40).tokens[:, 0].tolist() for epoch in range(3)]
    assert all(sorted(epoch) == list(range(1, 41)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert [stream.source(ordinal)[2] for ordinal in (0, 39, 40, 119)] == [0, 0, 1, 2]


def test_source_names_data_set_and_epoch(make_data) -> None:
    config = config_of(make_data(corpus(50), "a"), make_data(corpus(30, seed=1), "b"))
    sources = [open_stream(config).source(ordinal) for ordinal in range(200)]
    assert {source[0] for source in sources} == {0, 1} and len(set(sources)) == 200
    assert max(source[2] for source in sources) > 0


def test_fewer_tokens_than_a_sample(make_data) -> None:
    """A tiny corpus repeats, epoch after epoch."""
    for index in ("megacore", "megatron"):
        stream = open_stream(config_of(make_data([[1, 2, 3]], index), index=index))
        assert set(stream.microbatch(0, 5).tokens.ravel().tolist()) == {1, 2, 3}
    assert stream.source(59)[2] > 100


def test_no_tokens_at_all(make_data) -> None:
    for documents in ([], [[]]):
        with pytest.raises(ValueError, match="holds no tokens; prepare a corpus"):
            open_stream(config_of(make_data(documents)))


def test_splits_do_not_meet(make_data) -> None:
    config = config_of(make_data([[i] * 8 for i in range(100)]), split=(80.0, 15.0, 5.0))
    seen = {
        split: set(open_stream(config, split=split).microbatch(0, 60).tokens.ravel().tolist())
        for split in ("train", "valid", "test")
    }
    assert seen == {"train": set(range(80)), "valid": set(range(80, 95)), "test": set(range(95, 100))}


def test_eval_blend(make_data) -> None:
    config = config_of(make_data([[1] * 40], "a"), eval_blend=((1.0, make_data([[2] * 40], "b")),), split=(9.0, 1.0))
    assert set(everything(open_stream(config), 5)[0]) == {1}
    assert set(everything(open_stream(config, split="valid"), 5)[0]) == {2}
    with pytest.raises(ValueError, match="eval_blend"):
        open_stream(config, split="test")


def test_no_documents_to_evaluate(make_data) -> None:
    config = config_of(make_data(corpus(10)), split=(969.0, 30.0, 1.0))
    with pytest.raises(ValueError, match="gives valid none of the 10 documents .* 35 documents or more"):
        open_stream(config, split="valid")
    open_stream(config)


def test_temperature_moves_the_mixture(make_data) -> None:
    small, large = make_data([[1] * 100], "small"), make_data([[2] * 900], "large")
    shares = []
    for temperature in (0.0, 1.0, 2.0):
        stream = open_stream(config_of(small, large, temperature=temperature))
        shares.append(np.mean(stream.microbatch(0, 400).tokens == 1))
    assert shares == pytest.approx([0.5, 0.1, 0.25], abs=0.01)
    with pytest.raises(ValueError, match="data.temperature=-1"):
        open_stream(config_of(small, temperature=-1.0))


def test_document_boundaries(make_data) -> None:
    prefix = make_data(corpus(50, longest=8))
    config = config_of(prefix, reset_positions=True, reset_attention=True, mask_eod_loss=True)
    batch = open_stream(config, eod=EOD).microbatch(0, 20)
    assert batch.positions is not None and batch.documents is not None
    for row in range(20):
        number, position = 0, 0
        for place, token in enumerate(batch.tokens[row].tolist()):
            assert (batch.documents[row, place], batch.positions[row, place]) == (number, position)
            number, position = (number + 1, 0) if token == EOD else (number, position + 1)
    assert EOD not in batch.labels and -100 in batch.labels


def test_mask_eod_needs_to_know_it(make_data) -> None:
    with pytest.raises(ValueError, match="mask_eod_loss=true needs"):
        open_stream(config_of(make_data(corpus(5)), mask_eod_loss=True))


def test_fill_in_middle(make_data) -> None:
    config = config_of(make_data(corpus(50)), fim_rate=0.5)
    plain = open_stream(replace(config, fim_rate=0.0), eod=EOD).microbatch(0, 40)
    stream = open_stream(config, eod=EOD, fim=FimTokens(500, 501, 502), vocab_size=503)
    batch = stream.microbatch(0, 40)
    assert {500, 501, 502} <= set(batch.tokens.ravel().tolist())
    assert np.array_equal(batch.tokens == EOD, plain.tokens == EOD)
    assert np.array_equal(stream.microbatch(17, 1).tokens[0], batch.tokens[17])
    with pytest.raises(ValueError, match="fim_rate=0.5 needs the tokens"):
        open_stream(config)
    with pytest.raises(ValueError, match="token 502 lies beyond model.vocab_size=500"):
        open_stream(config, fim=FimTokens(499, 498, 502), vocab_size=500)


def test_token_beyond_the_vocabulary(make_data) -> None:
    prefix = make_data([[1, 2, 3], [], [4, 7, 6]])
    with pytest.raises(ValueError, match=r"token 1 of document 2 of .*data has id 7, .*vocab_size"):
        open_stream(config_of(prefix), vocab_size=7).microbatch(0, 5)
    negative = make_data([[1, -2, 3]], "negative", dtype="int32")
    with pytest.raises(ValueError, match="has id -2"):
        open_stream(config_of(negative), vocab_size=7).microbatch(0, 5)
    assert open_stream(config_of(prefix), vocab_size=8).microbatch(0, 5).tokens.max() == 7


def test_floats_are_no_tokens(make_data, tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "f", "float32") as writer:
        writer.add_document(np.ones(3, np.float32))
    with pytest.raises(ValueError, match="not token ids"):
        open_stream(config_of(str(tmp_path / "f")))


def describe(prefix: str, **facts) -> None:
    replace(DataMeta.derive(IndexedDataset(prefix)), **facts).save(prefix)


def test_facts_beside_the_data(make_data, tmp_path: Path) -> None:
    one, other = make_data(corpus(5), "one"), make_data(corpus(6, seed=2), "other")
    describe(one, tokenizer="bytes", tokenizer_hash="x", vocab_size=257, eod=EOD)
    describe(other, tokenizer="bytes", tokenizer_hash="x", vocab_size=257, eod=EOD)
    assert open_stream(config_of(one, other, mask_eod_loss=True)).eod == EOD
    with pytest.raises(ValueError, match="vocabulary of 257, but model.vocab_size=256; set it to 257"):
        open_stream(config_of(one), vocab_size=256)
    merge([one, other], tmp_path / "merged")
    merged = IndexedDataset(tmp_path / "merged")
    meta = merge_metas([DataMeta.load(IndexedDataset(prefix)) for prefix in (one, other)], merged)
    assert (meta.tokenizer, meta.eod, meta.num_documents) == ("bytes", EOD, 11)
    assert open_stream(config_of(one, other), eod=EOD + 1).eod == EOD  # what the data says goes first
    describe(other, tokenizer="bytes", tokenizer_hash="x", vocab_size=257, eod=256)
    with pytest.raises(ValueError, match=r"mixes end-of-document tokens: .*one .token 0. and .*other .token 256."):
        open_stream(config_of(one, other))
    describe(other, tokenizer="bytes", tokenizer_hash="x", vocab_size=257)
    assert open_stream(config_of(one, other), eod=5).eod == EOD
    assert open_stream(config_of(other), eod=5).eod == 5 and open_stream(config_of(other)).eod is None
    describe(other, tokenizer="o.model", tokenizer_hash="y")
    with pytest.raises(ValueError, match="mixes tokenizers: .*one .bytes. and .*other .o.model"):
        open_stream(config_of(one, other))


def test_changed_data_is_noticed(make_data) -> None:
    prefix = make_data([[1, 2, 3], [4, 5]])
    before = fingerprint(IndexedDataset(prefix))
    describe(prefix, eod=EOD)
    Path(prefix + ".bin").write_bytes(np.array([1, 2, 3, 4, 6], "<u2").tobytes())  # the same size
    assert fingerprint(IndexedDataset(prefix)) != before
    with pytest.raises(ValueError, match="describes other content"):
        open_stream(config_of(prefix))
    make_data([[1, 2, 3], [4, 5]])  # the writer removes the old facts
    assert DataMeta.load(IndexedDataset(prefix)).eod is None
    Path(prefix + ".meta.json").write_text("[1]")
    with pytest.raises(ValueError, match="meta.json is damaged"):
        DataMeta.load(IndexedDataset(prefix))


@pytest.mark.parametrize("index", ["megacore", "megatron"])
def test_rewritten_data_of_the_same_size(make_data, index: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other documents in files of the same name and size never meet an old index."""
    monkeypatch.setattr("megacore.data.sample_index.CACHED_FROM", 1)
    documents = [[i] * (1 + i % 7) for i in range(1, 60)]
    prefix = make_data(documents)
    open_stream(config_of(prefix, index=index))
    make_data(documents[::-1])
    rewritten = everything(open_stream(config_of(prefix, index=index)), 60)
    fresh = everything(open_stream(config_of(make_data(documents[::-1], "fresh"), index=index)), 60)
    assert rewritten == fresh


def test_megatron_order_knows_its_length(make_data) -> None:
    one, other = make_data(corpus(5), "one"), make_data(corpus(6, seed=2), "other")
    for config in (config_of(one, index="megatron"), config_of(one, other, index="megatron")):
        with pytest.raises(ValueError, match="beyond the .* data.index=megacore"):
            open_stream(config).microbatch(1000, 1)


def test_cache_folder(make_data, tmp_path: Path) -> None:
    prefix = make_data(corpus(20))
    open_stream(config_of(prefix, index="megatron", cache=str(tmp_path / "cache")))
    assert list((tmp_path / "cache").glob("*/sample_index.npy")) and not Path(prefix + ".index").exists()
    open_stream(config_of(prefix, index="megatron"))
    assert list(Path(prefix + ".index").glob("*/sample_index.npy"))


def read_all(prefix: str, index: str, expected: list[list[int]]) -> None:
    stream = open_stream(config_of(prefix, index=index))
    stream.build()
    assert everything(stream, 60) == expected


@pytest.mark.parametrize("index", ["megacore", "megatron"])
def test_racing_ranks(make_data, index: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megacore.data.sample_index.CACHED_FROM", 1)
    documents = corpus(200)
    expected = everything(open_stream(config_of(make_data(documents, "alone"), index=index)), 60)
    prefix = make_data(documents, "raced")
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=read_all, args=(prefix, index, expected)) for _ in range(8)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 8


@pytest.mark.parametrize("index", ["megacore", "megatron"])
def test_numpy_loops_give_the_same_run(make_data, index: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(make_data(corpus(50), "a"), make_data(corpus(30, seed=1), "b"), index=index)
    results = []
    for loops in (native.loops, fallback):
        monkeypatch.setattr(native, "loops", loops)
        folder = f"{config.blend[0][1]}-{loops.__name__}"
        results.append(everything(open_stream(replace(config, cache=folder)), 60))
    assert results[0] == results[1]
