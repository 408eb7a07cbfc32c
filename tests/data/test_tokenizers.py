"""Tokenizers: every text comes back, no text makes special tokens, damaged or missing ones are told clearly."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megacore.config.schema import DataConfig
from megacore.data.indexed import IndexedDataset
from megacore.data.meta import DataMeta
from megacore.data.prepare import prepare
from megacore.data.run_tokenizer import resolve_tokenizer
from megacore.data.text.blocks import Block
from megacore.data.tokenizers import Tokenizer, open_tokenizer
from megacore.data.train_tokenizer import rare_characters, spread_sample, train_sentencepiece
from tests.data.texts import SAMPLES, corpus


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SentencePiece model, a folder of HF tokenizers, and the text they were made from."""
    folder = tmp_path_factory.mktemp("tokenizers")
    (folder / "text.txt").write_text(corpus("mixed", 100_000), encoding="utf-8", newline="")
    train_sentencepiece([str(folder / "text.txt")], str(folder / "sp.model"), 600)
    make_hugging_face(folder / "hf", folder / "text.txt")
    return folder


def make_hugging_face(folder: Path, text: Path) -> None:
    """A byte-level BPE like GPT-2's, as a model folder has it."""
    library = pytest.importorskip("tokenizers")
    tokenizer = library.Tokenizer(library.models.BPE())
    tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<pad>", "<|endoftext|>", "<|im_end|>", "<|fim_prefix|>"],
        initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train([str(text)], trainer)
    tokenizer.enable_truncation(7)  # as inference code leaves it behind
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<|im_end|>"}}))


@pytest.fixture
def tiktoken_name(monkeypatch: pytest.MonkeyPatch) -> str:
    """An encoding of tiktoken that needs no download."""
    tiktoken = pytest.importorskip("tiktoken")
    from tiktoken import registry

    ranks = {bytes([i]): i for i in range(256)} | {b"th": 256, b"the": 257}
    encoding = tiktoken.Encoding(
        "tiny", pat_str=r"\s?\w+|\s+|[^\s\w]+", mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 300}
    )
    monkeypatch.setitem(registry.ENCODINGS, "tiny", encoding)
    monkeypatch.setattr(tiktoken, "list_encoding_names", lambda: ["tiny"])
    return "tiktoken:tiny"


def every_tokenizer(folder: Path) -> list[Tokenizer]:
    return [open_tokenizer(spec) for spec in ("bytes", str(folder / "sp.model"), str(folder / "hf"))]


def test_every_text_comes_back(folder):
    for tokenizer in every_tokenizer(folder):
        for text in SAMPLES:
            assert tokenizer.decode(tokenizer.encode(text)) == text, tokenizer.spec


@settings(max_examples=300, deadline=None)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"])), max_size=4))
def test_any_texts_come_back_one_by_one_and_in_a_batch(folder, texts):
    for tokenizer in every_tokenizer(folder):
        ids, lengths = tokenizer.encode_batch(texts)
        assert ids.dtype == np.int32 and lengths.sum() == ids.size and len(lengths) == len(texts)
        for text, tokens in zip(texts, np.split(ids, np.cumsum(lengths)[:-1]) if texts else []):
            assert tokens.tolist() == tokenizer.encode(text)
            assert tokenizer.decode(tokens) == text


def test_text_never_gives_special_tokens(folder, tiktoken_name):
    for tokenizer in [*every_tokenizer(folder), open_tokenizer(tiktoken_name)]:
        special = tokenizer.special_tokens
        assert special
        ids = tokenizer.encode("".join(special))
        assert not set(ids) & set(special.values()), tokenizer.spec
        assert tokenizer.decode([*special.values()]).replace("\u2047", "").strip() == ""  # unk shows as a double "?"


