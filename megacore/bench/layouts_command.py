"""The course of `megacore bench layouts`: trials, sweep, predictions, table and files."""

import argparse
import csv
import json
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

from megacore.bench.layout_trials import How, Results, Trial, as_timed, key_of, run_trial, sweep, trials_of
from megacore.bench.layouts import COLUMNS, Measured, as_dict, collect, compare, made_up_data, table
from megacore.bench.layouts_picture import draw
from megacore.config.load import load
from megacore.config.resolve import resolve
from megacore.config.schema import RunConfig


def run(arguments: argparse.Namespace, machine: Mapping[str, object]) -> tuple[str, int]:
    """Sweep, then write what is known: what to print, and the exit code, which is 1 if no layout succeeded."""
    config = requested(arguments)
    folder = Path(arguments.output)
    trials = trials_of(config, arguments.layouts, arguments.choose, arguments.max_ranks)
    predicted = predict(trials, arguments.points)  # first: what cannot be predicted is told before anything runs
    results = Results(folder / "layouts.jsonl", key_of(config), {"machine": dict(machine)})
    how = How(folder, arguments.steps, arguments.limit, arguments.launcher)
    with ending_trials():
        sweep(trials, arguments.rounds, results, lambda trial, number: run_trial(how, trial, number), sys.stderr.write)
    found = collect(trials, results, predicted)
    settings = {**settings_of(config), "rounds": arguments.rounds, "launcher": bool(arguments.launcher)}
    about = {"machine": dict(machine), "settings": settings, "predicted_with": arguments.points or ""}
    write(folder, found, about)
    code = 0 if any(one.status == "ok" for one in found) else 1
    if not arguments.json:
        return table(found), code
    ranking = compare(found)
    rows = [as_dict(one) for one in found]
    return json.dumps({**about, "ranking": None if ranking is None else vars(ranking), "layouts": rows}, indent=1), code


@contextmanager
def ending_trials() -> Iterator[None]:
    """Who is told to end, ends the trial under way, too: SIGTERM unwinds like an interruption from the keyboard."""

    def unwind(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, unwind)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def write(folder: Path, found: Sequence[Measured], about: Mapping[str, Any]) -> list[Path]:
    """Write layouts.json, layouts.csv and, with matplotlib, layouts.svg; returns the paths."""
    ranking = compare(found)
    rows = [as_dict(one) for one in found]
    everything = {**about, "ranking": None if ranking is None else vars(ranking), "layouts": rows}
    as_json, as_csv, picture = (folder / f"layouts.{end}" for end in ("json", "csv", "svg"))
    as_json.write_text(json.dumps(everything, indent=1) + "\n")
    with as_csv.open("w", newline="") as file:
        lines = [[row[column] for column in COLUMNS] for row in rows]
        csv.writer(file, lineterminator="\n").writerows([COLUMNS, *lines])
    return [as_json, as_csv, *([picture] if draw(found, picture) else [])]


def requested(arguments: argparse.Namespace) -> RunConfig:
    """The run to be laid out. Raises ValueError for what cannot be."""
    for name in ("rounds", "steps", "max_ranks"):
        if getattr(arguments, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')}={getattr(arguments, name)} must be at least 1")
    if arguments.limit <= 0:
        raise ValueError(f"--limit={arguments.limit:g} must be more than 0 seconds")
    if arguments.launcher and "{nproc}" not in arguments.launcher:
        raise ValueError(
            f"--launcher={arguments.launcher!r} does not say where the number of ranks goes; write {{nproc}} there, as "
            'in "srun -n {nproc} python -m megacore"'
        )
    if arguments.run and "=" in arguments.run:  # only overrides were given
        arguments.overrides.insert(0, arguments.run)
        arguments.run = None
    if "=" in arguments.output:
        raise ValueError(f"--output={arguments.output} has a = in it, which run files' paths must not; name another")
    if not arguments.run and not arguments.preset:
        raise ValueError("megacore bench layouts needs a run file or --preset NAME (`megacore presets` lists them)")
    config = as_timed(load(arguments.run, arguments.overrides, arguments.preset), arguments.steps)
    if config.data.blend:
        return config
    blend = ((1.0, str(Path(made_up_data(config, Path(arguments.output), config.train.steps)).resolve())),)
    return replace(config, data=replace(config.data, blend=blend, split=(1.0, 0.0, 0.0)))


def settings_of(config: RunConfig) -> dict[str, Any]:
    """What was trained, in the words of the other benchmarks."""
    model, train = config.model, config.train
    return {
        "layers": model.num_layers,
        "hidden": model.hidden_size,
        "vocabulary": model.vocab_size,
        "sequence": train.seq_len,
        "batch": train.global_batch_size,
        "micro_batch": train.micro_batch_size,
        "steps": train.steps,
        "dtype": config.precision.dtype,
    }


def predict(trials: Sequence[Trial], points: str | None) -> dict[str, float]:
    """Seconds of a step by layout, from the points that `megacore bench calibrate` wrote; nothing without them. Raises
    ValueError for another file."""
    if not points:
        return {}
    from megacore.bench.layout_model import Prices, predict, within_a_step

    prices = Prices.read(Path(points))
    longer = within_a_step(prices)
    return {trial.text: predict(resolved(trial), trial.num_ranks, prices, longer) for trial in trials}


def resolved(trial: Trial) -> RunConfig:
    """The run as the planner takes it."""
    return resolve(trial.config, trial.num_ranks)
