"""`megacore report`: one self-contained HTML page of a run: curves, events, where time and memory went, configuration.

It reads the run's folder and nothing else; the run may be going on, or have ended in any way.
"""

import argparse
import json
import sys
from pathlib import Path

from megacore.exits import of_users_files

SUMMARY = ("step", "loss", "val_loss", "tokens", "tokens_per_s", "mfu", "memory_gb")


def main(argv: list[str] | None = None) -> int:
    """Write the page."""
    args = parser().parse_args(argv)
    from megacore.data.files import write_atomic
    from megacore.monitor.report.page import page
    from megacore.monitor.report.reading import read_run
    from megacore.monitor.run_folder import REPORT

    folder = Path(args.run)
    with of_users_files(f"{folder} cannot be read"):
        run = read_run(folder)
    out = Path(args.out) if args.out else folder / REPORT
    if out.is_dir():
        raise ValueError(f"--out={out} is a folder; name a file, such as {out / REPORT}")
    write_atomic(out, page(run).encode())
    if args.json:
        goodput = None if run.goodput is None else run.goodput.share
        figures = {name: run.last.get(name) for name in SUMMARY}
        print(json.dumps({"report": str(out), "status": run.status, "goodput": goodput, **figures}, indent=1))
    else:
        print(f"{run.status}, step {run.last.get('step', 0)}: {out}")
    return 0


def parser() -> argparse.ArgumentParser:
    """The command line."""
    about = (__doc__ or "").partition(": ")[2]
    parser = argparse.ArgumentParser(
        prog="megacore report", description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", metavar="RUN", help="the run's folder (its key `out`)")
    parser.add_argument("--out", metavar="FILE.html", help="where to write it; default: RUN/report.html")
    parser.add_argument("--json", action="store_true", help="print what was found as JSON")
    return parser


if __name__ == "__main__":
    from megacore.exits import run as run_command

    sys.exit(run_command("megacore.tools.report", sys.argv[1:]))