def test_names_ids_and_sizes(folder, tiktoken_name):
    byte = open_tokenizer("bytes")
    assert (byte.vocab_size, byte.eod, byte.encode("é")) == (257, 256, [0xC3, 0xA9])
    piece = open_tokenizer(str(folder / "sp.model"))
    assert (piece.vocab_size, piece.eod) == (600, 2)
    assert piece.token_id("<|fim_middle|>") == piece.special_tokens["<|fim_middle|>"] == 4
    face = open_tokenizer(str(folder / "hf"))
    assert face.eod == face.token_id("<|im_end|>") == 2
    assert face.vocab_size == 600
    tik = open_tokenizer(tiktoken_name)
    assert (tik.vocab_size, tik.eod, tik.encode("the"), tik.decode([257, 300])) == (301, 300, [257], "the")
    assert len({t.hash for t in (byte, piece, face, tik)}) == 4
    with pytest.raises(ValueError, match=r"no token '<\|fim_hole\|>'; its special tokens are .*'<\|fim_prefix\|>'"):
        piece.token_id("<|fim_hole|>")


def test_a_json_file_and_its_folder_are_one_tokenizer(folder):
    alone, whole = open_tokenizer(str(folder / "hf" / "tokenizer.json")), open_tokenizer(str(folder / "hf"))
    assert alone.hash == whole.hash and alone.eod == whole.eod


def test_truncation_left_in_a_tokenizer_json_does_not_cut_documents(folder):
    tokenizer = open_tokenizer(str(folder / "hf"))
    assert tokenizer.decode(tokenizer.encode("one two three " * 50)) == "one two three " * 50


