"""The files of a run that rank 0 writes to, and their folder."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megacore.config.schema import RunConfig
from megacore.config.secrets import without_secrets
from megacore.config.write import to_toml
from megacore.monitor.console import Console
from megacore.monitor.jsonl import drop_lines, read_json_lines
from megacore.monitor.metrics import EventsWriter, MetricsWriter
from megacore.monitor.run_folder import CONFIG, LOG, METRICS, archive_previous_run
from megacore.train.watchers import Watchers

if TYPE_CHECKING:
    from megacore.train.keeping import Resumed


@dataclass
class Files:
    """Open, of one run from one start or return to the next."""

    console: Console
    metrics: MetricsWriter
    events: EventsWriter
    watchers: Watchers
    last_step: int = 0
    """The last one that the life before this one has written down."""

    def forget_after(self, step: int, out: Path) -> None:
        """Leave out what is written down of later steps, which are made again."""
        self.metrics.close()
        drop_lines(out / METRICS, lambda record: record["step"] <= step)
        self.metrics = MetricsWriter(out)


def open_files(config: RunConfig, colour: bool, width: int, resumed: Resumed | None = None) -> Files:
    """Make the run's folder; an earlier run in it is put aside, unless this one goes on where that one was saved."""
    out = Path(config.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"out={config.out} cannot be made ({error.strerror}); name another folder") from error
    goes_on = resumed is not None and resumed.own
    last_step = 0
    if goes_on and (out / METRICS).exists():
        last_step = max((record["step"] for record in read_json_lines(out / METRICS)), default=0)
    moved = None if goes_on else archive_previous_run(out)
    console = Console(sys.stdout, out / LOG, colour, width)
    if moved is not None:
        console.line(f"an earlier run was in {out}: it now lies in {moved}")
    (out / CONFIG).write_text(to_toml(without_secrets(config)), encoding="utf-8")
    events = EventsWriter(out)
    first_step = resumed.step + 1 if resumed is not None and goes_on else None
    watchers = Watchers(config, console, events, first_step)
    return Files(console, MetricsWriter(out), events, watchers, last_step)
