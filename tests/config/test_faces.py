"""`megacore presets` and `megacore config`: what they print, and that it is what they say."""

import json

import pytest

from megacore.config.load import load
from megacore.config.presets import preset_names
from megacore.config.resolve import resolve
from megacore.exits import run


@pytest.fixture
def megacore(capsys):
    """Runs a face's command line: (exit code, stdout, stderr)."""

    def call(face, *words):
        code = run(f"megacore.tools.{face}", list(words))
        shown = capsys.readouterr()
        return code, shown.out, shown.err

    return call


def test_presets_as_table_and_as_json(megacore):
    _, table, _ = megacore("presets")
    code, text, _ = megacore("presets", "--json")
    rows = json.loads(text)
    assert code == 0
    assert {row["name"] for row in rows} == set(preset_names())
    assert [row["parameters"] for row in rows] == sorted(row["parameters"] for row in rows)
    assert all(f"{row['parameters']:,}" in table for row in rows)


def test_show_prints_a_run_that_loads_again(megacore, tmp_path):
    code, out, err = megacore("config", "show", "--preset", "demo", "parallel.tp=2", "--ranks", "4", "train.seq_len=64")
    path = tmp_path / "run.toml"
    path.write_text(out, encoding="utf-8")
    assert (code, err) == (0, "")
    assert load(str(path)) == resolve(load(None, ["parallel.tp=2", "train.seq_len=64"], "demo"), 4)


def test_show_tells_what_training_would_refuse(megacore):
    code, out, err = megacore("config", "show", "--preset", "llama3-70b", "parallel.tp=8", "parallel.cp=4")
    assert code == 0
    assert "cp = 4" in out
    assert "training would refuse: parallel.cp=4 is not supported yet" in err


def test_show_derives_chunks(megacore):
    for schedule, chunks in (("zb-v", 2), ("dualpipe-v", 2), ("interleaved", 1)):
        _, out, err = megacore(
            "config", "show", "--preset", "llama3-8b", "parallel.pp=4", f"parallel.schedule={schedule}", "--json"
        )
        assert (json.loads(out)["parallel.chunks"], err) == (chunks, "")


def test_show_json_is_flat(megacore):
    _, out, _ = megacore("config", "show", "--preset", "demo", "--json")
    assert json.loads(out)["model.family"] == "llama"


def test_diff(megacore, tmp_path):
    assert megacore("config", "diff", "demo", "demo")[1] == "the two runs are the same\n"
    path = tmp_path / "run.toml"
    path.write_text(megacore("config", "show", "--preset", "demo", "optim.lr=0.5")[1], encoding="utf-8")
    _, out, _ = megacore("config", "diff", "demo", str(path))
    assert out.startswith("optim.lr: ") and out.endswith("-> 0.5\n")
    _, out, _ = megacore("config", "diff", "demo", str(path), "--json")
    assert json.loads(out)["optim.lr"][1] == 0.5


@pytest.mark.parametrize(
    ("word", "keys"),
    [("optim.lr", 1), ("lr", 1), ("rope_scaling", 10), ("checkpoint", 10), ("model.norm", 1)],
)
def test_explain_finds_keys_by_any_part_of_their_name(megacore, word, keys):
    code, out, _ = megacore("config", "explain", word, "--json")
    assert code == 0
    assert len(json.loads(out)) == keys
    assert all(word in row["key"] for row in json.loads(out))


def test_explain_says_type_default_and_choices(megacore):
    _, out, _ = megacore("config", "explain", "model.norm")
    assert out.startswith('model.norm  (str, default "rmsnorm"; one of rmsnorm, layernorm)\n')
    _, out, _ = megacore("config", "explain", "parallel.schedule")
    assert "zb-v, dualpipe-v or a .txt file)" in out
    assert megacore("config", "explain", "lrr")[2] == "megacore: there is no key lrr; did you mean lr?\n"


def test_a_negative_number_of_ranks_is_refused(megacore):
    code, _, err = megacore("config", "show", "--preset", "demo", "--ranks", "-1")
    assert (code, err) == (2, "megacore: --ranks=-1 must be at least 1\n")