def test_a_model_folder_with_a_sentencepiece_model_only(folder, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes((folder / "sp.model").read_bytes())
    assert open_tokenizer(str(tmp_path)).hash == open_tokenizer(str(folder / "sp.model")).hash


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.model", b"not a model", "is not a SentencePiece model"),
        ("a.model", b"", "is not a SentencePiece model"),
        ("a.json", b"{}", "is not a tokenizer of HF tokenizers"),
        ("a.json", b"\xff\xfe", "is not a tokenizer of HF tokenizers"),
        ("a.txt", b"text", "unknown kind of file; a tokenizer is bytes"),
    ],
)
def test_damaged_files_are_told(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        open_tokenizer(str(tmp_path / name))


def test_missing_things_are_told(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="there is no such file or folder; a tokenizer is bytes, a SentencePiece"):
        open_tokenizer("byte")
    with pytest.raises(ValueError, match=r"neither tokenizer.json nor tokenizer.model"):
        open_tokenizer(str(tmp_path))
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    with pytest.raises(ValueError, match="needs the package tiktoken .*; pip install tiktoken"):
        open_tokenizer("tiktoken:gpt2")


def test_tiktoken_without_its_vocabulary(tmp_path, monkeypatch):
    tiktoken = pytest.importorskip("tiktoken")
    with pytest.raises(ValueError, match="tiktoken knows .*cl100k_base"):
        open_tokenizer("tiktoken:cl100k")

    def no_network(name: str) -> None:
        raise ConnectionError(f"cannot reach the place of {name}")

    monkeypatch.setattr(tiktoken, "get_encoding", no_network)
    with pytest.raises(ValueError, match=r"not on this machine .*ConnectionError.* TIKTOKEN_CACHE_DIR"):
        open_tokenizer("tiktoken:cl100k_base")


def test_training_is_reproducible(folder, tmp_path):
    again = train_sentencepiece([str(folder / "text.txt")], str(tmp_path / "sp.model"), 600)
    assert again.tokenizer.hash == open_tokenizer(str(folder / "sp.model")).hash
    assert again.bytes_per_token > 1.5


def test_training_says_which_vocabulary_is_possible(folder, tmp_path):
    source, output = [str(folder / "text.txt")], str(tmp_path / "sp.model")
    with pytest.raises(ValueError, match="--vocab-size 200 is too small"):
        train_sentencepiece(source, output, 200)
    with pytest.raises(ValueError, match="--vocab-size 100000 is too large .* no more than ") as told:
        train_sentencepiece(source, output, 100_000)
    possible = int(str(told.value).partition("no more than ")[2].split()[0])
    assert train_sentencepiece(source, output, possible).tokenizer.vocab_size == possible
    with pytest.raises(ValueError, match="exists already"):
        train_sentencepiece(source, output, 400)
    with pytest.raises(ValueError, match=r"must end in \.model"):
        train_sentencepiece(source, str(tmp_path / "sp"), 400)


@pytest.mark.parametrize("text", ["", " \n\t \n"])
def test_training_on_nothing(tmp_path, text):
    (tmp_path / "a.txt").write_text(text)
    with pytest.raises(ValueError, match="there is no text in"):
        train_sentencepiece([str(tmp_path / "a.txt")], str(tmp_path / "a.model"), 400)


@pytest.mark.parametrize("vocab_size", [270, 400])
def test_more_characters_than_the_vocabulary_holds(tmp_path, vocab_size):
    """Thousands of Chinese characters in a small vocabulary: the frequent ones get tokens, the others bytes."""
    text = "".join(chr(0x4E00 + (i * i) % 3000) for i in range(20_000))
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    tokenizer = train_sentencepiece([str(tmp_path / "a.txt")], str(tmp_path / "a.model"), vocab_size).tokenizer
    assert tokenizer.vocab_size == vocab_size
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_rare_characters():
    assert rare_characters(["aaab", "bbac"], room=2, coverage=1.0) == "c"
    assert rare_characters(["a" * 9999 + "b"], room=9, coverage=0.9995) == "b"
    assert rare_characters(["a" * 9999 + "b"], room=9, coverage=1.0) == ""


def test_a_sample_is_spread_evenly_and_bounded():
    def blocks(count):
        return (Block(str(i), "line", b"x" * 100) for i in range(count))

    everything, total = spread_sample(blocks(10), limit=1000)
    assert len(everything) == 10 and total == 1000
    some, total = spread_sample(blocks(1000), limit=1000)
    places = [int(block.name) for block in some]
    assert total == 100_000 and 6 <= len(some) <= 10
    assert places[0] == 0 and places[-1] > 800 and max(np.diff(places)) < 200


def metas_of(data: DataConfig) -> dict[str, DataMeta]:
    return {prefix: DataMeta.load(IndexedDataset(prefix)) for _, prefix in data.blend}


def test_the_tokenizer_of_a_run(folder, tmp_path):
    (tmp_path / "a.txt").write_text("some text\n")
    model = tmp_path / "mine.model"
    model.write_bytes((folder / "sp.model").read_bytes())
    for name, spec in (("one", str(model)), ("two", "bytes")):
        prepare([str(tmp_path / "a.txt")], spec, str(tmp_path / name))
    one, two = str(tmp_path / "one"), str(tmp_path / "two")

    def resolve(*prefixes: str, tokenizer: str = "") -> Tokenizer | None:
        data = DataConfig(blend=tuple((1.0, prefix) for prefix in prefixes), tokenizer=tokenizer)
        return resolve_tokenizer(data, metas_of(data))

    assert resolve(one).vocab_size == 600
    assert resolve(two, tokenizer="bytes").spec == "bytes"
    with pytest.raises(ValueError, match=r"data.tokenizer='bytes' is not the tokenizer that .*one was made with"):
        resolve(one, tokenizer="bytes")
    with pytest.raises(ValueError, match="the data sets of data.blend differ"):
        resolve(one, two)
    model.rename(tmp_path / "elsewhere.model")
    with pytest.raises(ValueError, match=r"mine.model', which is not there any more"):
        resolve(one)
    assert resolve(one, tokenizer=str(tmp_path / "elsewhere.model")).vocab_size == 600
    train_sentencepiece([str(folder / "text.txt")], str(model), 400)
    with pytest.raises(ValueError, match="content hash"):
        resolve(one)


def test_data_that_moved_with_its_tokenizer(folder, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    (first / "t.model").write_bytes((folder / "sp.model").read_bytes())
    prepare([str(folder / "text.txt")], str(first / "t.model"), str(first / "data"))
    first.rename(second)
    data = DataConfig(blend=((1.0, str(second / "data")),))
    assert resolve_tokenizer(data, metas_of(data)).spec == str(second / "t.model")


def test_foreign_data_names_no_tokenizer(folder, tmp_path):
    prepare([str(folder / "text.txt")], "bytes", str(tmp_path / "data"))
    (tmp_path / "data.meta.json").unlink()
    data = DataConfig(blend=((1.0, str(tmp_path / "data")),))
    assert DataMeta.load(IndexedDataset(tmp_path / "data")).tokenizer is None
    assert resolve_tokenizer(data, metas_of(data)) is None
