"""`megacore bench data` finds its benchmarks, leaves out what is not installed, and tokenises on both sides."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from megacore.bench import data, data_tokenize
from megacore.bench.data import Benchmark, benchmarks
from megacore.bench.harness import Comparison, comparison
from megacore.tools import bench


def told(rounds: int) -> Comparison:
    return comparison("told", "ours", {"ours": [1.0] * rounds, "theirs": [2.0] * rounds}, {})


HERE = Benchmark("indices: here", "json", told)
ABSENT = Benchmark("tokenise: absent", "no_such_package", told)


def test_benchmarks_are_found_by_words_of_their_name() -> None:
    assert {one.name.partition(":")[0] for one in benchmarks()} == {"indices", "tokenise"}
    assert [one.package for one in benchmarks("one document, sentencepiece")] == ["sentencepiece"]
    with pytest.raises(ValueError, match="no benchmark's name contains 'layouts'; there are indices"):
        benchmarks("layouts")


def test_what_is_not_installed_is_left_out_and_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(data, "_all", lambda: iter((HERE, ABSENT)))
    assert bench.main(["data", "--rounds", "3", "--json", "--output", str(tmp_path)]) == 0
    shown = capsys.readouterr()
    assert [one["name"] for one in json.loads(shown.out)["comparisons"]] == ["told"]
    assert "left out: what compares with no_such_package" in shown.err
    assert (tmp_path / "data.csv").exists()
    with pytest.raises(ValueError, match="nothing to compare with: no_such_package"):
        bench.main(["data", "--case", "absent"])


@pytest.mark.parametrize("library", ["sentencepiece", "tokenizers"])
def test_tokenising_is_timed_on_both_sides(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip(library)
    monkeypatch.setattr(data_tokenize, "VOCAB_SIZE", 400)
    case = replace(data_tokenize.CASES[0], library=library, documents="lines")
    result = data_tokenize.measure(case, rounds=2, max_bytes=40_000)
    assert [side.name for side in result.sides] == ["prepare", "library"]
    assert all(len(side.seconds) == 2 and side.best > 0 for side in result.sides)
