"""`megacore inspect`: what is inside a checkpoint, a run or a Hugging Face folder."""

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from megacore.exits import of_users_files


def main(argv: list[str] | None = None) -> int:
    """Print it; with --verify, read every byte first."""
    arguments = parser().parse_args(argv)
    from megacore.checkpoint.inspection import inspect

    with of_users_files(f"{arguments.path} cannot be read"):
        facts = inspect(arguments.path)
    if arguments.verify:
        facts["verified"] = verify(facts)
    if not arguments.tensors and not arguments.json:
        for each in (facts, facts.get("newest", {})):
            each.pop("tensors", None)
    print(json.dumps(facts, indent=1) if arguments.json else "\n".join(SHOWN[facts["what"]](facts)))
    return 0


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="megacore inspect", description=__doc__.partition(": ")[2])
    parser.add_argument("path", metavar="CHECKPOINT|RUN|HF", help="a folder, or a URL that fsspec knows")
    parser.add_argument("--tensors", action="store_true", help="also list every tensor")
    parser.add_argument("--verify", action="store_true", help="read every byte and hold it against its hash")
    parser.add_argument("--json", action="store_true", help="print JSON: everything, with slices and hashes")
    return parser


def verify(facts: dict[str, Any]) -> int:
    """Bytes read, of one checkpoint or of all of a run. Raises ValueError that names what was damaged."""
    from megacore.checkpoint.read import Checkpoint

    if facts["what"] == "hf":
        raise ValueError(f"{facts['path']} is a Hugging Face folder, which has no hashes; leave --verify out")
    paths = [facts["path"]] if facts["what"] == "checkpoint" else [each["path"] for each in facts["checkpoints"]]
    total = 0
    for path in paths:
        checkpoint = Checkpoint.open(path)
        checkpoint.verify()
        total += checkpoint.manifest.num_bytes
    return total


def checkpoint_lines(facts: dict[str, Any]) -> Iterator[str]:
    """A checkpoint on a page."""
    from megacore.monitor.console import human_bytes, human_count

    made, model = facts["made"], facts["model"]
    layout = " x ".join(f"{axis}{size}" for axis, size in facts["layout"].items() if axis in AXES and size > 1)
    yield f"checkpoint  {facts['path']}"
    yield f"step        {facts['step']}, {facts['kind']}"
    yield f"made        {made.get('time')} by megacore {made.get('megacore')}, torch {made.get('torch')}"
    yield (
        f"model       {model['family']}: {model['num_layers']} layers, hidden {model['hidden_size']}, "
        f"{model['num_heads']} heads ({model['num_kv_heads']} kv), vocabulary {model['vocab_size']}"
    )
    yield f"saved from  {layout or 'one process'}, ZeRO {facts['layout'].get('zero', 0)}; config {facts['config_hash']}"
    for name, value in facts["state"].items():
        yield f"            {name} {value}"
    yield f"size        {human_bytes(facts['bytes'])} in {len(facts['files'])} files"
    if "verified" in facts:
        yield f"verified    all {human_bytes(facts['verified'])} have their hashes"
    yield ""
    rows: list[tuple[str, ...]] = [("group", "tensors", "elements", "bytes", "slices", "format")]
    for name, group in sorted(facts["groups"].items()):
        numbers = (str(group["tensors"]), human_count(group["elements"]), human_bytes(group["bytes"]))
        rows.append((name, *numbers, str(group["slices"]), ", ".join(group["dtypes"])))
    yield from aligned(rows)
    yield ""
    rows = [("file", "bytes"), *((each["name"], human_bytes(each["bytes"])) for each in facts["files"])]
    rows += [(name, human_bytes(size)) for name, size in facts["attachments"].items()]
    yield from aligned(rows)
    if "tensors" in facts:
        yield ""
        rows = [("tensor", "shape", "format", "slices")]
        for key, each in sorted(facts["tensors"].items()):
            rows.append((key, " x ".join(map(str, each["shape"])) or "scalar", each["dtype"], str(len(each["slices"]))))
        yield from aligned(rows)


def run_lines(facts: dict[str, Any]) -> Iterator[str]:
    """A run's checkpoints, newest first."""
    from megacore.monitor.console import human_bytes

    yield f"run  {facts['path']}: {len(facts['checkpoints'])} checkpoints"
    if "verified" in facts:
        yield f"verified: all {human_bytes(facts['verified'])} have their hashes"
    rows = [("step", "bytes", "made", "val_loss", "")]
    for each in facts["checkpoints"]:
        loss = each.get("state", {}).get("val_loss")
        shown = "" if loss is None else f"{loss:.4f}"
        size = human_bytes(each["bytes"]) if each["whole"] else ""
        rows.append((str(each["step"]), size, each.get("made") or "", shown, each.get("problem", "")))
    yield from aligned(rows)
    if "newest" in facts:
        yield ""
        yield from checkpoint_lines(facts["newest"])


def hf_lines(facts: dict[str, Any]) -> Iterator[str]:
    """A Hugging Face model on a few lines."""
    from megacore.monitor.console import human_count

    numbers = f"{human_count(facts['parameters'])} parameters, {', '.join(facts['dtypes'])}"
    yield f"Hugging Face folder {facts['path']}: {numbers}"
    for name, value in facts["model"].items():
        yield f"  {name:<24} {value}"
    yield f"files beside the weights: {', '.join(facts['attachments']) or 'none'}"


def aligned(rows: Sequence[tuple[str, ...]]) -> Iterator[str]:
    """Columns, the first to the left."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    for first, *rest in rows:
        yield "  ".join(
            [first.ljust(widths[0]), *(each.rjust(width) for each, width in zip(rest, widths[1:]))]
        ).rstrip()


AXES = ("tp", "pp", "dp", "cp", "ep")
Lines = Callable[[dict[str, Any]], Iterator[str]]
SHOWN: Mapping[str, Lines] = MappingProxyType({"checkpoint": checkpoint_lines, "run": run_lines, "hf": hf_lines})


if __name__ == "__main__":
    from megacore.exits import run

    sys.exit(run("megacore.tools.inspect_checkpoint", sys.argv[1:]))
