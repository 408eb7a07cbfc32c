"""From files to texts: formats, compressions, folders, broken content; and cutting that changes no token."""

import bz2
import gzip
import io
import json
import lzma
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megacore.data.text.blocks import BLOCK_BYTES, read_blocks
from megacore.data.text.cutting import cut_text
from megacore.data.text.documents import documents
from megacore.data.text.encode import BatchEncoder
from megacore.data.text.options import ReadOptions
from megacore.data.text.sources import BadInput, find_sources
from megacore.data.tokenizers import open_tokenizer
from megacore.data.train_tokenizer import train_sentencepiece
from tests.data.texts import ODD, SAMPLES, corpus


def read(*inputs: object, **options: str) -> list[str]:
    """All documents of some files; the parts of a long one are put together."""
    chosen = ReadOptions(**options)
    texts: list[str] = []
    for block in read_blocks(find_sources([str(name) for name in inputs], chosen.format), chosen):
        found = documents(block, chosen).texts
        if not block.starts:
            texts[-1] += found.pop(0)
        texts += found
    return texts


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
    return path


def jsonl(texts: list[str], key: str = "text") -> str:
    return "".join(json.dumps({"id": i, key: text}, ensure_ascii=bool(i % 2)) + "\n" for i, text in enumerate(texts))


FULL = [text for text in SAMPLES if text.strip()]


def test_json_lines(tmp_path):
    path = write(tmp_path / "a.jsonl", jsonl(list(SAMPLES)) + "\n  \n")
    assert read(path) == FULL
    assert read(write(tmp_path / "b.jsonl", jsonl(FULL, "content").rstrip()), json_key="content") == FULL


def test_many_blocks_hold_the_same_documents(tmp_path):
    texts = [corpus("mixed", 3000, seed) for seed in range(1000)]
    assert (path := write(tmp_path / "a.jsonl", jsonl(texts))).stat().st_size > 4 * BLOCK_BYTES
    assert read(path) == texts


