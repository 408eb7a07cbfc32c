"""Text to data sets: right whatever the workers, whole or absent whatever happens."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from megacore.data.indexed import IndexedDataset
from megacore.data.merging import merge_datasets
from megacore.data.meta import DataMeta
from megacore.data.prepare import LongDocument, output_lock, prepare
from megacore.data.text import encode
from megacore.data.text.encode import append
from megacore.data.text.options import ReadOptions
from megacore.data.tokenizers import open_tokenizer
from megacore.data.tokenizers.bytes import ByteTokenizer
from megacore.data.train_tokenizer import train_sentencepiece
from tests.data.texts import SAMPLES, corpus

FULL = [text for text in SAMPLES if text.strip()]


def write_jsonl(path: Path, texts: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return str(path)


def texts_of(prefix: object, tokenizer: str = "bytes") -> list[str]:
    """All documents as text, each checked to end with the end-of-document token."""
    dataset, opened = IndexedDataset(str(prefix)), open_tokenizer(tokenizer)
    documents = [dataset.document(i) for i in range(dataset.num_documents)]
    assert all(document[-1] == opened.eod for document in documents)
    return [opened.decode(document[:-1].tolist()) for document in documents]


def content(prefix: object) -> bytes:
    return b"".join(Path(f"{prefix}.{ending}").read_bytes() for ending in ("bin", "idx", "meta.json"))


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("model")
    (folder / "text.txt").write_text(corpus("mixed", 60_000), encoding="utf-8", newline="")
    return train_sentencepiece([str(folder / "text.txt")], str(folder / "t.model"), 500).tokenizer.spec


def test_documents_and_facts(tmp_path, model):
    source = write_jsonl(tmp_path / "a.jsonl", [*SAMPLES])
    progress = prepare([source], model, str(tmp_path / "new" / "folder" / "data"))
    prefix = tmp_path / "new" / "folder" / "data"
    assert texts_of(prefix, model) == FULL
    dataset, tokenizer = IndexedDataset(prefix), open_tokenizer(model)
    meta = DataMeta.load(dataset)
    assert (meta.tokenizer, meta.tokenizer_hash, meta.vocab_size, meta.eod) == (model, tokenizer.hash, 500, 2)
    assert dataset.dtype == np.uint16
    assert (progress.num_documents, progress.num_tokens) == (dataset.num_documents, dataset.num_tokens)
    assert progress.num_empty == len(SAMPLES) - len(FULL)
    assert progress.consumed == progress.total == os.path.getsize(source)


def test_every_number_of_workers_gives_the_same_bytes(tmp_path, model):
    long = tmp_path / "long.txt"
    long.write_text(corpus("mixed", 700_000), encoding="utf-8", newline="")
    many = write_jsonl(tmp_path / "many.jsonl", [corpus("mixed", 400 + i, i) for i in range(1000)])
    (tmp_path / "small").mkdir()
    for i in range(40):
        (tmp_path / "small" / f"{i:02}.py").write_text(corpus("code", 50 * i, i))
    inputs = [many, str(long), str(tmp_path / "small")]
    for workers in (1, 2, 4):
        prepare(inputs, model, str(tmp_path / f"out{workers}"), workers=workers)
    assert content(tmp_path / "out1") == content(tmp_path / "out2") == content(tmp_path / "out4")
    texts = texts_of(tmp_path / "out1", model)
    assert len(texts) == 1000 + 1 + 39  # 00.py is empty
    assert texts[1000] == long.read_bytes().decode()


def test_a_document_of_20_megabytes(tmp_path):
    text = corpus("chinese", 1_000_000) * 8
    (tmp_path / "huge.txt").write_text(text, encoding="utf-8", newline="")
    assert (tmp_path / "huge.txt").stat().st_size > 20e6
    prepare([str(tmp_path / "huge.txt")], "bytes", str(tmp_path / "out"))
    dataset = IndexedDataset(tmp_path / "out")
    assert dataset.num_documents == dataset.num_sequences == 1
    assert dataset.document(0)[:-1].astype(np.uint8).tobytes() == text.encode()


def test_many_one_line_documents(tmp_path):
    lines = [f"{i} {'x' * (i % 50)}" for i in range(100_000)]
    (tmp_path / "a.txt").write_text("\n".join(lines))
    prepare([str(tmp_path / "a.txt")], "bytes", str(tmp_path / "out"), ReadOptions(documents="line"))
    dataset = IndexedDataset(tmp_path / "out")
    assert dataset.num_documents == 100_000
    assert dataset.lengths.tolist() == [len(line) + 1 for line in lines]
    assert bytes(dataset.document(54_321)[:-1].astype(np.uint8)).decode() == lines[54_321]


def test_a_document_beyond_memory_becomes_several_sequences(tmp_path, monkeypatch):
    monkeypatch.setattr("megacore.data.prepare.MAX_SEQUENCE", 1_000_000)
    (tmp_path / "a.txt").write_text("word " * 600_000)
    prepare([str(tmp_path / "a.txt")], "bytes", str(tmp_path / "out"))
    dataset = IndexedDataset(tmp_path / "out")
    assert dataset.num_documents == 1 and dataset.num_sequences == 3
    assert dataset.document(0).size == 3_000_001


def test_dtype_follows_the_vocabulary(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("text")
    for size, dtype in ((65_499, np.uint16), (65_500, np.int32)):
        monkeypatch.setattr(ByteTokenizer, "__init__", sized_bytes(size))
        prepare([str(tmp_path / "a.txt")], "bytes", str(tmp_path / "out"), overwrite=True)
        assert IndexedDataset(tmp_path / "out").dtype == dtype


def sized_bytes(vocab_size: int, eod: int | None = 256):
    def make(self: ByteTokenizer) -> None:
        self.spec, self.vocab_size, self.eod, self.special_tokens = "bytes", vocab_size, eod, {}

    return make


def test_ids_beyond_the_vocabulary_are_told(tmp_path, monkeypatch):
    source = write_jsonl(tmp_path / "a.jsonl", ["fine", "broken z"])
    monkeypatch.setattr(ByteTokenizer, "__init__", sized_bytes(ord("z"), eod=0))
    with pytest.raises(
        ValueError, match="gave the id 122, beyond its vocabulary of 122, in the document that begins 'br"
    ):
        prepare([source], "bytes", str(tmp_path / "out"))
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_end_of_document_tokens(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("ab")
    source, out = [str(tmp_path / "a.txt")], str(tmp_path / "out")
    prepare(source, "bytes", out, append_eod=False)
    assert IndexedDataset(out).document(0).tolist() == [97, 98]
    assert DataMeta.load(IndexedDataset(out)).eod is None
    prepare(source, "bytes", out, eod_token="\n", overwrite=True)
    assert IndexedDataset(out).document(0).tolist() == [97, 98, 10]
    with pytest.raises(ValueError, match="has no token '</s>'; its special tokens are"):
        prepare(source, "bytes", out, eod_token="</s>", overwrite=True)
    monkeypatch.setattr(ByteTokenizer, "__init__", sized_bytes(257, eod=None))
    with pytest.raises(ValueError, match="does not say which token ends a document; name one with --eod-token"):
        prepare(source, "bytes", out, overwrite=True)


def test_append():
    ids, lengths = append(np.array([1, 2, 3], np.uint16), np.array([0, 2, 0, 1]), 9)
    assert ids.tolist() == [9, 1, 2, 9, 9, 3, 9] and ids.dtype == np.uint16
    assert lengths.tolist() == [1, 3, 1, 2]


@pytest.mark.parametrize("content", [b"", b"\n\n \n"])
@pytest.mark.parametrize("documents", ["file", "line"])
def test_nothing_to_write(tmp_path, content, documents):
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(ValueError, match=r"there is no text in .*a.txt .*nothing was written"):
        prepare([str(tmp_path / "a.txt")], "bytes", str(tmp_path / "out"), ReadOptions(documents=documents))
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_a_long_broken_document_is_left_out_whole(tmp_path):
    good = corpus("english", 700_000)
    (tmp_path / "1.txt").write_bytes(good.encode() + b"\xff" + good.encode())
    (tmp_path / "2.txt").write_text(good)
    progress = prepare([str(tmp_path)], "bytes", str(tmp_path / "out"), ReadOptions(errors="skip"))
    assert texts_of(tmp_path / "out") == [good]
    assert progress.num_documents == 1 and progress.num_broken == 1


class Writer:
    """Keeps what a `LongDocument` writes."""

    def __init__(self) -> None:
        self.sequences: list[list[int]] = []
        self.ended = 0

    def add_sequence(self, ids: np.ndarray) -> None:
        self.sequences.append(ids.tolist())

    def end_document(self) -> None:
        self.ended += 1


def part(ids: list[int], starts: bool, ends: bool, num_broken: int = 0) -> encode.Tokenised:
    return encode.Tokenised(np.array(ids), np.array([len(ids)]), starts, ends, 0, 0, num_broken=num_broken)


def test_a_broken_part_drops_the_others():
    long = LongDocument(writer := Writer())
    for arguments in (([1], True, False), ([2], False, True), ([3], True, False, 1), ([4], False, True)):
        long.add(part(*arguments))
    for arguments in (([5], True, False), ([6], False, False), ([7], False, True)):
        long.add(part(*arguments))
    assert writer.sequences == [[1, 2], [5, 6, 7]] and writer.ended == 2


def test_what_is_written_of_a_broken_document_does_not_run_into_the_next(monkeypatch):
    monkeypatch.setattr("megacore.data.prepare.MAX_SEQUENCE", 2)
    long = LongDocument(writer := Writer())
    for arguments in (([1, 2], True, False), ([3], False, False, 1), ([4], False, True), ([5], True, True)):
        long.add(part(*arguments))
    assert writer.sequences == [[1, 2], [5]] and writer.ended == 2


def test_an_existing_data_set_is_kept(tmp_path):
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "bad.txt").write_bytes(b"\xff")
    out = str(tmp_path / "out")
    prepare([str(tmp_path / "a.txt")], "bytes", out)
    before = content(out)
    with pytest.raises(ValueError, match="out.idx exists already; say --overwrite"):
        prepare([str(tmp_path / "a.txt")], "bytes", out)
    for workers in (1, 2):
        with pytest.raises(ValueError, match="not UTF-8"):
            prepare([str(tmp_path / "bad.txt")], "bytes", out, overwrite=True, workers=workers)
    assert content(out) == before
    (tmp_path / "a.txt").write_text("second")
    prepare([str(tmp_path / "a.txt")], "bytes", out, overwrite=True)
    assert texts_of(out) == ["second"]


def test_two_writers_of_one_data_set(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    out = str(tmp_path / "out")
    with output_lock(out, overwrite=False):
        with pytest.raises(ValueError, match="another process is writing"):
            prepare([str(tmp_path / "a.txt")], "bytes", out)
    prepare([str(tmp_path / "a.txt")], "bytes", out)


@pytest.mark.parametrize("name", ["folder/", "data.bin", "data.idx"])
def test_output_names_that_cannot_be_meant(tmp_path, name):
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(ValueError, match="must be a path without ending"):
        prepare([str(tmp_path / "a.txt")], "bytes", str(tmp_path) + "/" + name)


def test_an_output_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(ValueError, match="cannot write in .*a.txt"):
        prepare([str(tmp_path / "a.txt")], "bytes", str(tmp_path / "a.txt" / "out"))


KILLED = """
import sys
from megacore.data.prepare import prepare
if __name__ == "__main__":
    def tell(progress):
        print(progress.num_documents, flush=True)
    prepare([sys.argv[1]], "bytes", sys.argv[2], workers=2, overwrite=True, on_progress=tell)
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_kill_leaves_nothing_half_done(tmp_path, how):
    source = write_jsonl(tmp_path / "a.jsonl", [corpus("english", 2000, i) for i in range(20)] * 2000)
    out = tmp_path / "out"
    (tmp_path / "script.py").write_text(KILLED)
    command = [sys.executable, str(tmp_path / "script.py"), source, str(out)]
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": root}
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored where a shell began us behind it
    )
    for _ in range(3):
        assert process.stdout.readline().strip().isdigit()
    workers = children_of(process.pid)
    assert len(workers) >= 2
    process.send_signal(how)
    process.communicate(timeout=30)
    assert process.returncode != 0
    assert not out.with_suffix(".idx").exists() and not out.with_suffix(".bin").exists()
    deadline = time.monotonic() + 20
    while alive := [pid for pid in workers if Path(f"/proc/{pid}").exists()]:
        assert time.monotonic() < deadline, f"workers {alive} outlive their parent"
        time.sleep(0.05)
    (tmp_path / "b.txt").write_text("again")
    prepare([str(tmp_path / "b.txt")], "bytes", str(out))  # neither lock nor leftovers stand in the way
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith((".", "out"))) == [
        "out.bin",
        "out.idx",
        "out.meta.json",
    ]


