"""Another vocabulary of the same size changes what every id means: a run does not go on with it, nor is it exported."""

import json
from pathlib import Path

import pytest

from megacore.checkpoint.hf.same_tokenizer import joined
from megacore.launch.train import main
from megacore.tools.convert import main as convert
from tests.train.runs import EOD, STEPS, events, figures, interrupted, told, words_of

tokenizers = pytest.importorskip("tokenizers")


def write_tokenizer(path: Path, shift: int) -> Path:
    """257 words, whose ids ``shift`` moves on."""
    vocabulary = {f"w{(number + shift) % EOD}": number for number in range(EOD)}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="w0"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.add_special_tokens(["<|endoftext|>"])
    made.save(str(path))
    return path


@pytest.fixture
def own(tmp_path: Path) -> Path:
    return write_tokenizer(tmp_path / "own.json", 0)


@pytest.fixture
def other(tmp_path: Path) -> Path:
    return write_tokenizer(tmp_path / "other.json", 1)


def vocabulary(file: Path) -> dict[str, int]:
    found: dict[str, int] = json.loads(file.read_text())["model"]["vocab"]
    return found


def test_a_run_goes_on_with_its_own_alone(
    letters: str,
    own: Path,
    other: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Data from elsewhere do not say which one they were made with; the checkpoint does."""
    out = tmp_path / "run"
    interrupted(monkeypatch, 4, words_of(letters, out, f"data.tokenizer={own}"))
    before = figures(out)
    error = told(capsys, words_of(letters, out, f"data.tokenizer={other}"))
    assert f"data.tokenizer='{other}' is not the tokenizer that the checkpoint" in error and "would mean" in error
    moved = own.rename(tmp_path / "moved.json")
    write_tokenizer(own, 1)
    assert "content hash" in told(capsys, words_of(letters, out, f"data.tokenizer={own}")), "the file was rewritten"
    assert figures(out) == before
    assert main(words_of(letters, out, f"data.tokenizer={moved}")) == 0
    assert events(out, "resume")[0]["step"] == 2


def test_an_export_has_the_tokenizer_of_the_run(letters: str, own: Path, other: Path, tmp_path: Path) -> None:
    """Also where the weights came with another one, which is told."""
    first, second = tmp_path / "first", tmp_path / "second"
    assert main(words_of(letters, first, f"data.tokenizer={other}", f"checkpoint.export_hf_every={STEPS}")) == 0
    (export,) = events(first, "export")
    folder = Path(export["folder"])
    assert vocabulary(folder / "tokenizer.json") == vocabulary(other)
    begun = (f"checkpoint.init_from={folder}", f"data.tokenizer={own}", f"checkpoint.export_hf_every={STEPS}")
    assert main(words_of(letters, second, *begun)) == 0
    (warning,) = events(second, "warning")
    assert f"data.tokenizer={own} is not the one of the HF folder {folder}" in warning["text"]
    (export,) = events(second, "export")
    assert vocabulary(Path(export["folder"]) / "tokenizer.json") == vocabulary(own)


def test_what_has_another_one_beside_it_is_not_exported(
    letters: str, own: Path, other: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody put another file in its place while the run began: between its being opened and its being kept."""
    out, attached = tmp_path / "run", {"tokenizer/own.json": other.read_bytes()}
    monkeypatch.setattr("megacore.train.loop.tokenizer_files", lambda spec: attached)
    assert main(words_of(letters, out, f"data.tokenizer={own}", f"checkpoint.export_hf_every={STEPS}")) == 0
    (failed,) = events(out, "export_failed")
    assert "is not the one that lies beside its weights" in failed["reason"] and not events(out, "export")
    with pytest.raises(ValueError, match="was trained with the tokenizer of content hash"):
        convert(["to-hf", str(out), str(tmp_path / "hf"), "--workers", "1"])
    assert not (tmp_path / "hf").exists()


def test_what_goes_with_weights() -> None:
    ours, theirs = b'{"model": 1}', b'{"model": 2}'
    came = {"hf/config.json": b"{}", "tokenizer/tokenizer.json": theirs, "tokenizer/chat_template.jinja": b"x"}
    assert joined(came, {}, "") == came, "nothing else is known"
    assert joined(came, {"tokenizer/tokenizer.json": theirs}, "folder") == came
    assert joined(came, {"tokenizer/a.json": ours}, "a.json") == {"hf/config.json": b"{}", "tokenizer/a.json": ours}
    assert joined(came, {}, "tiktoken:gpt2") == {"hf/config.json": b"{}"}
