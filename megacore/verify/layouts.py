"""The layouts that a user names: `tp=2,pp=2;dp=2;pp=4,chunks=2,schedule=interleaved`."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import Field, fields, replace
from typing import Any, get_type_hints

from megacore.config.errors import did_you_mean
from megacore.config.parse import Typed, Unfit, coerce, show
from megacore.config.pipeline import num_chunks
from megacore.config.schema import ParallelConfig, RunConfig
from megacore.config.supported import unsupported
from megacore.config.validate import choice_problem, validate

SIZES = ("tp", "pp", "cp", "dp", "ep")
ONE = ParallelConfig(dp=1)
"""One process."""

BETWEEN_PAIRS = re.compile(r",(?![^\[]*\])")  # stage_layers=[3,2,2] is one value


def read_layouts(text: str, run: ParallelConfig, problems: list[str]) -> dict[str, ParallelConfig]:
    """The layouts of ``--layouts`` by their names, with blanks taken out. What cannot be read becomes a line of
    ``problems``; how ``run`` fills in what is not named says `filled_in`."""
    layouts: dict[str, ParallelConfig] = {}
    entries = ["".join(entry.split()) for entry in text.split(";")]
    if not any(entries):
        problems.append(f'--layouts={text!r} names no layout; write such as --layouts "tp=2,pp=2;dp=2"')
    for entry in filter(None, entries):
        given: dict[str, Any] = {}
        wrong = [line for pair in BETWEEN_PAIRS.split(entry) for line in _read_pair(pair, given)]
        problems += [f"layout {entry}: {line}" for line in wrong]
        if not wrong:
            layouts[entry] = filled_in(given, run)
    return layouts


def _read_pair(pair: str, given: dict[str, Any]) -> Iterator[str]:
    """Read KEY=VALUE into ``given``; what is wrong with it."""
    key, equals, text = pair.removeprefix("parallel.").partition("=")
    known: dict[str, Field[Any]] = {field.name: field for field in fields(ParallelConfig)}
    if not (key and equals and text):
        yield f"{pair!r} is not KEY=VALUE; write such as tp=2"
    elif key not in known:
        yield f"{key} is not a key of a layout; {did_you_mean(key, known)}"
    elif key in given:
        yield f"{key} is given twice; give it once"
    else:
        try:
            given[key] = coerce(Typed(text), get_type_hints(ParallelConfig)[key])
        except Unfit as error:
            yield f"{key}={text} {error} ({known[key].metadata['help']})"
            return
        if problem := choice_problem(key, known[key], given[key]):
            yield problem


def filled_in(given: Mapping[str, Any], run: ParallelConfig) -> ParallelConfig:
    """A layout of the keys ``given``: sizes that are not among them are 1; how the work is done (schedule, sequence
    parallelism, recompute, ...) is the run's, as far as such sizes have it."""
    sizes = {key: getattr(ONE, key) for key in SIZES} | {key: given[key] for key in SIZES if key in given}
    unfit: set[str] = {"dp_shard", "etp"}
    if sizes["tp"] == 1:
        unfit |= {"sequence_parallel", "regather_inputs"}
    if not given.get("sequence_parallel", True):
        unfit |= {"regather_inputs"}
    if sizes["dp"] <= 1:
        unfit |= {"zero"}
    if sizes["pp"] == 1 or "schedule" in given:
        unfit |= {"schedule", "chunks"}
    layout = replace(run, **{key: getattr(ONE, key) for key in unfit}, **sizes)
    layout = replace(layout, **given)
    if "stage_layers" not in given and len(layout.stage_layers) != layout.pp * num_chunks(layout):
        layout = replace(layout, stage_layers=())
    return layout


def num_ranks(layout: ParallelConfig) -> int:
    """Ranks that a layout takes; ``dp`` 0 counts as 1."""
    return layout.tp * layout.pp * layout.cp * max(1, layout.dp)


def text_of(layout: ParallelConfig) -> str:
    """What ``--layouts`` calls it."""
    changed = {field.name: getattr(layout, field.name) for field in fields(ParallelConfig)}
    pairs = [f"{key}={show(value)}" for key, value in changed.items() if value != getattr(ONE, key)]
    return "".join(",".join(pairs).split()) or "tp=1"


def label_of(layout: ParallelConfig) -> str:
    """A layout in few words: what a table has no other column for."""
    words = [f"{key}{getattr(layout, key)}" for key in SIZES if getattr(layout, key) > 1]
    if layout.sequence_parallel:
        words += ["sequence", "regather"] if layout.regather_inputs else ["sequence"]
    if layout.zero:
        words += [f"zero{layout.zero}", *[f"shard{layout.dp_shard}"] * (layout.dp_shard > 0)]
    if layout.stage_layers:
        words.append(f"layers {'+'.join(map(str, layout.stage_layers))}")
    return " ".join(words) or "one process"


def why_illegal(run: RunConfig, layout: ParallelConfig) -> list[str]:
    """What keeps the run from training in this layout, as configuration checks have it."""
    laid_out = replace(run, parallel=layout)
    return [*validate(laid_out, num_ranks(layout)), *unsupported(laid_out)]
