"""`megacore data`: makes a tokenizer, tokenises corpora, shows and merges data sets, builds sample indices ahead."""

import argparse
import json
import signal
import sys
from collections.abc import Callable
from dataclasses import fields
from types import FrameType
from typing import NoReturn

from megacore.config.schema import DataConfig
from megacore.data.text.options import DOCUMENTS, ERRORS, FORMATS, ReadOptions

TOKENIZER_HELP = "bytes, a SentencePiece FILE.model, a tokenizer.json or its folder, or tiktoken:NAME"
INPUT_HELP = (
    "text, JSON lines (.jsonl, also .gz .zst .bz2 .xz) or Parquet files, folders, patterns, or - for standard input"
)


def main(argv: list[str] | None = None) -> int:
    """Run one of the subcommands: results go to stdout, progress to stderr. 2: something is wrong with a data set."""
    options = vars(parser().parse_args(argv))
    command, as_json = options.pop("command"), options.pop("json")
    if "format" in options:
        options["reading"] = ReadOptions(**{field.name: options.pop(field.name) for field in fields(ReadOptions)})
    # numpy and the tokenizer libraries are loaded only now, so that --help answers at once.
    from megacore.corpora import indexing, looking, making
    from megacore.corpora.report import Report
    from megacore.launch.terminal import colour_wanted, page_width
    from megacore.monitor.console import Console

    commands: dict[str, Callable[..., Report]] = {
        "tokenizer": making.make_tokenizer,
        "prepare": making.make_dataset,
        "inspect": looking.look,
        "merge": making.merge,
        "index": indexing.build_index,
    }
    signal.signal(signal.SIGTERM, leave)  # so that temporary files are cleared away
    console = Console(sys.stderr, colour=colour_wanted(sys.stderr), width=page_width())
    try:
        report = commands[command](**options, console=console)
    finally:
        console.close()
    for line in [json.dumps(report.facts, indent=2, ensure_ascii=False)] if as_json else report.lines:
        print(line)
    for problem in report.problems:
        print(f"megacore: {problem}", file=sys.stderr)
    return 2 if report.problems else 0


def leave(signum: int, frame: FrameType | None) -> NoReturn:
    """End by an exception, which clean-up sees."""
    sys.exit(128 + signum)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="megacore data", description=(__doc__ or "").partition(": ")[2])
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in (_tokenizer, _prepare, _inspect, _merge, _index):
        command = add(commands)
        command.add_argument("--json", action="store_true", help="print the result as JSON")
    return parser


def _tokenizer(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> argparse.ArgumentParser:
    command = commands.add_parser("tokenizer", help="train a SentencePiece tokenizer")
    _add_reading(command)
    command.add_argument("--output", required=True, metavar="FILE.model", help="where the tokenizer goes")
    command.add_argument("--vocab-size", required=True, type=int, metavar="N", help="tokens, exactly")
    command.add_argument(
        "--sample-mb", type=float, default=64.0, metavar="MB", help="text that the trainer sees at most, spread evenly"
    )
    command.add_argument(
        "--special-token",
        action="append",
        dest="special_tokens",
        metavar="NAME",
        help=f"a token that no text gives; may be repeated (default: {' '.join(DataConfig().fim_tokens)})",
    )
    command.add_argument("--overwrite", action="store_true", help="replace an existing file")
    return command


def _prepare(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> argparse.ArgumentParser:
    command = commands.add_parser("prepare", help="tokenise files into PREFIX.bin and PREFIX.idx")
    _add_reading(command)
    command.add_argument("--tokenizer", required=True, metavar="T", help=TOKENIZER_HELP)
    command.add_argument("--output", required=True, metavar="PREFIX", help="path of the data set, without ending")
    command.add_argument("--workers", type=int, default=0, metavar="N", help="processes (default: all cores)")
    command.add_argument(
        "--no-eod", action="store_false", dest="append_eod", help="put no end-of-document token behind each document"
    )
    command.add_argument("--eod-token", default="", metavar="NAME", help="its name, if not the tokenizer's own")
    command.add_argument("--overwrite", action="store_true", help="replace an existing data set")
    return command


def _inspect(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> argparse.ArgumentParser:
    command = commands.add_parser("inspect", help="show what a data set holds and check its tokens")
    command.add_argument("prefix", metavar="PREFIX", help="path of the data set, without ending")
    command.add_argument("--samples", type=int, default=0, metavar="N", help="show the beginning of N documents")
    command.add_argument("--full", action="store_true", help="check every token, however many there are")
    return command


def _merge(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> argparse.ArgumentParser:
    command = commands.add_parser("merge", help="make one data set of several")
    command.add_argument("prefixes", nargs="+", metavar="PREFIX", help="data sets, in order")
    command.add_argument("--output", required=True, metavar="PREFIX", help="path of the new data set, without ending")
    command.add_argument("--overwrite", action="store_true", help="replace an existing data set")
    return command


def _index(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> argparse.ArgumentParser:
    command = commands.add_parser("index", help="build ahead the sample index that a run will ask for")
    command.add_argument("prefix", metavar="PREFIX", help="path of the data set, without ending")
    command.add_argument("--seq-len", type=int, required=True, metavar="N", help="tokens per sample (train.seq_len)")
    command.add_argument("--samples", type=int, required=True, metavar="N", help="steps x global batch size of the run")
    command.add_argument("--seed", type=int, default=1234, metavar="N", help="seed of the run (train.seed)")
    command.add_argument("--split", choices=("train", "valid", "test"), default="train", help="which part of the data")
    command.add_argument(
        "--shares", default="969,30,1", metavar="A,B,C", help="shares of train, validation and test (data.split)"
    )
    command.add_argument(
        "--order", choices=("megacore", "megatron"), default="megacore", help="order of samples (data.index)"
    )
    command.add_argument(
        "--cache", default="", metavar="FOLDER", help="where it goes (data.cache; default: PREFIX.index)"
    )
    return command


def _add_reading(command: argparse.ArgumentParser) -> None:
    default = ReadOptions()
    command.add_argument(
        "--input", required=True, nargs="+", action="extend", dest="inputs", metavar="FILE", help=INPUT_HELP
    )
    command.add_argument("--format", choices=FORMATS, default=default.format, help="auto: by the file's name")
    command.add_argument(
        "--json-key",
        default=default.json_key,
        metavar="KEY",
        help="field or column that holds the text (default: text)",
    )
    command.add_argument(
        "--documents", choices=DOCUMENTS, default=default.documents, help="what a document is in plain text"
    )
    command.add_argument(
        "--errors",
        choices=ERRORS,
        default=default.errors,
        help="a broken document: stop (strict), put U+FFFD for bad bytes (replace), or leave it out (skip)",
    )


if __name__ == "__main__":
    from megacore.exits import run

    sys.exit(run("megacore.tools.data", sys.argv[1:]))