@pytest.mark.parametrize("ending", ["gz", "bz2", "xz", "zst"])
def test_compressed(tmp_path, ending):
    texts = [corpus("chinese", 4000, seed) for seed in range(120)]
    data = jsonl(texts).encode()
    if ending == "zst":
        zstd = pytest.importorskip("zstandard")
        half = len(data) // 2
        packed = zstd.compress(data[:half]) + zstd.compress(data[half:])  # several frames, as parallel packers write
    else:
        packed = {"gz": gzip, "bz2": bz2, "xz": lzma}[ending].compress(data)
    assert read(write(tmp_path / f"a.jsonl.{ending}", packed)) == texts
    with pytest.raises(BadInput, match=f"cut.jsonl.{ending} is damaged or was cut off"):
        read(write(tmp_path / f"cut.jsonl.{ending}", packed[: len(packed) * 2 // 3]))
    with pytest.raises(BadInput, match="is damaged or was cut off"):
        read(write(tmp_path / f"other.txt.{ending}", b"these bytes are not compressed at all"))


def test_zstd_without_its_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(ValueError, match="a.txt.zst needs the package zstandard .*pip install zstandard"):
        read(write(tmp_path / "a.txt.zst", b""))


def test_parquet(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    texts = [*FULL, *(corpus("code", 2000, seed) for seed in range(600))]
    table = arrow.table({"text": [*texts, None, ""], "n": [*range(len(texts) + 2)]})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=100)
    assert read(tmp_path / "a.parquet") == texts
    dictionary = arrow.table({"text": arrow.array(FULL).dictionary_encode()})
    parquet.write_table(dictionary, tmp_path / "d.parquet")
    assert read(tmp_path / "d.parquet") == FULL
    with pytest.raises(BadInput, match="has no column 'body'; its columns are text, n; choose with --json-key"):
        read(tmp_path / "a.parquet", json_key="body")
    with pytest.raises(BadInput, match="column 'n' holds int64, not text"):
        read(tmp_path / "a.parquet", json_key="n")
    with pytest.raises(BadInput, match="not a Parquet file or is damaged"):
        read(write(tmp_path / "c.parquet", (tmp_path / "a.parquet").read_bytes()[:-100]))


def test_a_json_array(tmp_path):
    content = json.dumps([{"text": "one"}, "two", {"text": ""}], indent=2)
    assert read(write(tmp_path / "a.json", content)) == ["one", "two"]
    with pytest.raises(
        BadInput, match=r"a.json item 2 has no key 'text'; its keys are body; did you mean --json-key body"
    ):
        read(write(tmp_path / "a.json", '["x", {"body": "y"}]'))


def test_plain_text(tmp_path):
    path = write(tmp_path / "a.txt", "one\r\n\r\n  two\nthree\n \t\n\nfour")
    assert read(path) == ["one\r\n\r\n  two\nthree\n \t\n\nfour"]
    assert read(path, documents="line") == ["one", "  two", "three", "four"]
    assert read(path, documents="paragraph") == ["one", "  two\nthree", "four"]


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_paragraphs_across_blocks(tmp_path, ending):
    paragraphs = [f"{i} {corpus('english', 400, i)}".replace("\n", " ").strip() for i in range(4000)]
    path = write(tmp_path / "a.txt", (ending * 2).join(paragraphs))
    assert path.stat().st_size > 2 * BLOCK_BYTES
    assert read(path, documents="paragraph") == paragraphs


@pytest.mark.parametrize("kind", ["english", "chinese", "code", "mixed"])
def test_one_long_document(tmp_path, kind):
    text = corpus(kind, 1_200_000)
    path = write(tmp_path / "a.txt", text)
    assert read(path) == [text]
    assert len(list(read_blocks(find_sources([str(path)]), ReadOptions()))) > 2


@pytest.mark.parametrize("size", [BLOCK_BYTES - 1, BLOCK_BYTES, BLOCK_BYTES + 1, 2 * BLOCK_BYTES])
def test_documents_as_long_as_a_block(tmp_path, size):
    for text in ("x" * size, "é" * (size // 2)):
        assert read(write(tmp_path / "a.txt", text)) == [text]
        assert read(write(tmp_path / "a.txt", text + "\n" + text), documents="line") == [text, text]


def test_a_byte_order_mark_is_no_text(tmp_path):
    assert read(write(tmp_path / "a.txt", b"\xef\xbb\xbftext")) == ["text"]
    assert read(write(tmp_path / "a.jsonl", b'\xef\xbb\xbf{"text": "x"}')) == ["x"]
    with pytest.raises(BadInput, match="UTF-16 text .* convert it to UTF-8: iconv"):
        read(write(tmp_path / "a.txt", "text".encode("utf-16")))


def test_folders_and_patterns(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / ".git").mkdir()
    write(tmp_path / "sub" / "b.py", "b")
    write(tmp_path / "a.txt", "a")
    write(tmp_path / "c.jsonl.gz", gzip.compress(b'{"text": "c"}'))
    write(tmp_path / "picture.png", b"\x89PNG\0\0")
    write(tmp_path / ".git" / "HEAD", "hidden")
    assert read(tmp_path / "**" / "*.py", tmp_path / "a.txt") == ["b", "a"]
    (tmp_path / "loop").symlink_to(tmp_path)
    assert read(tmp_path) == ["a", "c", "b"]
    assert read(tmp_path / "c.jsonl.gz", format="text") == ['{"text": "c"}']
    (tmp_path / "empty").mkdir()
    for name in ("empty", "nothing.txt", "*.csv"):
        with pytest.raises(BadInput, match="there is no"):
            read(tmp_path / name)


def test_standard_input(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b'{"text": "x"}\n')))
    assert read("-", format="jsonl") == ["x"]
    with pytest.raises(BadInput, match="say --format text or jsonl"):
        read("-")


GOOD = b'{"text": "good"}\n'


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"body": "x", "n": 1}', "line 2 has no key 'text'; its keys are body, n; did you mean --json-key body?"),
        (b'{"n": 1}', "line 2 has no key 'text'; its keys are n; none of them holds text"),
        (b"{}", "line 2 has no key 'text'; its keys are none"),
        (b'{"text": null}', "line 2: the value of 'text' is not a text but NoneType"),
        (b'{"text": ["x"]}', "line 2: the value of 'text' is not a text but list"),
        (b'["text"]', "line 2 is not an object but list"),
        (b'{"text": "x', "line 2 is not JSON (Unterminated string starting at at column 10)"),
        (b"plain words", "line 2 is not JSON"),
        (b'{"text": "\\ud83d"}', "line 2: the text has half of a"),
        (b'{"text": "caf\xe9"}', "line 2 (byte 30 of the file) is not UTF-8: invalid continuation byte 0xe9"),
    ],
)
def test_broken_json_lines(tmp_path, line, message):
    path = write(tmp_path / "a.jsonl", GOOD + line + b"\n" + GOOD)
    with pytest.raises(BadInput) as told:
        read(path)
    assert f"{path} {message}" in str(told.value)
    assert read(path, errors="skip") == ["good", "good"]


