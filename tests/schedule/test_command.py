"""`megacore schedule`, as users meet it."""

import json
from pathlib import Path

import pytest

from megacore.cost.simulate import Durations, simulate
from megacore.cost.trace import read_timeline, write_timeline
from megacore.exits import run
from megacore.schedule.generators.generate import KINDS, generate
from megacore.schedule.instruction import COMPUTE, Instruction
from megacore.schedule.lower import lower
from megacore.schedule.text import from_text

SMALL = ("--stages", "3", "--microbatches", "5")
KEYS = [
    "kind", "stages", "chunks", "microbatches", "ranks", "bubble_fraction", "peak_activations", "rank_idle", "checked",
]  # fmt: skip


def command(*words: str) -> int:
    try:
        return run("megacore.tools.schedule", list(words))
    except SystemExit as exit:  # argparse
        return int(exit.code or 0)


def printed(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert command(*words) == 0, capsys.readouterr().err
    return capsys.readouterr().out


@pytest.fixture
def run_timeline(tmp_path: Path) -> str:
    """The file of a run: two ranks, four microbatches, 1F1B; seconds."""
    path = tmp_path / "timeline.json"
    write_timeline(path, simulate(lower(generate("1f1b", 2, 4)), Durations(0.25, 0.5, p2p=0.125)))
    return str(path)


@pytest.mark.parametrize("kind", KINDS)
def test_json_has_the_keys_promised(kind, capsys):
    facts = json.loads(printed(capsys, kind, *SMALL, "--json"))
    schedule = generate(kind, 3, 5)
    timeline = simulate(schedule)
    assert list(facts) == KEYS
    assert facts["ranks"] == [list(map(str, rank)) for rank in schedule.ranks]
    assert facts["stages"] * facts["chunks"] == schedule.num_stages
    assert (facts["kind"], facts["microbatches"], facts["checked"]) == (kind, 5, True)
    assert facts["bubble_fraction"] == timeline.bubble_fraction
    assert facts["rank_idle"] == list(timeline.rank_idle)
    assert len(facts["peak_activations"]) == 3


@pytest.mark.parametrize("kind", KINDS)
def test_text_is_a_file_that_is_read_back(kind, capsys, tmp_path):
    text = printed(capsys, kind, *SMALL, "--text", "--tied")
    assert from_text(text).ranks == lower(generate(kind, 3, 5), tied=True).ranks
    path = tmp_path / "mine.txt"
    path.write_text(text)
    assert printed(capsys, str(path), "--text").splitlines()[1:] == text.splitlines()[1:]
    of_kind = json.loads(printed(capsys, kind, *SMALL, "--json", "--text", "--tied"))
    of_file = json.loads(printed(capsys, str(path), *SMALL, "--json", "--text"))
    assert list(of_kind) == [*KEYS, "instructions"]
    assert of_file.pop("kind") == "file"
    assert of_kind.pop("kind") == kind
    assert of_file == of_kind


def test_a_file_that_only_computes(capsys, tmp_path):
    path = tmp_path / "mine.txt"
    path.write_text("# by hand\n0: F0.0 F0.1 B0.0 B0.1\n1: F1.0 B1.0 F1.1 B1.1\n")
    facts = json.loads(printed(capsys, str(path), "--json", "--forward", "1,2", "--backward", "4", "--p2p", "0.5"))
    assert facts["ranks"][1] == ["F1.0", "B1.0", "F1.1", "B1.1"]
    # 12 on rank 1 from 1.5 on, then p2p and the last backward.
    assert facts["bubble_fraction"] == pytest.approx(1 - 22 / (2 * 18))


def test_times_are_per_stage_or_for_all(capsys):
    words = ("1f1b", "--stages", "2", "--microbatches", "1", "--json", "--backward", "3")
    facts = json.loads(printed(capsys, *words, "--forward", "1,2"))
    assert facts["bubble_fraction"] == pytest.approx(1 - 9 / (2 * 9))
    facts = json.loads(printed(capsys, *words, "--forward", "5"))
    assert facts["bubble_fraction"] == pytest.approx(1 - 16 / (2 * 16))


def test_without_wishes_there_is_a_picture_and_the_figures(capsys):
    out = printed(capsys, "1f1b", "--stages", "4", "--microbatches", "8")
    assert "168 checked, of which 64 compute\n" in out
    assert "activations    at most 4 microbatches' on a rank; 4 on the first\n" in out
    assert "33 long; bubble 27.27%; most idle between its own first and last work: rank 0, 9\n" in out
    assert sum(line.strip().startswith(("0 ", "1 ", "2 ", "3 ")) for line in out.splitlines()) == 4
    assert "\x1b" not in out


@pytest.mark.parametrize("suffix", ["svg", "png"])
def test_pictures_traces_and_json_together(suffix, capsys, tmp_path):
    plot, trace = tmp_path / f"out.{suffix}", tmp_path / "out.json"
    facts = json.loads(printed(capsys, "zb-v", *SMALL, "--json", "--plot", str(plot), "--trace", str(trace)))
    assert list(facts) == KEYS
    assert plot.read_bytes().startswith(b"<?xml" if suffix == "svg" else b"\x89PNG")
    predicted = read_timeline(trace, "predicted")
    assert predicted.schedule == lower(generate("zb-v", 3, 5))
    assert [[str(one) for one in rank if one.op in COMPUTE] for rank in predicted.schedule.ranks] == facts["ranks"]


def test_a_run_is_predicted_with_its_own_times(run_timeline, capsys, tmp_path):
    measured = read_timeline(Path(run_timeline))
    facts = json.loads(printed(capsys, "--measured", run_timeline, "--json"))
    assert list(facts) == [*KEYS, "measured"]
    assert facts["bubble_fraction"] == pytest.approx(measured.bubble_fraction)
    assert facts["measured"] == {
        "bubble_fraction": measured.bubble_fraction,
        "rank_idle": list(measured.rank_idle),
    }
    trace, plot = str(tmp_path / "both.json"), str(tmp_path / "both.svg")
    out = printed(capsys, "gpipe", "--stages", "2", "--microbatches", "8", "--measured", run_timeline,
                  "--trace", trace, "--plot", plot)  # fmt: skip
    assert [line.split()[0] for line in out.splitlines()] == [
        "instructions",
        "activations",
        "simulated",
        "measured",
    ]
    kinds = [read_timeline(Path(trace), name).schedule.kind for name in ("predicted", "measured")]
    assert kinds == ["gpipe", "1f1b"]
    lines = printed(capsys, "--measured", run_timeline).splitlines()
    assert sum(line.startswith("1f1b: 2 ranks") for line in lines) == 2
    assert [line.split()[0] for line in lines[-2:]] == ["simulated", "measured"]
    # GPipe with the run's times: (m + p - 1)(f + t) and a message's time each way
    assert "simulated      7 long" in out


LISTS = "0: F0.0 F0.1 B0.0 B0.1\n1: F1.0 F1.1 B1.0 B1.1\n"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "Name a kind (such as 1f1b) or a file"),
        (["interleavd", *SMALL], "'interleavd' is neither a kind nor a file.txt; did you mean interleaved?"),
        (["1f1b", "--stages", "0", "--microbatches", "5"], "--stages=0 must be at least 1"),
        (["1f1b", "--stages", "2", "--microbatches", "-1"], "--microbatches=-1 must be at least 1"),
        (["1f1b", "--stages", "2"], "--microbatches is missing; 1f1b needs it"),
        (["1f1b", "--stages", "two", "--microbatches", "2"], "argument --stages: invalid int value: 'two'"),
        (["zb-v", *SMALL, "--chunks", "3"], "--chunks=3 does not fit KIND=zb-v"),
        (["1f1b", *SMALL, "--forward", "-1"], "'-1' is no time: give a number of 0 or more"),
        (["1f1b", *SMALL, "--p2p", "1,x"], "'1,x' is no time"),
        (["1f1b", *SMALL, "--forward", "1,2"], "forward has the times of 2 stages, the schedule has 3"),
        (["1f1b", *SMALL, "--max-live", "2"], "rank 0, position 4, F0.2: the rank keeps 3"),
        (["1f1b", *SMALL, "--max-live", "0"], "--max-live=0.0 must be more than 0"),
        (["1f1b", *SMALL, "--plot", "out.pdf"], "--plot=out.pdf: its name says what to draw; end it in .svg or .png"),
        (["1f1b", *SMALL, "--plot", "no/out.svg"], "--plot=no/out.svg cannot be written; name a file in a folder"),
        (["1f1b", *SMALL, "--trace", "."], "--trace=. cannot be written"),
        (["none.txt"], "none.txt cannot be read: No such file or directory"),
        (["{good}", "--stages", "3"], "--stages=3 does not agree with"),
        (["{good}", "--microbatches", "3"], "--microbatches=3 does not agree with"),
        (["{whole}", "--tied"], "these have messages already"),
        (["{bad}"], "bad.txt: line 2: 'F0' is not an instruction"),
        (["{order}"], "order.txt: rank 1, position 4, B1.1: a stage's gradients"),
        (["--measured", "{good}"], "good.txt holds no measured timeline"),
        (["--measured", "none.json"], "none.json cannot be read: No such file"),
        (["zb-h1", "--stages", "2", "--microbatches", "4", "--measured", "{run}"], "takes nan: give it a time"),
    ],
)  # fmt: skip
def test_wrong_input_is_told_and_nothing_is_printed(words, said, capsys, tmp_path, run_timeline):
    files = {
        "good": LISTS,
        "bad": "0: F0.0 B0.0\n0: F0",
        "order": LISTS.replace("B1.0 B1.1", "B1.1 B1.0"),
        "whole": "0: F0.0 B0.0 R0 O",
    }
    paths = {name: tmp_path / f"{name}.txt" for name in files}
    for name, text in files.items():
        paths[name].write_text(text)
    assert command(*(word.format(**paths, run=run_timeline) for word in words)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert said in captured.err
    assert "Traceback" not in captured.err


def test_many_instructions_are_spelt_as_one_is(capsys):
    facts = json.loads(printed(capsys, "dualpipe-v", "--stages", "2", "--microbatches", "120", "--json", "--text"))
    for rank in (*facts["ranks"], *facts["instructions"]):
        assert [str(Instruction.parse(text)) for text in rank] == rank
