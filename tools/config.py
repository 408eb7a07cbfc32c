"""`megacore config`: shows a run with everything derived, compares two runs, explains keys."""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import MISSING, Field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from megacore.config.errors import ConfigError
from megacore.config.load import all_keys, load
from megacore.config.presets import preset_names
from megacore.config.resolve import resolve, smallest_world
from megacore.config.schema import RunConfig
from megacore.config.supported import unsupported
from megacore.config.validate import validate
from megacore.config.write import flatten, to_toml, toml_value


def main(argv: list[str] | None = None) -> int:
    """Run one of show, diff and explain."""
    arguments = parse(argv)
    command = {"show": show, "diff": diff, "explain": explain}[arguments.command]
    return command(arguments)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="megacore config", description=__doc__.partition(": ")[2])
    commands = parser.add_subparsers(dest="command", required=True, metavar="{show,diff,explain}")

    one = commands.add_parser("show", help="print the resolved run as TOML, and what keeps it from training")
    one.add_argument("run", nargs="*", metavar="RUN.toml key=value", help="a run file, and overrides of it")
    one.add_argument("--preset", help="start from a known model")
    one.add_argument(
        "--ranks", type=int, help="number of ranks to resolve for; default: the fewest that the layout takes"
    )

    two = commands.add_parser("diff", help="print the keys in which two runs differ")
    for name in ("a", "b"):
        two.add_argument(name, metavar=name.upper(), help="a run file or the name of a preset")

    key = commands.add_parser("explain", help="say what a key or a section means")
    key.add_argument("key", nargs="?", default="", help="section.key, a key alone, or a section; default: all")
    for command in (one, two, key):
        command.add_argument("--json", action="store_true", help="print JSON")
    arguments, rest = parser.parse_known_args(argv)
    if rest and (arguments.command != "show" or any(word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:  # argparse takes no positional words after an option, and an override may well stand there
        arguments.run += rest
    return arguments


def show(arguments: argparse.Namespace) -> int:
    """Print the run on stdout; on stderr what would be refused when training. Raises ConfigError if it is illegal."""
    words = list(arguments.run)
    path = words.pop(0) if words and "=" not in words[0] else None
    if path is None and not arguments.preset:
        raise ConfigError(["there is no run to show; give a run file or --preset NAME"])
    if arguments.ranks is not None and arguments.ranks < 1:
        raise ConfigError([f"--ranks={arguments.ranks} must be at least 1"])
    config = load(path, words, arguments.preset)
    ranks = arguments.ranks or smallest_world(config)
    if problems := validate(config, ranks):
        raise ConfigError(problems)
    config = resolve(config, ranks)
    print(json.dumps(flatten(config), indent=2) if arguments.json else to_toml(config), end="")
    for line in unsupported(config):
        print(f"training would refuse: {line}", file=sys.stderr)
    return 0


def diff(arguments: argparse.Namespace) -> int:
    """Print every key that differs, with both values."""
    a, b = (flatten(resolved(source)) for source in (arguments.a, arguments.b))
    different = {key: (a[key], b[key]) for key in a if a[key] != b[key]}
    if arguments.json:
        print(json.dumps(different, indent=2))
        return 0
    for key, (left, right) in different.items():
        print(f"{key}: {toml_value(left)} -> {toml_value(right)}")
    if not different:
        print("the two runs are the same")
    return 0


def explain(arguments: argparse.Namespace) -> int:
    """Print type, default, choices and meaning of each key asked for."""
    rows = [row(key, field) for key, field in matching(arguments.key).items()]
    if arguments.json:
        print(json.dumps(rows, indent=2))
        return 0
    for r in rows:
        default = "required" if r["required"] else f"default {toml_value(r['default'])}"
        file = f" or a {r['file']} file" if r["file"] else ""
        choices = f"; one of {', '.join(r['choices'])}{file}" if r["choices"] else ""
        print(f"{r['key']}  ({r['type']}, {default}{choices})\n    {r['help']}")
    return 0


def matching(word: str) -> dict[str, Field[Any]]:
    """The keys that ``word`` names: one by its full or its last name, or all of a section."""
    keys = all_keys()
    found = {key: field for key, field in keys.items() if not word or word == key or word in key.split(".")}
    if not found:
        near = get_close_matches(word, [*keys, *(part for key in keys for part in key.split("."))], n=1)
        hint = f"did you mean {near[0]}?" if near else "`megacore config explain` lists all keys"
        raise ConfigError([f"there is no key {word}; {hint}"])
    return found


def row(key: str, field: Field[Any]) -> dict[str, Any]:
    """What is known of one key."""
    assert field.default is not MISSING, f"{key} has no default"
    return {
        "key": key,
        "type": field.type.__name__ if isinstance(field.type, type) else str(field.type),
        "default": field.default,
        "required": bool(field.metadata.get("required")),
        "choices": field.metadata["choices"],
        "file": field.metadata.get("file", ""),
        "help": field.metadata["help"],
    }


def resolved(source: str) -> RunConfig:
    """The run of a file or a preset, for the fewest ranks that it takes."""
    is_preset = source in preset_names() and not Path(source).exists()
    config = load(None, preset=source) if is_preset else load(source)
    ranks = smallest_world(config)
    if problems := validate(config, ranks):
        raise ConfigError([f"{source}: {problem}" for problem in problems])
    return resolve(config, ranks)


if __name__ == "__main__":
    from megacore.exits import run

    sys.exit(run("megacore.tools.config", sys.argv[1:]))