def test_surrogate_pairs_are_characters(tmp_path):
    path = write(tmp_path / "a.jsonl", b'{"text": "\\ud83d\\ude00"}\n{"text": "\\uD83D\\uDE00 \\ud83d"}\n')
    assert read(path, errors="replace") == ["😀", "😀 \ufffd"]
    assert read(path, errors="skip") == ["😀"]


def test_bad_bytes_in_plain_text(tmp_path):
    path = write(tmp_path / "a.txt", b"one\ntwo\xff\nthree\n")
    with pytest.raises(BadInput, match=r"a.txt line 2 \(byte 7 of the file\) is not UTF-8: invalid start byte 0xff"):
        read(path)
    with pytest.raises(BadInput, match=r"a.txt line 2 \(byte 7 of the file\) is not UTF-8"):
        read(path, documents="line")
    assert read(path, documents="line", errors="replace") == ["one", "two\ufffd", "three"]
    assert read(path, documents="line", errors="skip") == ["one", "three"]
    assert read(path, errors="replace") == ["one\ntwo\ufffd\nthree\n"]
    assert read(path, errors="skip") == []


def test_bad_bytes_far_into_a_long_file(tmp_path):
    text = corpus("english", 700_000).encode()
    path = write(tmp_path / "a.txt", text + b"\xff" + text)
    with pytest.raises(BadInput, match=rf"line {text.count(10) + 1} \(byte {len(text)} of the file\)"):
        read(path)
    lines = write(tmp_path / "a.jsonl", GOOD * 50_000 + b'{"text": "\xff"}\n')
    with pytest.raises(BadInput, match=rf"line 50001 \(byte {len(GOOD) * 50_000 + 10} of the file\)"):
        read(lines)


def test_unknown_options_are_told():
    with pytest.raises(ValueError, match="--errors ignore is not known; choose strict, replace, skip"):
        ReadOptions(errors="ignore")


@settings(max_examples=300, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=400), st.integers(8, 64))
def test_parts_make_the_whole(text, limit):
    parts = cut_text(text, limit)
    assert "".join(parts) == text
    assert all(0 < len(part.encode()) <= 8 * limit for part in parts) or text == ""


LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """Ours, one that puts a space before every text (Llama 2's way), and ones with GPT-2's and Llama 3's patterns."""
    folder = tmp_path_factory.mktemp("tokenizers")
    text = write(folder / "text.txt", corpus("mixed", 100_000))
    train_sentencepiece([str(text)], str(folder / "ours.model"), 600)
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(folder / "llama"), model_type="bpe", vocab_size=600, byte_fallback=True,
        add_dummy_prefix=True, remove_extra_whitespaces=False, normalization_rule_name="identity", minloglevel=2,
        character_coverage=0.99,
    )  # fmt: skip
    library = pytest.importorskip("tokenizers")
    gpt = library.ByteLevelBPETokenizer()
    gpt.train([str(text)], vocab_size=600, show_progress=False)
    gpt.save(str(folder / "gpt.json"))
    newer = library.Tokenizer(library.models.BPE())
    split = library.pre_tokenizers.Split(library.Regex(LLAMA_3), "isolated")
    newer.pre_tokenizer = library.pre_tokenizers.Sequence(
        [split, library.pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    alphabet = library.pre_tokenizers.ByteLevel.alphabet()
    newer.train(
        [str(text)], library.trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    )
    newer.save(str(folder / "llama3.json"))
    return [open_tokenizer(str(folder / name)) for name in ("ours.model", "llama.model", "gpt.json", "llama3.json")]


@pytest.mark.parametrize("kind", ["english", "code", "chinese"])
def test_a_document_in_parts_has_the_tokens_of_the_whole(tmp_path, tokenizers, kind):
    text = corpus(kind, 300_000)
    for tokenizer in tokenizers:
        encoder = BatchEncoder(tokenizer, ReadOptions(), None)
        ids, lengths = encoder._encode(["first", text, *ODD], starts=True)
        whole, whole_lengths = tokenizer.encode_batch(["first", text, *ODD])
        assert lengths.tolist() == whole_lengths.tolist()
        assert ids.tolist() == whole.tolist()
