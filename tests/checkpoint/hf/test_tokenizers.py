"""A tokenizer that a run was trained with is one that AutoTokenizer loads, with the same ids."""

import json

import pytest

from megacore.checkpoint.hf.sentencepiece_json import SentencePiece
from megacore.checkpoint.hf.tokenizer import tokenizer_files
from megacore.data.tokenizers import open_tokenizer
from megacore.data.train_tokenizer import train_sentencepiece

transformers = pytest.importorskip("transformers")

TEXTS = (
    "Hello world, hello  again!\n\tif x == 10:\n        return 2 ** 31\n",
    "naïve café — 日本語 🙂 and ½",
    " leading and trailing ",
    "def f(a, b):\n    return a+b  # 1234567890\n\n\n",
    "",
    "the the the theory of the thermometer",
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The demo's kind of tokenizer, trained on sources of Python's own library."""
    folder = tmp_path_factory.mktemp("tokenizer")
    train_sentencepiece([json.__file__, pytest.__file__, ast_file()], str(folder / "demo.model"), 700)
    return folder / "demo.model"


def ast_file() -> str:
    import ast

    return ast.__file__


def loaded(files, folder):
    for name, data in files.items():
        (folder / name).write_bytes(data)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return transformers.AutoTokenizer.from_pretrained(folder)


def test_sentencepiece(model, tmp_path):
    found = tokenizer_files({"tokenizer/demo.model": model.read_bytes()})
    ours, theirs = open_tokenizer(str(model)), loaded(found.files, tmp_path)
    texts = [*TEXTS, open(ast_file(), encoding="utf-8").read()[:20_000]]
    for text in texts:
        ids = ours.encode(text)
        assert theirs(text, add_special_tokens=False)["input_ids"] == ids
        assert theirs(text)["input_ids"] == ids, "no token is added either"
        assert theirs.decode(ids) == text
    assert theirs.eos_token_id == ours.eod == found.ids["eos_token_id"]
    assert theirs.bos_token == "<s>"
    assert len(theirs) == ours.vocab_size
    assert found.files["tokenizer.model"] == model.read_bytes()
    again = open_tokenizer(str(tmp_path))
    assert again.eod == ours.eod
    assert again.encode(TEXTS[1]) == ours.encode(TEXTS[1])


def test_bytes(tmp_path):
    found = tokenizer_files({}, "bytes")
    ours, theirs = open_tokenizer("bytes"), loaded(found.files, tmp_path)
    for text in TEXTS:
        assert theirs(text)["input_ids"] == ours.encode(text)
        assert theirs.decode(ours.encode(text)) == text
    assert theirs.eos_token_id == ours.eod == found.ids["eos_token_id"]


def test_hf_files_go_through_as_they_are(model, tmp_path):
    files = tokenizer_files({"tokenizer/demo.model": model.read_bytes()}).files
    own = {f"tokenizer/{name}": data for name, data in files.items()} | {"tokenizer/chat_template.jinja": b"{{ x }}"}
    found = tokenizer_files(own | {"hf/config.json": b"{}"})
    assert found.files == {name.removeprefix("tokenizer/"): data for name, data in own.items()}
    assert found.ids["eos_token_id"] == 2
    alone = tokenizer_files({"tokenizer/mine.json": files["tokenizer.json"]})
    assert alone.files["tokenizer.json"] == files["tokenizer.json"]
    assert loaded(alone.files, tmp_path).eos_token == "</s>"


def test_what_has_no_files_is_said():
    assert "tiktoken:gpt2 has no files" in tokenizer_files({}, "tiktoken:gpt2").notes[0]
    assert "none came with the weights" in tokenizer_files({}).notes[0]


@pytest.mark.parametrize("data", [b"x", b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff", b"\x0a\x05ab", b"\x0b"])
def test_what_is_no_model_is_refused(data):
    with pytest.raises(ValueError, match="no SentencePiece model"):
        SentencePiece.of(data)


def test_other_kinds_of_sentencepiece_are_kept_as_they_are(model):
    import sentencepiece

    proto = model.read_bytes()
    assert SentencePiece.of(proto).pieces[0].text == "<unk>"
    processor = sentencepiece.SentencePieceProcessor(model_proto=proto)
    pieces = SentencePiece.of(proto).pieces
    assert [piece.text for piece in pieces] == [processor.id_to_piece(i) for i in range(len(pieces))]
    assert [piece.score for piece in pieces] == [processor.get_score(i) for i in range(len(pieces))]
