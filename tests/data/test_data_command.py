"""`megacore data`: what users type and see."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megacore.corpora.progress import ProgressDisplay, progress_line
from megacore.data.indexed import IndexedDataset, IndexedWriter
from megacore.data.meta import DataMeta
from megacore.data.prepare import Progress
from megacore.exits import run
from megacore.monitor.console import Console
from tests.data.texts import corpus


@pytest.fixture
def command(capsys, monkeypatch, tmp_path):
    """command(words...) -> (exit code, stdout, stderr), run in the test's folder."""
    monkeypatch.chdir(tmp_path)
    # The command would keep this handler for the rest of the test run.
    monkeypatch.setattr("signal.signal", lambda number, handler: None)

    def call(*words: str) -> tuple[int, str, str]:
        code = run("megacore.tools.data", list(words))
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture
def prepared(command, tmp_path):
    """A folder with text, a tokenizer and a data set."""
    (tmp_path / "text.txt").write_text(corpus("english", 30_000))
    assert command("tokenizer", "--input", "text.txt", "--output", "t.model", "--vocab-size", "400")[0] == 0
    words = ("--input", "text.txt", "--tokenizer", "t.model", "--output", "data", "--documents", "line")
    assert command("prepare", *words, "--workers", "1")[0] == 0
    return tmp_path


def test_from_text_to_a_data_set(command, prepared):
    code, out, err = command("inspect", "data", "--json", "--samples", "2")
    facts = json.loads(out)
    dataset = IndexedDataset(prepared / "data")
    assert code == 0 and err == ""
    expected = {
        "documents": dataset.num_documents,
        "sequences": dataset.num_sequences,
        "tokens": dataset.num_tokens,
        "dtype": "uint16",
        "vocab_size": 400,
        "tokenizer": str(prepared / "t.model"),
        "longest": int(dataset.lengths.max()),
        "shortest": int(dataset.lengths.min()),
        "max_id": int(dataset.tokens.max()),
        "checked": 1.0,
        "eod": 2,
    }
    assert {name: facts[name] for name in expected} == expected
    assert len(facts["samples"]) == 2 and (prepared / "text.txt").read_text().startswith(facts["samples"][0])
    code, out, err = command("inspect", "data", "--samples", "1")
    assert f"documents   {dataset.num_documents:,}" in out and "sample 1" in out


def test_results_as_json(command, prepared):
    code, out, err = command("tokenizer", "--input", "text.txt", "--output", "u.model", "--vocab-size", "300", "--json")
    assert code == 0 and json.loads(out)["vocab_size"] == 300 and "training 300 tokens" in err
    code, out, err = command("prepare", "--input", "text.txt", "--tokenizer", "bytes", "--output", "b", "--json")
    assert code == 0 and json.loads(out)["tokens"] == 30_001
    code, out, err = command("merge", "b", "b", "--output", "bb", "--json")
    assert code == 0 and json.loads(out)["tokens"] == 60_002
    code, out, err = command("index", "data", "--seq-len", "32", "--samples", "500", "--json")
    facts = json.loads(out)
    assert code == 0 and facts["samples"] == 500 and facts["epochs"] == 500 * 32 / facts["tokens"]


def test_an_index_in_megatron_order_is_kept(command, prepared):
    words = ("index", "data", "--seq-len", "32", "--samples", "500", "--order", "megatron", "--cache", "kept")
    assert command(*words)[0] == 0
    assert list((prepared / "kept").glob("*/manifest.json"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("inspect", "nothing"), "nothing.idx does not exist"),
        (("inspect", "data.bin"), "give the prefix without its ending"),
        (
            ("prepare", "--input", "none", "--tokenizer", "bytes", "--output", "x"),
            "--input none: there is no such file",
        ),
        (("prepare", "--input", "text.txt", "--tokenizer", "no", "--output", "x"), "data.tokenizer='no': there is no"),
        (("prepare", "--input", "text.txt", "--tokenizer", "bytes", "--output", "data"), "say --overwrite"),
        (
            ("prepare", "--input", "text.txt", "--tokenizer", "bytes", "--output", "x", "--workers", "-1"),
            "--workers -1 must be at least 1",
        ),
        (("tokenizer", "--input", "text.txt", "--output", "t.model", "--vocab-size", "300"), "say --overwrite"),
        (("merge", "data", "data", "--output", "data"), "say --overwrite"),
        (("index", "data", "--seq-len", "32", "--samples", "5", "--shares", "a"), "--shares a must be numbers"),
        (("index", "data", "--seq-len", "32", "--samples", "0"), "--samples 0 must be"),
        (("index", "data", "--seq-len", "0", "--samples", "1"), "--seq-len 0 must be"),
    ],
)
def test_wrong_input_is_told(command, prepared, words, message):
    code, out, err = command(*words)
    assert code == 2 and out == ""
    assert message in err and err.startswith("megacore: ") and "Traceback" not in err


