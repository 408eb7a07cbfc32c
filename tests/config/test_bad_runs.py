"""200 bad runs, made at random from a good one: each gives exit code 2 and a message that names the key."""

import random
import subprocess
import sys
import time

import pytest

from megacore.config.bounds import BOUNDS
from megacore.config.load import all_keys
from megacore.config.schema import RunConfig
from megacore.config.write import flatten
from megacore.exits import run

NUM_RUNS = 200
DEFAULTS = flatten(RunConfig())


def misspelled(rng, key):
    """The key with two letters swapped, one doubled or one left out."""
    section, dot, name = key.rpartition(".")
    at = rng.randrange(len(name) - 1)
    return (
        section
        + dot
        + rng.choice(
            (
                name[:at] + name[at] + name[at:],
                name[:at] + name[at + 1] + "_" + name[at] + name[at + 2 :],
                name[:at] + name[at + 1 :] + "_",
            )
        )
    )


def bad_override(rng):
    """(override, what its message must name)."""
    kind = rng.choice(("unknown", "type", "choice", "bound", "section", "syntax"))
    key = rng.choice(sorted(DEFAULTS))
    if kind == "unknown":
        wrong = misspelled(rng, key)
        return f"{wrong}=1", wrong
    if kind == "type":
        numbers = [key for key, value in DEFAULTS.items() if isinstance(value, (int, float))]
        key = rng.choice(numbers)
        return f"{key}={rng.choice(('many', 'nan', '[1, 2]', '1..2', '', '{x=1}'))}", key
    if kind == "choice":
        key = rng.choice([key for key, field in all_keys().items() if field.metadata["choices"]])
        return f"{key}={rng.choice(all_keys()[key].metadata['choices'])}x", key
    if kind == "bound":
        key = rng.choice(sorted(BOUNDS))
        below = rng.randint(2, 9)  # -1 may have a meaning of its own
        return f"{key}={BOUNDS[key].low - below}", key
    if kind == "section":
        section = rng.choice(("model", "parallel", "optim", "data", "model.rope_scaling"))
        return f"{section}={rng.choice(('3', 'x', 'true', '[1]'))}", section
    return rng.choice((f"={key}", f".{key}=1", f"{key}.=1")), "is not an override"


@pytest.mark.parametrize("seed", range(NUM_RUNS))
def test_a_bad_run_gives_exit_code_2_and_names_the_key(seed, capsys):
    override, named = bad_override(random.Random(seed))
    code = run("megacore.tools.config", ["show", "--preset", "llama3-8b", override])
    shown = capsys.readouterr()
    assert code == 2, override
    assert not shown.out
    assert "Traceback" not in shown.err
    (line,) = shown.err.splitlines()
    assert line.startswith("megacore: ")
    assert named in line


def test_training_refuses_all_of_them_before_anything_starts(capsys, tmp_path):
    """Each in a fraction of the three seconds, by the very command that would train."""
    for seed in range(NUM_RUNS):
        override, named = bad_override(random.Random(seed))
        began = time.monotonic()
        out = tmp_path / str(seed)
        code = run("megacore.launch.train", ["--preset", "llama3-8b", f"out={out}", override])
        shown = capsys.readouterr()
        assert (code, shown.out) == (2, ""), override
        assert "Traceback" not in shown.err and named in shown.err and shown.err.startswith("megacore: ")
        assert time.monotonic() - began < 3 and not out.exists()


def test_a_process_that_is_asked_to_train_a_bad_run_does_not_load_torch():
    command = [sys.executable, "-X", "importtime", "-m", "megacore", "train", "--preset", "llama3-8b"]
    began = time.monotonic()
    done = subprocess.run([*command, "model.num_layers=many"], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 2 and time.monotonic() - began < 3
    assert "model.num_layers=many must be an integer" in done.stderr
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "megacore.config.load" in loaded and "torch" not in loaded
