"""`megacore presets`: the known models with their shapes and parameter counts."""

import argparse
import json
import sys
from typing import Any

from megacore.config.load import load
from megacore.config.presets import preset_names
from megacore.config.resolve import resolve_model
from megacore.spec import ModelSpec

COLUMNS = ("name", "parameters", "layers", "hidden", "ffn", "heads", "kv_heads", "head_dim", "vocab", "seq_len")


def row(name: str) -> dict[str, Any]:
    """What the table says of one preset."""
    config = load(None, preset=name)
    model = resolve_model(config.model, config.train.seq_len)
    values = (
        name,
        ModelSpec.of(model).num_params,
        model.num_layers,
        model.hidden_size,
        model.ffn_hidden_size,
        model.num_heads,
        model.num_kv_heads,
        model.head_dim,
        model.vocab_size,
        config.train.seq_len,
    )
    return dict(zip(COLUMNS, values, strict=True))


def table(rows: list[dict[str, Any]]) -> str:
    """Rows as text: names to the left, numbers to the right."""
    cells = [list(COLUMNS)]
    cells += [[f"{value:,}" if isinstance(value, int) else value for value in each.values()] for each in rows]
    widths = [max(map(len, column)) for column in zip(*cells)]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *(text.rjust(width) for text, width in zip(line[1:], widths[1:]))])
        for line in cells
    )


def main(argv: list[str] | None = None) -> int:
    """Print all presets, smallest first."""
    parser = argparse.ArgumentParser(prog="megacore presets", description=__doc__.partition(": ")[2])
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    arguments = parser.parse_args(argv)
    rows = sorted(map(row, preset_names()), key=lambda r: r["parameters"])
    if arguments.json:
        print(json.dumps(rows, indent=2))
    else:
        print(table(rows))
        print("\nuse one with `megacore train --preset NAME`; `megacore config show --preset NAME` prints it whole")
    return 0


if __name__ == "__main__":
    from megacore.exits import run

    sys.exit(run("megacore.tools.presets", sys.argv[1:]))
