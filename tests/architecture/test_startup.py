"""`--help` answers at once: nothing heavy is imported before a command knows what to do."""

import subprocess
import sys

import pytest

from megacore.__main__ import COMMANDS

# Runs a command line in this process, then says on stderr which heavy modules came in.
PROBE = """
import sys
from megacore.__main__ import main
try:
    code = main(sys.argv[1:])
except SystemExit as exit:
    code = exit.code
known = ("numpy", "torch", "transformers", "matplotlib", "pyarrow", "sentencepiece")
heavy = [name for name in known if name in sys.modules]
print("heavy:", *heavy, file=sys.stderr)
sys.exit(code)
"""


@pytest.mark.parametrize("words", [["--help"], ["--version"], *([name, "--help"] for name in COMMANDS)], ids=" ".join)
def test_help_imports_nothing_heavy(words):
    done = subprocess.run([sys.executable, "-c", PROBE, *words], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout
    assert done.stderr.splitlines()[-1] == "heavy:"


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
