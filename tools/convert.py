"""`megacore convert`: weights to and from Hugging Face folders, from Megatron-LM, and the proof that they are right.

from-hf: an HF folder becomes a checkpoint that holds weights alone; checkpoint.init_from takes it, as it takes the
folder itself. from-megatron: the same of a checkpoint of Megatron-LM. to-hf: a checkpoint, or the newest of a run,
becomes an HF folder. verify: two of them, weight by weight and logit by logit; exit code 1 where they differ. The
package transformers is needed for none of it; verify uses it if it is there.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megacore.monitor.console import Console
    from megacore.verify.conversion import Verdict

UNITS = (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("KB", 10**3), ("B", 1))


def main(argv: list[str] | None = None) -> int:
    """Convert or compare: results go to stdout, progress to stderr."""
    arguments = parser().parse_args(argv)
    from megacore.launch.terminal import colour_wanted, page_width
    from megacore.monitor.console import Console

    console = Console(sys.stderr, colour=colour_wanted(sys.stderr), width=page_width())
    try:
        return int(arguments.run(arguments, console))
    except OSError as reason:
        raise ValueError(f"{reason.filename or arguments.source}: {reason.strerror or reason}") from reason
    finally:
        console.close()


def parser() -> argparse.ArgumentParser:
    """The command line."""
    first, _, more = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(prog="megacore convert", description=first.partition(": ")[2], epilog=more)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    places = "a folder, or a URL that fsspec knows"

    one = commands.add_parser("from-hf", help="HF folder -> checkpoint of weights")
    one.add_argument("source", metavar="SRC", help=f"the HF folder: config.json and safetensors files; {places}")
    one.set_defaults(run=from_hf)

    third = commands.add_parser("from-megatron", help="checkpoint of Megatron-LM -> checkpoint of weights")
    third.add_argument(
        "source",
        metavar="SRC",
        help=f"the folder of latest_checkpointed_iteration.txt, or of one iteration: torch_dist or legacy; {places}",
    )
    third.set_defaults(run=from_megatron)
    for command in (one, third):
        command.add_argument("target", metavar="DST", help="the checkpoint's folder")
        command.add_argument(
            "--vocab-size",
            type=int,
            default=0,
            metavar="N",
            help="keep the first N rows of a vocabulary that was padded",
        )

    other = commands.add_parser("to-hf", help="checkpoint -> HF folder (or HF folder -> other shards or dtype)")
    other.add_argument("source", metavar="SRC", help=f"a checkpoint, or a run: its newest one; {places}")
    other.add_argument("target", metavar="DST", help="the HF folder")
    other.add_argument(
        "--shard-size", type=_size, default=_size("5GB"), metavar="SIZE", help="largest file, such as 500MB (5GB)"
    )
    other.add_argument(
        "--pad-vocab-multiple", type=int, default=1, metavar="N", help="add rows of zeros up to a multiple of N (1)"
    )
    other.set_defaults(run=to_hf)

    for command in (one, third, other):
        command.add_argument(
            "--dtype",
            default="keep",
            choices=("keep", "fp32", "bf16", "fp16"),
            help="format of the weights; keep: as stored, which in checkpoints of 16-bit training is fp32",
        )
        command.add_argument(
            "--workers", type=int, default=0, metavar="N", help="processes (all cores, at most 8; 1 for small models)"
        )
        command.add_argument("--force", action="store_true", help="replace an older conversion in DST")

    proof = commands.add_parser("verify", help="compare two, each a checkpoint, a run or an HF folder")
    proof.add_argument("source", metavar="SRC")
    proof.add_argument("target", metavar="DST")
    proof.add_argument("--tokens", type=int, default=256, metavar="N", help="random tokens to compute logits of (256)")
    proof.set_defaults(run=verify)
    for command in (one, third, other, proof):
        command.add_argument("--json", action="store_true", help="print JSON")
    return parser


def from_hf(arguments: argparse.Namespace, console: "Console") -> int:
    """An HF folder becomes a checkpoint."""
    from megacore.checkpoint.hf.folder import HfFolder
    from megacore.checkpoint.importing import write_checkpoint

    source = HfFolder(arguments.source, arguments.vocab_size)
    began = time.perf_counter()
    done = write_checkpoint(
        source,
        arguments.target,
        arguments.dtype,
        reopen=partial(HfFolder, arguments.source, arguments.vocab_size),
        num_workers=_workers(arguments.workers),
        force=arguments.force,
        report=_progress(console),
    )
    facts = {"folder": done.folder, "family": source.model.family, "parameters": done.num_params}
    return _told(arguments, facts, done.files, done.num_bytes, time.perf_counter() - began, source.notes)


def from_megatron(arguments: argparse.Namespace, console: "Console") -> int:
    """A checkpoint of Megatron-LM becomes one of ours."""
    from megacore.checkpoint.megatron.source import import_megatron

    began = time.perf_counter()
    source, done = import_megatron(
        arguments.source,
        arguments.target,
        arguments.dtype,
        vocab_size=arguments.vocab_size,
        num_workers=_workers(arguments.workers),
        force=arguments.force,
        report=_progress(console),
    )
    facts = {"folder": done.folder, "family": source.model.family, "parameters": done.num_params}
    facts["format"] = source.format
    return _told(arguments, facts, done.files, done.num_bytes, time.perf_counter() - began, source.notes)


def to_hf(arguments: argparse.Namespace, console: "Console") -> int:
    """A checkpoint becomes an HF folder."""
    from megacore.checkpoint.hf.export import export
    from megacore.checkpoint.opening import open_weights
    from megacore.checkpoint.read import Checkpoint

    source, path = open_weights(arguments.source), arguments.source
    if isinstance(source, Checkpoint):  # the very one that was found, though a run may save newer ones meanwhile
        path = source.store.describe()
    began = time.perf_counter()
    done = export(
        source,
        arguments.target,
        arguments.dtype,
        shard_bytes=arguments.shard_size,
        pad_vocab_multiple=arguments.pad_vocab_multiple,
        reopen=partial(open_weights, path),
        num_workers=_workers(arguments.workers),
        force=arguments.force,
        report=_progress(console),
    )
    facts = {"source": source.what, "folder": done.folder, "model_type": done.model_type}
    return _told(arguments, facts, done.files, done.num_bytes, time.perf_counter() - began, done.notes)


def verify(arguments: argparse.Namespace, console: "Console") -> int:
    """Two of them are compared; 1 where they differ."""
    from megacore.verify.conversion import LIMIT, verify

    verdict = verify(arguments.source, arguments.target, arguments.tokens, console.line)
    if arguments.json:
        print(json.dumps(verdict.to_json(), indent=1))
    else:
        print("\n".join(_lines(verdict, LIMIT)))
    return 0 if verdict.agrees else 1


def _lines(verdict: "Verdict", limit: float) -> list[str]:
    w = verdict.weights
    lines = [f"weights   {w.equal} of {w.num} equal bit for bit"]
    if w.rounded:
        lines[0] += f", {w.rounded} equal but for the shorter format of one side"
    if w.different:
        lines[0] += f", {len(w.different)} different: {', '.join(w.different[:4])}"
    lines[0] += f"; max |difference| {w.max_difference:.3g}"
    lines += [f"model     {line}" for line in verdict.model]
    for what, far in verdict.logits:
        lines.append(f"logits    {what}: max |difference| {far:.3g} (limit {limit:g})")
    lines += [f"note      {note}" for note in verdict.notes]
    return [*lines, "they agree" if verdict.agrees else "they DIFFER"]


def _told(
    arguments: argparse.Namespace, facts: dict[str, Any], files: int, num_bytes: int, seconds: float, notes: Any
) -> int:
    """Say what was written."""
    facts |= {"files": files, "bytes": num_bytes, "seconds": round(seconds, 3), "notes": list(notes)}
    if arguments.json:
        print(json.dumps(facts, indent=1))
        return 0
    what = facts.get("model_type") or facts.get("family")
    speed = num_bytes / 1e9 / max(seconds, 1e-9)
    print(f"{facts['folder']}: {what}, {_bytes(num_bytes)} in {files} files, {seconds:.1f} s ({speed:.2f} GB/s)")
    for note in notes:
        print(f"note: {note}")
    return 0


def _progress(console: "Console") -> Callable[[int, int], None]:
    """Shows bytes: one changing line on a terminal, a line every few seconds in a log."""
    from megacore.monitor.console import bar

    began = time.perf_counter()
    next_time = 0.0

    def report(done: int, total: int) -> None:
        nonlocal next_time
        passed = time.perf_counter() - began
        if passed < next_time and done < total:
            return
        next_time = passed + (0.1 if console.live else 5.0)
        share = done / max(1, total)
        text = f"{share:4.0%}  {_bytes(done)} of {_bytes(total)}  {done / 1e9 / max(passed, 1e-9):.2f} GB/s"
        if console.live:
            console.progress(f"{bar(share, 20):<20}{text}")
        elif done:
            console.line(text)

    return report


def _workers(wanted: int) -> int:
    if wanted < 0:
        raise ValueError(f"--workers {wanted} must be at least 1; leave it out for as many as are worth it")
    return wanted


def _bytes(number: int) -> str:
    name, unit = next(((name, unit) for name, unit in UNITS if number >= unit), UNITS[-1])
    return f"{number / unit:.1f} {name}" if unit > 1 else f"{number} B"


def _size(text: str) -> int:
    """Bytes from 5GB, 500 MB or 1000."""
    plain = text.strip().upper().replace(" ", "")
    name, unit = next(((name, unit) for name, unit in UNITS if plain.endswith(name)), ("", 1))
    try:
        size = int(float(plain.removesuffix(name)) * unit)
    except (ValueError, OverflowError):
        size = 0
    if size < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no size: give a number of bytes, or one such as 500MB or 5GB")
    return size


if __name__ == "__main__":
    from megacore.exits import run

    sys.exit(run("megacore.tools.convert", sys.argv[1:]))
