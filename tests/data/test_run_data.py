"""What the data says of a run, and every way in which it cannot serve one, told before anything starts."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megacore.config.errors import ConfigError
from megacore.config.load import load
from megacore.config.schema import RunConfig
from megacore.data.indexed import IndexedDataset, IndexedWriter
from megacore.data.meta import DataMeta
from megacore.data.prepare import prepare
from megacore.data.run_data import fill_in


@pytest.fixture
def text(tmp_path: Path) -> str:
    (tmp_path / "a.txt").write_text("one\n\ntwo\n\nthree\n")
    return str(tmp_path / "a.txt")


def run_of(*prefixes: str, overrides: tuple[str, ...] = ()) -> RunConfig:
    """The demo's model on these data sets; nothing that asks for a tokenizer or for validation, unless overridden."""
    quiet = ("model.vocab_size=0", "log.sample_every=0", "train.eval_every=0")
    config = load(None, [*quiet, *overrides], "demo")
    return replace(config, data=replace(config.data, blend=tuple((1.0, prefix) for prefix in prefixes)))


def problems_of(config: RunConfig) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as raised:
        fill_in(config)
    return raised.value.problems


def test_the_data_fills_in_tokenizer_and_vocabulary(tmp_path, text):
    prepare([text], "bytes", str(tmp_path / "data"))
    filled = fill_in(run_of(str(tmp_path / "data")))
    assert (filled.data.tokenizer, filled.model.vocab_size) == ("bytes", 257)
    assert fill_in(replace(filled, model=replace(filled.model, vocab_size=300))).model.vocab_size == 300
    assert problems_of(replace(filled, model=replace(filled.model, vocab_size=200))) == (
        "model.vocab_size=200 is smaller than the data's vocabulary of 257; give at least 257",
    )


def test_markers_and_an_empty_split_are_told_together(tmp_path, text):
    prepare([text], "bytes", str(tmp_path / "data"))
    config = run_of(str(tmp_path / "data"), overrides=("data.fim_rate=0.5", "train.eval_every=5"))
    markers, split = problems_of(config)
    assert "data.fim_tokens=" in markers and "'bytes' has no <|fim_prefix|>, <|fim_middle|>, <|fim_suffix|>" in markers
    assert "gives valid none of the 1 documents" in split and "--documents paragraph" in split
    assert problems_of(run_of(str(tmp_path / "data"), overrides=("data.split=1e-9,1",)))[0].startswith(
        "data.split=[1e-09, 1.0] gives train none of the 1 documents"
    )


def test_markers_that_the_tokenizer_has(tmp_path, text):
    prepare([text], "bytes", str(tmp_path / "data"))
    fill_in(run_of(str(tmp_path / "data"), overrides=("data.fim_rate=0.5", "data.fim_tokens=['a', 'b', 'c']")))


def test_all_splits_of_all_data_sets_are_looked_at(tmp_path, text):
    for name in ("one", "two"):
        prepare([text], "bytes", str(tmp_path / name))
    told = problems_of(run_of(str(tmp_path / "one"), str(tmp_path / "two"), overrides=("train.eval_every=5",)))
    assert len(told) == 2 and f"documents of {tmp_path}/one" in told[0] and f"documents of {tmp_path}/two" in told[1]
    config = run_of(str(tmp_path / "one"), overrides=("train.eval_every=5",))
    fill_in(replace(config, data=replace(config.data, eval_blend=((1.0, str(tmp_path / "two")),))))


def test_foreign_data_cannot_be_sampled_from_nor_masked(make_data):
    prefix = make_data([[1, 2, 3]] * 5)
    overrides = ("log.sample_every=5", "data.fim_rate=0.5", "data.mask_eod_loss=true")
    sampling, markers, size, masking = problems_of(run_of(prefix, overrides=overrides))
    assert sampling == "log.sample_every=5 needs the tokenizer of the data; set data.tokenizer"
    assert "but no tokenizer is known" in markers
    assert "model.vocab_size=0 is to come from the data, which does not say" in size
    assert "data.mask_eod_loss=true needs the id" in masking
    fill_in(run_of(prefix, overrides=("data.tokenizer=bytes", "log.sample_every=5", "data.mask_eod_loss=true")))


def test_missing_data_sets_are_all_named_and_nothing_follows_from_them(tmp_path, make_data):
    config = run_of(str(tmp_path / "no1"), make_data([[1]] * 5), str(tmp_path / "no2"))
    told = problems_of(replace(config, log=replace(config.log, sample_every=5)))
    assert [str(tmp_path / name) in line for name, line in zip(("no1", "no2"), told[:2], strict=True)] == [True, True]
    assert not any("sample_every" in line for line in told)


def test_data_sets_that_end_documents_differently(make_data):
    prefixes = []
    for name, eod in (("one", 7), ("two", 0)):
        prefixes.append(make_data([[1, eod]] * 5, name))
        replace(DataMeta.derive(IndexedDataset(prefixes[-1])), vocab_size=9, eod=eod).save(prefixes[-1])
    (told,) = problems_of(run_of(*prefixes))
    assert told.startswith("data.blend mixes end-of-document tokens: ")
    assert f"{prefixes[0]} (token 7)" in told and f"{prefixes[1]} (token 0)" in told


def test_data_without_tokens_are_told_with_the_rest(tmp_path, make_data):
    with IndexedWriter(tmp_path / "floats", "float32") as writer:
        writer.add_document(np.ones(3, np.float32))
    told = problems_of(run_of(str(tmp_path / "floats"), make_data([[]], "empty"), overrides=("model.vocab_size=5",)))
    assert len(told) == 2 and "not token ids" in told[0] and "holds no tokens" in told[1]
