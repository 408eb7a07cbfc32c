"""What monitoring and guards cost: steps with all of them and with none, alternating in one run. Ratios.

    python benchmarks/monitoring.py [--trackers all|none] [--every 1] [--ranks 2] [--pairs 100] [--hidden 256]
                                    [--seq-len 128]

With: every step (or each so many) is written to metrics.jsonl and the console and told to TensorBoard, W&B (offline),
MLflow (files) and Prometheus (served and as a file); all default alerts are held against it; the spike guard sees its
loss; each 50th step compares the ranks' times and each 100th the copies that they hold. Without: the step, and its loss
read one step later. A pair is one of each, in changing order. A step with monitoring ends when the trackers' threads
have passed on all of it, as if they had no core of their own: in a run they work beside the next step. The heartbeat
beats all the time: what it takes while nothing is computed is measured at the end, like the server's threads.

By the clock a machine that does other things says little; processor time is that of rank 0 with all its threads (W&B's
own process is not counted), where what waits costs nothing. `own` is the main thread's processor time in monitoring.

Of 200 pairs each of the small step (hidden 256, 128 tokens a sample) and 80 of the other (512, 256), two ranks with a
thread each, on two cores with nothing else to do; medians with / without, median of the
pairs' ratios in brackets:

| trackers | every | step without | by the clock | processor time | own | idle threads |
|---|---|---|---|---|---|---|
| none | 1 | 63.8 ms | 1.007 (1.009) | 1.009 (0.999) | 0.67 ms, 1.05% | 0.29% of a core |
| all | 10 | 62.1 ms | 1.022 (1.014) | 1.005 (1.007) | 0.40 ms, 0.64% | 0.28% of a core |
| all | 1 | 64.0 ms | 1.050 (1.058) | 1.039 (1.048) | 1.00 ms, 1.57% | 0.28% of a core |
| none | 1 | 302.0 ms | 0.997 (1.000) | 1.002 (1.000) | 0.57 ms, 0.19% | 0.23% of a core |

So it costs about half a millisecond a step: 1% of a step of 60 ms, nothing that shows of one of 300 ms.
"""

import argparse
import statistics
import sys
import tempfile
import time
from contextlib import closing, redirect_stdout
from dataclasses import dataclass, replace
from io import StringIO
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megacore.config.load import load
from megacore.config.resolve import resolve
from megacore.config.schema import RunConfig
from megacore.config.validate import check
from megacore.data.indexed import IndexedWriter
from megacore.data.run_data import fill_in
from megacore.launch.processes import run_local
from megacore.mesh import process_group
from megacore.mesh.rank_info import RankInfo
from megacore.monitor.background import Background
from megacore.monitor.console import Phases
from megacore.pipeline.clock import Mark
from megacore.train.build import build, join
from megacore.train.data import open_data
from megacore.train.guards import Guards, ledger_of
from megacore.train.heart import Heart
from megacore.train.keeping import Keeper
from megacore.train.loop import Late
from megacore.train.reporter import Reporter
from megacore.train.state import State
from megacore.train.timing import StepClock
from megacore.train.watching import Watching

TRACKERS = ("tensorboard=true", "wandb=true", "mlflow=true", "prometheus_file=true", "prometheus_port=9464")
IDLE_S = 5.0
WARM_UP = 6


@dataclass
class Times:
    """Of one step on rank 0, in seconds."""

    clock: float
    processor: float
    own: float = 0.0


def main() -> int:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trackers", choices=("all", "none"), default="all", help="none: as runs are by default")
    parser.add_argument("--every", type=int, default=1, help="log.every")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=100)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--seq-len", type=int, default=128)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        config = config_of(args, Path(folder))
        return run_local(f"{Path(__file__).stem}:measure", (config, args.pairs), args.ranks)


def config_of(args: argparse.Namespace, folder: Path) -> RunConfig:
    """A small model on made-up text, with everything that looks on."""
    prefix = str(folder / "text")
    generator = np.random.default_rng(1)
    with IndexedWriter(prefix, np.uint16) as writer:
        for length in generator.integers(200, 2000, 100):
            writer.add_document([*generator.integers(97, 123, length), 256])
    steps = 2 * args.pairs + WARM_UP
    words = [
        *(f"model.hidden_size={args.hidden}", "model.num_layers=4", f"model.num_heads={args.hidden // 64}"),
        *("data.tokenizer=bytes", f"data.blend={prefix}", "data.split=1,0,0", f"out={folder / 'run'}"),
        *(f"train.seq_len={args.seq_len}", "train.micro_batch_size=1", f"train.global_batch_size={2 * args.ranks}"),
        *(f"train.steps={steps}", "train.device=cpu", "checkpoint.save_every=0", "checkpoint.resume=never"),
        *(f"log.{name}" for name in TRACKERS if args.trackers == "all"),
        *(f"log.every={args.every}", "log.sample_every=0", "log.sample_prompts=[]", "log.timeline_step=0"),
        *("train.eval_every=0", "guard.stragglers_every=50", "guard.replicas_every=100"),
    ]
    config = load(None, words)
    check(config, args.ranks)
    return resolve(fill_in(config), args.ranks)


