"""What a run says and writes down: rank 0 speaks, the other ranks' reporter is silent."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megacore import __version__
from megacore.checkpoint.retain import EVALUATION_DUE
from megacore.config.schema import RunConfig
from megacore.config.secrets import hidden_keys, without_secrets
from megacore.config.write import config_hash
from megacore.cost.hardware import model_flops_utilization
from megacore.cost.plot.picture import save_picture
from megacore.cost.simulate import Durations, simulate
from megacore.cost.timeline import Timeline
from megacore.cost.trace import write_trace
from megacore.mesh.collectives import agree
from megacore.mesh.mesh import ParallelMesh
from megacore.monitor.console import (
    Phases,
    cut,
    human_bytes,
    human_count,
    human_time,
    phase_lines,
    visible_width,
)
from megacore.monitor.goodput import goodput_of
from megacore.monitor.jsonl import finite
from megacore.monitor.metrics import StepMetrics, format_line
from megacore.monitor.run_folder import TIMELINE, TIMELINE_PICTURE
from megacore.spec.flops import train_flops_per_token
from megacore.train.devices import Devices
from megacore.train.files import Files, open_files
from megacore.train.meter import Meter, Skips, Span
from megacore.train.overview import overview

if TYPE_CHECKING:
    from megacore.checkpoint.save import Outcome
    from megacore.train.build import Built
    from megacore.train.data import RunData
    from megacore.train.exporting import Exported
    from megacore.train.keeping import Resumed
    from megacore.train.loop import Late


MANY_SKIPS = 20
"""A run that skips so many steps in a row has come to nothing, which is said once."""


class Reporter:
    """Figures, events and texts of one run. ``files`` is None on ranks that are silent."""

    def __init__(
        self, config: RunConfig, mesh: ParallelMesh, files: Files | None, resumed: Resumed | None = None
    ) -> None:
        self.config, self.mesh, self.files, self.resumed = config, mesh, files, resumed
        state = {} if resumed is None else resumed.state
        self.tokens = int(state.get("tokens", 0))
        first_step = 1 if resumed is None else resumed.step + 1
        self.recorded, self.shown, self.warned = Meter(first_step), Meter(first_step), False
        self.skips = Skips(mesh.device, int(state.get("skipped", 0)))
        self.unevaluated: dict[str, Any] = {}
        """The record of a step whose evaluation a stop leaves out."""
        self.devices = Devices(mesh, config.log.gpu_every)
        self.began = time.perf_counter()
        self.samples_of: Callable[[int], int] = lambda step: 0
        """Of the first so many steps."""

    @classmethod
    def open(
        cls, config: RunConfig, mesh: ParallelMesh, colour: bool, width: int, resumed: Resumed | None = None
    ) -> Reporter:
        """Make the run's folder and files on rank 0; what goes wrong there is raised on every rank. A run that was
        ``resumed`` from its own folder goes on in its files."""
        files, error = None, None
        if mesh.rank == 0:
            try:
                files = open_files(config, colour, width, resumed)
            except (OSError, ValueError) as reason:
                error = reason
        agree(error, mesh.world)
        return cls(config, mesh, files, resumed)

    def start(
        self, built: Built, data: RunData, phases: Phases, weights: str = "", remarks: Sequence[str] = ()
    ) -> None:
        """Say what is about to run, and how long it took to get here; ``weights`` are what it begins with, if not
        random ones, ``remarks`` lines of the launcher's."""
        self.flops_per_token = train_flops_per_token(built.spec, self.config.train.seq_len)
        resumed = self.resumed
        known = {} if resumed is None else {resumed.step: resumed.samples}
        self.samples_of = lambda step: known[step] if step in known else data.plan.num_samples(step)
        if self.files is None:
            return
        c, layout, console = self.config, self.mesh.layout, self.files.console
        for line in overview(c, built.spec, layout, self.mesh.device.type, data.summary):
            console.line(line)
        console.line("kernels  " + ", ".join(f"{choice.operation} ({choice.backend})" for choice in built.kernels))
        for line in built.kernel_reasons:
            console.line(f"         {line}")
        for number, line in enumerate(remarks):
            console.line(f"{'' if number else 'set':<7}  {line}")
        console.line()
        for line in phase_lines(phases, console.paint):
            console.line(line)
        if self.devices.reason:
            console.line(f"warning  no figures of GPUs: {self.devices.reason}")
        console.line()
        self.files.events.write(
            "start",
            config_hash=config_hash(without_secrets(c)),
            layout=layout.describe(),
            world_size=layout.world,
            host=platform.node(),
            device=self.devices.name,
            parameters=built.spec.num_params,
            first_step=1 if self.resumed is None else self.resumed.step + 1,
            samples=0 if self.resumed is None else self.resumed.samples,
            startup_s={name: round(seconds, 3) for name, seconds in phases.seconds.items()},
            versions={"megacore": __version__, "torch": torch.__version__, "python": platform.python_version()},
            **({"init_from": weights} if weights else {}),
        )
        for key in hidden_keys(c):
            text = f"{key} was left out of this run file: alerts are not sent there; give it again to have them sent"
            self.warn("warning", text, step=0 if self.resumed is None else self.resumed.step)
        if weights:
            console.line(f"weights  those of {weights}")
        if self.resumed is not None:
            self.tell_resumed(self.resumed, self.files)

    def tell_resumed(self, resumed: Resumed, files: Files) -> None:
        """Where the run goes on, and what is different now."""
        for line in resumed.lines():
            head, _, text = line.partition("  ")
            files.console.line(f"{files.console.paint(head, 'yellow')}  {text}" if head == "warning" else line)
        steps = self.config.train.steps
        if resumed.step >= steps:
            files.console.line(f"nothing is left to do: train.steps={steps}")
        files.console.line()
        files.events.write(
            "resume",
            step=resumed.step,
            samples=resumed.samples,
            checkpoint=resumed.what,
            # what the life before this one has written down beyond that is made again, from the same samples
            again_until_step=max(files.last_step, resumed.step),
            again_until_sample=self.samples_of(max(files.last_step, resumed.step)),
            changes=[str(change) for change in resumed.changes],
            rejected=list(resumed.rejected),
        )
        if resumed.own:  # now that it is told: who dies before this leaves both, and nothing unaccounted for
            files.forget_after(resumed.step, Path(self.config.out))

    def saved(self, outcome: Outcome) -> None:
        """A save has ended, for good or ill."""
        if self.files is None:
            return
        console, events = self.files.console, self.files.events
        facts = {"step": outcome.step, "checkpoint": outcome.folder, "bytes": outcome.num_bytes}
        if outcome.problem:
            text = f"step {outcome.step} was not saved: {outcome.problem}"
            console.line(f"{console.paint('warning', 'yellow', 'bold')}  {text}")
            events.write("save_failed", **facts, reason=outcome.problem)
            return
        size, seconds = human_bytes(outcome.num_bytes), human_time(outcome.seconds)
        console.line(f"{console.paint('saved', 'cyan')}  step {outcome.step}: {size} in {seconds} → {outcome.folder}")
        samples = self.samples_of(outcome.step)
        events.write("save", **facts, samples=samples, seconds=round(outcome.seconds, 3), removed=list(outcome.removed))
        if outcome.remark:
            text = f"step {outcome.step} is saved, but what comes after failed: {outcome.remark}"
            console.line(f"{console.paint('warning', 'yellow', 'bold')}  {text}")
            events.write("warning", step=outcome.step, text=text)

    def exported(self, result: Exported | None) -> None:
        """An export has ended."""
        if self.files is None or result is None:
            return
        console = self.files.console
        if result.problem:
            text = f"step {result.step} was not exported: {result.problem}"
            console.line(f"{console.paint('warning', 'yellow', 'bold')}  {text}")
            self.files.events.write("export_failed", step=result.step, reason=result.problem)
            return
        console.line(f"{console.paint('export', 'cyan')}  step {result.step} as a Hugging Face model → {result.folder}")
        self.files.events.write("export", step=result.step, folder=result.folder)

    @property
    def skipped(self) -> int:
        """Steps without an update since the run began; of rank 0."""
        return self.skips.total

    def step(self, late: Late) -> None:
        """Record a step, and show it, if that is due. All ranks call it; reading the figures waits for the device."""
        if not self.devices.asked:
            self.devices.ask(late.step)
        if self.files is not None:
            self.tell(late, self.files)
        # asked for when the host has given the device all of that step, and read a step later, it is there by then
        if self.is_due(late.step + 1):
            self.devices.ask(late.step + 1)

    def is_due(self, step: int) -> bool:
        """Whether a step's figures are to be written or shown."""
        c = self.config
        every = (c.log.every, c.log.console_every, c.log.statistics_every, c.train.eval_every)
        return step in (1, c.train.steps) or any(each and step % each == 0 for each in every)

    def tell(self, late: Late, files: Files) -> None:
        """Count a step, and write and show it where that is due."""
        c = self.config
        self.tokens += late.tokens
        self.recorded.add(late)
        self.shown.add(late)
        self.skips.add(late.result.skipped)
        evaluates = late.val_loss is not None or late.unevaluated
        always = late.step in (1, c.train.steps) or evaluates
        span, metrics = None, None
        if always or late.step % c.log.every == 0 or late.result.statistics is not None:
            span = self.recorded.read()
            metrics = self.figures(late, span)
            self.record(metrics, span, files)
            if late.unevaluated:
                self.unevaluated = metrics.record()
        if always or late.step % (c.log.console_every or c.log.every) == 0:
            shown = self.shown.read()
            if metrics is None or shown != span:
                metrics = self.figures(late, shown)
            left = (c.train.steps - late.step) * (metrics.step_time_s or 0.0)
            files.console.line(format_line(metrics, c.train.steps, left, files.console.paint))

    def record(self, metrics: StepMetrics, span: Span, files: Files) -> None:
        """Write a step down, with the skipped ones since the last record."""
        files.metrics.write(metrics)
        files.watchers.log(metrics, self.devices.headroom(metrics.memory_gb))
        if not span.num_skipped:
            return
        files.events.write(
            "skip",
            first_step=span.first_step,
            last_step=span.last_step,
            count=span.num_skipped,
            reason="the gradient norm is not finite",
        )
        if not self.warned and self.skips.longest_row >= MANY_SKIPS:
            self.warned = True
            text = (
                f"{MANY_SKIPS} steps in a row were skipped because their gradients are not finite; try a lower optim.lr"
            )
            files.console.line(f"{files.console.paint('warning', 'yellow', 'bold')}  {text}")
            files.events.write("warning", step=metrics.step, text=text)

    def figures(self, late: Late, span: Span) -> StepMetrics:
        """The figures of a step; rates are averages over the steps that the line stands for, and of the whole world per
        device."""
        c = self.config
        tflops = span.tokens_per_s * self.flops_per_token / self.mesh.layout.world / 1e12
        memory_gb, gpu = self.devices.read(span.tokens_per_s)
        return StepMetrics(
            step=late.step,
            loss=late.result.loss.item(),
            grad_norm=late.result.grad_norm.item(),
            lr=late.lr,
            tokens=self.tokens,
            tokens_per_s=span.tokens_per_s,
            step_time_s=span.step_time_s,
            tflops_per_device=tflops,
            mfu=model_flops_utilization(tflops, self.devices.name, c.precision.dtype),
            memory_gb=memory_gb,
            skipped=span.num_skipped > 0,
            val_loss=None if late.val_loss is None else late.val_loss.item(),
            statistics=late.result.figures(),
            gpu=gpu,
        )

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of figures that lack an evaluation; of rank 0."""
        return {EVALUATION_DUE: finite(self.unevaluated)} if self.unevaluated else {}

    def evaluated(self, record: Mapping[str, Any], val_loss: Tensor) -> None:
        """The evaluation that a stop left out of the ``record`` of the newest step has been made up: its line is
        written again, with that. Who dies in between leaves none, and a checkpoint that has it."""
        if self.files is None:
            return
        metrics = replace(StepMetrics.of(record), val_loss=val_loss.item())
        self.files.forget_after(metrics.step - 1, Path(self.config.out))
        self.files.metrics.write(metrics)
        self.files.watchers.log(metrics)
        line = format_line(metrics, self.config.train.steps, None, self.files.console.paint)
        self.files.console.line(f"{line}  (the evaluation that a stop left out)")

    def sample(self, step: int, prompt: str, text: str) -> None:
        """Show a text that the model wrote."""
        if self.files is None:
            return
        console = self.files.console
        # On the console one line each; events.jsonl has it whole.
        shown = cut(" ".join(text.split()), console.width - visible_width(prompt) - 9)
        console.line(
            f"{console.paint('sample', 'cyan')}  {console.paint(prompt, 'bold')}{text[:1].isspace() * ' '}{shown}"
        )
        self.files.events.write("sample", step=step, prompt=prompt, text=text)
        self.files.watchers.text("samples", prompt + text, step)

    def timeline(self, step: int, measured: Timeline) -> None:
        """Keep when a step's instructions ran, as a trace and as a picture below what was to be expected of them."""
        if self.files is None:
            return
        console, out = self.files.console, Path(self.config.out)
        predicted = simulate(measured.schedule, Durations.measured(measured))
        write_trace(out / TIMELINE, predicted, measured)
        try:
            save_picture(out / TIMELINE_PICTURE, predicted, measured)
            what = TIMELINE_PICTURE
        except ValueError as missing:  # no matplotlib: the figures are in the trace
            what = f"{TIMELINE} ({missing})"
        bubbles = {"bubble": measured.bubble_fraction, "bubble_simulated": predicted.bubble_fraction}
        console.line(
            f"{console.paint('timeline', 'cyan')}  step {step}: bubble {measured.bubble_fraction:.1%}, by simulation "
            f"with its durations {predicted.bubble_fraction:.1%} → {out / what}"
        )
        self.files.events.write("timeline", step=step, **bubbles)

    def profiled(self, lines: Sequence[str], folder: Path, kinds: dict[str, Any]) -> None:
        """Show what the time of profiled steps went into."""
        if self.files is None:
            return
        console = self.files.console
        console.line(f"{console.paint('profile', 'cyan')}  {lines[0]} → {folder}")
        for line in lines[1:]:
            console.line(f"         {line}")
        self.files.events.write("profile", folder=str(folder), kinds=kinds)

    def finish(self) -> None:
        """The closing line."""
        if self.files is None:
            return
        seconds = time.perf_counter() - self.began
        skipped = self.skips.total
        without = f", {skipped} of {self.config.train.steps} steps skipped" if skipped else ""
        done = f"done: {human_count(self.tokens)} tokens in {human_time(seconds)}"
        text = f"{done}{without}; everything is in {self.config.out}"
        last = max(self.config.train.steps, 0 if self.resumed is None else self.resumed.step)
        facts = {"samples": self.samples_of(last), **self.tell_goodput(self.files)}
        self.files.console.line(text)
        self.files.events.write("finish", tokens=self.tokens, seconds=seconds, skipped=skipped, **facts)

    def stopped(self, step: int, heard: Sequence[str]) -> None:
        """The run leaves before its end, as it was asked to."""
        if self.files is None:
            return
        console, steps = self.files.console, self.config.train.steps
        goodput = self.tell_goodput(self.files)
        why = f" ({', '.join(dict.fromkeys(heard))})" if heard else " (a signal to another rank)"
        console.line(
            f"{console.paint('stopped', 'cyan')}  after step {step} of {steps}, which is saved, as was asked{why}; the "
            "same command goes on"
        )
        facts = {"samples": self.samples_of(step), "asked_by": list(dict.fromkeys(heard)), **goodput}
        self.files.events.write("stop", step=step, **facts)

    def tell_goodput(self, files: Files) -> dict[str, float]:
        """Show how much of the time, over all starts, went into steps that count."""
        found = None
        with suppress(ValueError, KeyError):  # files that somebody has edited are no reason to fail now
            found = goodput_of(Path(self.config.out), time.time())
        if found is None:
            return {}
        files.console.line(f"goodput  {found.line()}")
        return found.as_json()

    def warn(self, event: str, text: str, **facts: Any) -> None:
        """Something that a person should know, while the run goes on."""
        if self.files is None:
            return
        self.files.console.line(f"{self.files.console.paint('warning', 'yellow', 'bold')}  {text}")
        self.files.events.write(event, **facts, text=text)

    def fault(self, error: BaseException) -> None:
        """Write down what ended the run too early; whoever catches the error tells the terminal."""
        if self.files is None:
            return
        text = f"{type(error).__name__}: {error}"
        with suppress(OSError):  # a full disk may be the very fault, which must not be hidden by another
            self.files.console.note(f"fault: {text}")
            self.files.events.write("fault", error=text)

    def close(self) -> None:
        """Let go of all files."""
        self.devices.close()
        if self.files is None:
            return
        self.files.watchers.close()  # first: what they could not pass on is told
        self.files.console.close()
        self.files.metrics.close()
        self.files.events.close()
