"""`--help` answers at once: nothing heavy is imported before a command knows what to do."""

import resource
import subprocess
import sys

import pytest

from megacore.__main__ import COMMANDS

MAX_SECONDS = 0.3

# Runs a command line in this process, then says on stderr which heavy modules came in.
PROBE = """
import sys
from megacore.__main__ import main
try:
    code = main(sys.argv[1:])
except SystemExit as exit:
    code = exit.code
heavy = [name for name in ("torch", "transformers", "matplotlib", "pyarrow", "sentencepiece") if name in sys.modules]
print("heavy:", *heavy, file=sys.stderr)
sys.exit(code)
"""


def cpu_seconds(*command):
    """(processor time, result) of the best of three runs: other work on the machine can only add time."""
    runs = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=60)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        runs.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return min(runs), done


@pytest.mark.parametrize("words", [["--help"], ["--version"], *([name, "--help"] for name in COMMANDS)], ids=" ".join)
def test_help_is_quick_and_light(words):
    seconds, done = cpu_seconds("-c", PROBE, *words)
    assert done.returncode == 0, done.stderr
    assert done.stdout
    assert done.stderr.splitlines()[-1] == "heavy:"
    # A machine that is slow or busy just now takes longer even to import argparse, which is 15 ms of those 300.
    bare, _ = cpu_seconds("-c", "import argparse")
    assert seconds < max(MAX_SECONDS, 20 * bare)


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ([], 2, ""),
        (["trian"], 2, "there is no command 'trian'; did you mean 'train'?"),
        (["config", "show", "--preset", "lama3-8b"], 2, "did you mean llama3-8b?"),
        (["config", "show"], 2, "give a run file or --preset NAME"),
    ],
)
def test_wrong_input_gives_a_message_and_no_traceback(words, code, message):
    done = subprocess.run([sys.executable, "-m", "megacore", *words], capture_output=True, text=True, timeout=60)
    assert done.returncode == code
    assert message in done.stderr
    assert "Traceback" not in done.stderr