def measure(info: RankInfo, config: RunConfig, pairs: int) -> int:
    """One rank's part; rank 0 prints."""
    torch.set_num_threads(1)
    device = join(config, info)
    try:
        found, idle = alternate(info, config, device, pairs)
    finally:
        process_group.stop()
    if info.rank == 0:
        print("\n".join(table(found, idle)))
    return 0


def alternate(
    info: RankInfo, config: RunConfig, device: torch.device, pairs: int
) -> tuple[dict[bool, list[Times]], float]:
    """The times of steps with (True) and without, and the share of a core that threads take in between."""
    built = build(config, info, device)
    data = open_data(config, built.mesh, (1, 0), ledger_of(config.out, None, built.mesh.world).holes)
    keeper, watching = Keeper(built, built.failpoints, State(built)), Watching(built)
    with redirect_stdout(StringIO()), closing(Heart(config, info, built.mesh)) as heart:
        reporter = Reporter.open(config, built.mesh, colour=False, width=100)
        guards = Guards(built, data, keeper, reporter, ledger_of(config.out, None, built.mesh.world), {})
        reporter.start(built, data, Phases())
        found: dict[bool, list[Times]] = {True: [], False: []}
        late: Late | None = None
        began, number = Mark(device), 0
        for step in range(1, config.train.steps + 1):
            turn = (step - 1) // 2
            on = (step % 2 == 1) != (turn % 2 == 1)
            times = Times(-time.perf_counter(), -time.process_time())
            microbatches = data.feed.step(step)
            mine = time.thread_time()
            marks = None
            if on:
                number += 1
                heart.step(step)
                built.failpoints.begin(step)
                # steps that are watched are counted by themselves: every 50th and 100th of them, as in a run
                clock = StepClock(built.mesh) if guards.times(number) else None
                marks = None if clock is None else clock.marks
                watching.begin(step)
            times.own += time.thread_time() - mine
            tokens = config.train.global_batch_size * config.train.seq_len
            result = built.trainer.step(microbatches, tokens, 1e-4, marks)
            ended = Mark(device)
            mine = time.thread_time()
            if on:
                watching.end(step, reporter)
                guards.after(number, len(microbatches), built.trainer.plan, marks)
                if late is not None:
                    reporter.step(replace(late, step=number))
                    guards.see(number, late.result.loss.item())
                keeper.poll(reporter)
            elif late is not None:
                late.result.loss.item()
            times.own += time.thread_time() - mine
            late = Late(step, result, 1e-4, began, ended, tokens)
            began = ended
            if on and reporter.files is not None:
                for tracker in reporter.files.watchers.trackers:
                    if isinstance(tracker, Background):
                        tracker.drain()
            times.clock += time.perf_counter()
            times.processor += time.process_time()
            if step > WARM_UP:
                found[on].append(times)
        idle = -time.process_time()
        time.sleep(IDLE_S)
        idle += time.process_time()
        reporter.close()
        keeper.close()
        watching.close()
    return found, idle / IDLE_S


def table(found: dict[bool, list[Times]], idle: float) -> list[str]:
    """Lines of Markdown."""

    def of(on: bool, name: str) -> list[float]:
        return [getattr(times, name) for times in found[on]]

    lines = ["| | without | with | ratio of medians | ratio of means | median of pairs |", "|---|---|---|---|---|---|"]
    for name, title in (("clock", "by the clock"), ("processor", "processor time")):
        on, off = of(True, name), of(False, name)
        pairs = statistics.median(a / b for a, b in zip(on, off, strict=False))
        medians = statistics.median(on) / statistics.median(off)
        means = statistics.fmean(on) / statistics.fmean(off)
        shown = f"{1e3 * statistics.median(off):.1f} ms | {1e3 * statistics.median(on):.1f} ms"
        lines.append(f"| {title} | {shown} | {medians:.4f} | {means:.4f} | {pairs:.4f} |")
    own = statistics.fmean(of(True, "own")) - statistics.fmean(of(False, "own"))
    typical = statistics.median(of(True, "own")) - statistics.median(of(False, "own"))
    share = own / statistics.median(of(False, "clock"))
    lines += [
        "",
        f"own: {1e3 * own:.2f} ms a step on average, {1e3 * typical:.2f} ms typically: {share:.2%} of a step",
        f"threads while nothing is computed: {idle:.2%} of a core",
    ]
    return lines


if __name__ == "__main__":
    sys.exit(main())