def test_tokens_beyond_the_vocabulary_are_found(command, tmp_path):
    with IndexedWriter(tmp_path / "data", np.uint16) as writer:
        for document in ([1, 2], [3, 400, 5], [6]):
            writer.add_document(np.array(document))
    derived = DataMeta.derive(IndexedDataset(tmp_path / "data"))
    counts = (derived.num_documents, derived.num_sequences, derived.num_tokens, derived.fingerprint)
    DataMeta(*counts, tokenizer="bytes", vocab_size=257, eod=256).save(tmp_path / "data")
    code, out, err = command("inspect", "data")
    assert code == 2
    assert "token id 400 in document 1 is beyond the vocabulary of 257" in err
    assert "largest id  400 of 257" in out


def test_a_data_set_of_another_tool(command, prepared):
    (prepared / "data.meta.json").unlink()
    code, out, err = command("inspect", "data")
    assert code == 0 and "tokenizer   not noted (made by another tool)" in out
    code, out, err = command("inspect", "data", "--json")
    assert json.loads(out)["vocab_size"] is None


def test_progress_lines():
    progress = Progress(total=4_000_000, num_files=2, consumed=1_000_000, num_bytes=3_000_000)
    progress.num_documents, progress.num_tokens, progress.seconds = 1234, 900_000, 2.0
    assert progress_line(progress, 0) == " 25%  1,234 documents  900k tokens  1.5 MB/s  ETA 6.00 s"
    assert progress_line(progress, 8) == "██       25%  1,234 documents  900k tokens  1.5 MB/s  ETA 6.00 s"
    progress.total = 0
    assert progress_line(progress, 8) == "1,234 documents  900k tokens  1.5 MB/s"


@pytest.mark.parametrize("live", [True, False])
def test_progress_is_shown_now_and_then(live):
    import io

    stream = io.StringIO()
    display = ProgressDisplay(Console(stream, colour=live))
    for tenth in range(300):  # 30 seconds
        display.update(Progress(100, 1, consumed=tenth // 3, seconds=tenth / 10))
    if live:
        assert stream.getvalue().count("\r") > 200
    else:
        assert stream.getvalue().count("\n") == 2 and "\r" not in stream.getvalue()


@pytest.mark.parametrize(("name", "value"), [("NO_COLOR", "1"), ("TERM", "dumb"), ("TERM", "xterm")])
def test_a_terminal_that_wants_no_escape_codes_gets_none(command, prepared, monkeypatch, name, value):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv(name, value)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    words = ("--input", "text.txt", "--tokenizer", "bytes", "--output", "again", "--workers", "1")
    code, _, err = command("prepare", *words)
    assert code == 0 and ("\r" in err) == (value == "xterm") and ("\x1b" not in err or value == "xterm")


@pytest.mark.parametrize("start", [["-m", "megacore", "data"], ["-m", "megacore.tools.data"], ["tools/data.py"]])
def test_all_faces_are_the_same(start, tmp_path):
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, *start, "inspect", str(tmp_path / "none")],
        capture_output=True,
        text=True,
        cwd=root,
        timeout=60,
    )
    assert done.returncode == 2
    assert done.stderr.startswith(f"megacore: {tmp_path / 'none'}.idx does not exist")