def children_of(pid: int) -> list[int]:
    """Processes started by `pid`, and by those."""
    found = []
    for path in Path("/proc").iterdir():
        try:
            if path.name.isdigit() and int((path / "stat").read_text().rpartition(")")[2].split()[1]) == pid:
                found += [int(path.name), *children_of(int(path.name))]
        except (OSError, ValueError):
            continue
    return found


def test_merging(tmp_path, model):
    one, two, three = (str(tmp_path / name) for name in ("one", "two", "three"))
    prepare([write_jsonl(tmp_path / "a.jsonl", FULL[:2])], model, one)
    prepare([write_jsonl(tmp_path / "b.jsonl", FULL[2:])], model, two)
    prepare([str(tmp_path / "a.jsonl")], "bytes", three)
    out = str(tmp_path / "deep" / "out")
    meta = merge_datasets([one, two], out)
    assert texts_of(out, model) == FULL
    assert DataMeta.load(IndexedDataset(out)) == meta and meta.tokenizer == model
    with pytest.raises(ValueError, match="made with different tokenizers"):
        merge_datasets([one, three], str(tmp_path / "other"))
    with pytest.raises(ValueError, match="exists already; say --overwrite"):
        merge_datasets([one, two], out)
    with pytest.raises(ValueError, match="into itself"):
        merge_datasets([one, two], one, overwrite=True)
    assert texts_of(one, model) == FULL[:2]
