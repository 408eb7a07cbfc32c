"""`megacore COMMAND ...`: finds the command's module and turns what it raises into an exit code.

Nothing is imported until a command is chosen, so that `--help` answers at once. A command's module has
`main(argv) -> int`.

Exit codes: 0 done; 1 a fault (with a traceback); 2 the user's input is wrong (a message on stderr);
75 stopped on request after saving; 130 interrupted from the keyboard.
"""

import os
import sys
import traceback
from collections.abc import Mapping, Sequence
from importlib import import_module
from types import MappingProxyType, TracebackType

from megacore import __version__

COMMANDS: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "train": ("megacore.launch.train", "train a model: RUN.toml or --preset NAME, then key=value overrides"),
        "demo": ("megacore.tools.demo", "from real text to a trained model on this machine, in a few minutes"),
        "data": ("megacore.tools.data", "make a tokenizer, tokenise, inspect and merge corpora, build sample indices"),
        "bench": ("megacore.tools.bench", "measure, as ratios to other implementations"),
        "presets": ("megacore.tools.presets", "list the known models with their shapes and parameter counts"),
        "config": ("megacore.tools.config", "show, compare and explain run files"),
    }
)


def usage() -> str:
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
    return run(module, words[1:])


def unknown(word: str) -> str:
    from difflib import get_close_matches

    near = get_close_matches(word, COMMANDS, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"the commands are {', '.join(COMMANDS)}"
    return f"megacore: there is no command {word!r}; {hint}"


def run(module: str, argv: list[str]) -> int:
    """Import `module`, run its `main(argv)` and translate exceptions to exit codes."""
    try:
        return int(import_module(module).main(argv))
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader of a pipe (`megacore presets | head`) has gone; Python's own flush at exit must not complain again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except ValueError as error:
        if not raised_by_us(error.__traceback__):
            traceback.print_exc()
            return 1
        print(f"megacore: {error}", file=sys.stderr)
        return 2
    except Exception:
        traceback.print_exc()
        return 1


def raised_by_us(trace: TracebackType | None) -> bool:
    """Whether the innermost frame is megacore's own code.

    Our own ValueErrors speak to the user about their input. One out of a library is a fault of ours: its
    traceback must be seen.
    """
    name = ""
    while trace is not None:
        name = trace.tb_frame.f_globals.get("__name__", "")
        trace = trace.tb_next
    return name.partition(".")[0] in ("megacore", "__main__")


if __name__ == "__main__":
    sys.exit(main())
