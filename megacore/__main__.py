"""`megacore COMMAND ...`: the table of commands.

Nothing is imported until a command is chosen, so that `--help` answers at once. A command's module has
`main(argv) -> int`; `exits.py` runs it.
"""

import signal
import sys
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from megacore import __version__
from megacore.exits import STOPPED, run

COMMANDS: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "train": ("megacore.launch.train", "train a model: RUN.toml or --preset NAME, then key=value overrides"),
        "launch": (
            "megacore.launch.jobs",
            "write and start a job of one node or many: local, Slurm, Kubernetes, SkyPilot",
        ),
        "plan": ("megacore.tools.plan", "find the fastest layout that fits, or price one: memory, time, money"),
        "demo": ("megacore.tools.demo", "from real text to a trained model on this machine, in a few minutes"),
        "data": ("megacore.tools.data", "make a tokenizer, tokenise, inspect and merge corpora, build sample indices"),
        "verify": ("megacore.tools.verify", "prove that layouts compute what one process computes"),
        "inspect": ("megacore.tools.inspect_checkpoint", "what is inside a checkpoint, a run or a Hugging Face folder"),
        "convert": (
            "megacore.tools.convert",
            "weights to and from Hugging Face folders, and whether they are right",
        ),
        "schedule": ("megacore.tools.schedule", "generate, prove, simulate and draw a pipeline schedule"),
        "report": ("megacore.tools.report", "one page about a run: curves, events, where time and memory went"),
        "bench": ("megacore.tools.bench", "measure, as ratios to other implementations"),
        "doctor": ("megacore.launch.doctor", "what this machine has, what is missing, why, and the line that fixes it"),
        "presets": ("megacore.tools.presets", "list the known models with their shapes and parameter counts"),
        "config": ("megacore.tools.config", "show, compare and explain run files"),
    }
)


def usage() -> str:
    """What `megacore --help` prints."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {help_line}" for name, (_, help_line) in COMMANDS.items()]
    return "\n".join(
        ["usage: megacore COMMAND [arguments]", "", "commands:", *lines, "", "`megacore COMMAND --help` tells more."]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that `argv` names and return the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if words else 2
    if words[0] in ("-V", "--version"):
        print(f"megacore {__version__}")
        return 0
    if words[0] not in COMMANDS:
        print(unknown(words[0]), file=sys.stderr)
        return 2
    module, _ = COMMANDS[words[0]]
    code = run(module, words[1:])
    if code == STOPPED:  # schedulers repeat themselves: a second signal must not hide that all is saved
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, signal.SIG_IGN)
    return code


def unknown(word: str) -> str:
    """What is said to a word that is no command."""
    from difflib import get_close_matches

    near = get_close_matches(word, COMMANDS, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"the commands are {', '.join(COMMANDS)}"
    return f"megacore: there is no command {word!r}; {hint}"


if __name__ == "__main__":
    sys.exit(main())
