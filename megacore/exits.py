"""From what a command returns or raises to the process' exit code.

0 done; 1 a fault (with a traceback); 2 the user's input is wrong (a message on stderr, no traceback);
75 stopped on request after saving; 130 interrupted from the keyboard.
"""

import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from types import TracebackType

STOPPED = 75
"""EX_TEMPFAIL: try again later."""
LONGEST = 2000
"""Letters of one line of a message."""


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
    except ModuleNotFoundError as error:
        if error.name not in ("megacore.tools", "megacore.launch"):
            traceback.print_exc()
            return 1
        # tools/ and launch/ bear these names only where the package is installed, also as editable
        sys.stderr.write(
            f"megacore: this Python ({sys.executable}) finds the checkout, but megacore is not installed in it; "
            "run `bash launch/setup.sh` and use .venv/bin/megacore, or `pip install -e .` here\n"
        )
        return 2
    except ValueError as error:
        if not raised_by_us(error.__traceback__):
            traceback.print_exc()
            return 1
        sys.stderr.write(f"megacore: {fit(str(error))}\n")
        return 2
    except Exception:
        traceback.print_exc()
        return 1


@contextmanager
def of_users_files(what: str) -> Iterator[None]:
    """An OSError inside is about a file that the user has named as ``what``: it becomes a ValueError that says so."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"{what}: {error.strerror or error}; name another place") from error


def fit(message: str) -> str:
    """The message as a terminal can show it: what a user gave may be very long, or hold what moves the cursor."""
    lines = [line if len(line) <= LONGEST else line[:LONGEST] + "..." for line in message.split("\n")]
    return "\n".join("".join(c if c.isprintable() or c == "\t" else ascii(c)[1:-1] for c in line) for line in lines)


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
