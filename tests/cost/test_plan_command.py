"""`megacore plan`: what it prints, how fast and light it starts, and what it says to wrong input."""

import json
import subprocess
import sys

import pytest

from megacore.tools.plan import main

# Runs the command in this process and says which heavy modules it needed.
PROBE = """
import sys
from megacore.__main__ import main
code = main(["plan", *sys.argv[1:]])
print("heavy:", *(n for n in ("torch", "transformers", "matplotlib") if n in sys.modules), file=sys.stderr)
sys.exit(code)
"""
SMALL = ["model.num_layers=4", "model.hidden_size=1024", "model.num_heads=8", "model.vocab_size=32000",
         "train.seq_len=1024", "parallel.cp=1", "parallel.schedule=1f1b", "train.micro_batch_size=2"]  # fmt: skip


def test_search_without_torch():
    done = subprocess.run(
        [sys.executable, "-c", PROBE, "--preset", "llama3-8b", "--gpus", "16", "--json", "parallel.schedule=1f1b"],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[-1] == "heavy:"
    listed = json.loads(done.stdout)
    assert len(listed) == 5
    speeds = [each["tokens_per_s_per_gpu"] for each in listed]
    assert speeds == sorted(speeds, reverse=True)
    assert all(each["fits"] for each in listed)


def test_estimate_is_one_object(capsys):
    assert (
        main([*SMALL, "--gpus", "4", "--estimate", "parallel.tp=2", "parallel.pp=2", "--json", "--tokens", "1B"]) == 0
    )
    found = json.loads(capsys.readouterr().out)
    assert (found["layout"]["tp"], found["layout"]["pp"], found["layout"]["dp"]) == (2, 2, 1)
    assert found["bill"]["tokens"] == 1e9


def test_screen_says_everything(capsys, tmp_path):
    words = [*SMALL, "--gpus", "8", "--tokens", "1B", "--deadline", "30", "--plot", str(tmp_path / "plots")]
    assert main([*words, "--html", str(tmp_path / "plan.html")]) == 0
    shown = capsys.readouterr().out
    for said in ("8 x ", "tok/s/GPU", "where a step goes", "runner-up", "data parallel alone", "goodput", "GPU-hours",
                 "done in 30 days with 8 GPUs", "[parallel]", 'dtype = "bf16"'):  # fmt: skip
        assert said in shown, said
    drawn = {path.name for path in (tmp_path / "plots").iterdir()}
    assert {"memory.svg", "layouts.svg", "mesh.svg", "scaling.svg"} <= drawn
    assert (tmp_path / "plan.html").read_text(encoding="utf-8").startswith("<!doctype html>")


def test_list_of_machines(capsys):
    assert main(["--gpu", "list"]) == 0
    assert "h100" in capsys.readouterr().out
    assert main(["--gpu", "list", "--json"]) == 0
    assert {"a100-80gb", "h100", "h200", "b200"} <= {each["name"] for each in json.loads(capsys.readouterr().out)}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "needs a run file, --preset NAME or model.* keys"),
        (["--preset", "lama3-8b"], "did you mean llama3-8b?"),
        (["--preset", "llama3-8b", "--gpu", "h101"], "h100"),
        (["--preset", "llama3-8b", "--gpus", "0"], "--gpus=0"),
        (["--preset", "llama3-8b", "--top", "0"], "--top=0"),
        (["--preset", "llama3-8b", "--price", "-1"], "--price=-1"),
        (["--preset", "llama3-8b", "--deadline", "3"], "needs --tokens"),
        (["--preset", "llama3-8b", "--html", "/nowhere/plan.html"], "--html=/nowhere/plan.html cannot be written"),
        (["--preset", "llama3-8b", "--estimate", "--gpus", "6", "parallel.tp=4"], "does not divide the 6 ranks"),
        (["--preset", "llama3-8b", "parallel.tq=4"], "parallel.tq is not a key"),
        (["--preset", "gpt3-175b", "--gpus", "8"], "does not fit: at least"),
        (["--preset", "llama3-8b", "--gpus", "64", "--global-batch", "7", "parallel.dp=64"], "is not a multiple of"),
        (["nothing.toml"], "there is no run file nothing.toml"),
    ],
)
def test_wrong_input(words, said):
    with pytest.raises(ValueError, match=said.replace("*", r"\*").replace("?", r"\?")):
        main(words)


def test_numbers_of_tokens():
    with pytest.raises(SystemExit):
        main([*SMALL, "--tokens", "many"])


def test_what_is_not_built_is_named_and_not_ranked(capsys):
    """Context parallelism would be faster here: said in a note, ranked with --all."""
    words = ["--preset", "llama3-70b", "--gpus", "128", "--json", "--top", "1"]
    assert main(words) == 0
    ranked = json.loads(capsys.readouterr().out)
    assert {each["layout"]["cp"] for each in ranked} == {1}
    assert any("not built yet: " in note and "--all" in note for note in ranked[0]["notes"])
    assert main([*words, "--all"]) == 0
    faster = json.loads(capsys.readouterr().out)[0]
    assert faster["layout"]["cp"] > 1
    assert faster["tokens_per_s_per_gpu"] > ranked[0]["tokens_per_s_per_gpu"]
