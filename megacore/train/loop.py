"""A run from its first step to its last: the loop that everything else serves."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from megacore.config.schema import RunConfig
from megacore.exits import STOPPED
from megacore.generate.sample import continue_tokens
from megacore.mesh import process_group
from megacore.mesh.rank_info import RankInfo
from megacore.monitor.console import Phases
from megacore.optim.learning_rate import learning_rate
from megacore.pipeline.clock import Mark
from megacore.train.build import Built, build, join
from megacore.train.data import RunData, open_data, tokenizer_files
from megacore.train.guards import Guards, ledger_of
from megacore.train.heart import Heart
from megacore.train.keeping import Keeper, Resumed
from megacore.train.reporter import Reporter
from megacore.train.state import State
from megacore.train.step import StepResult
from megacore.train.timing import StepClock
from megacore.train.watching import Watching
from megacore.train.wishes import Asked, Wishes

GO_BACK = -1
"""What ``live`` returns in place of an exit code where it is to be lived again, from its newest checkpoint."""


def train(
    info: RankInfo, config: RunConfig, colour: bool = False, width: int = 100, remarks: Sequence[str] = ()
) -> int:
    """Train ``config`` (checked and resolved) as rank ``info``; returns the exit code. Rank 0 speaks for all, and says
    the launcher's ``remarks`` at the start."""
    phases = Phases()
    with phases.time("join"):
        device = join(config, info)
    wishes = Wishes(Path(config.out), info.rank == 0, device)
    try:
        with wishes.listening(for_good=info.world_size > 1):
            return run(info, config, device, phases, colour, width, wishes, remarks)
    finally:
        process_group.stop()


def run(
    info: RankInfo,
    config: RunConfig,
    device: torch.device,
    phases: Phases,
    colour: bool,
    width: int,
    wishes: Wishes,
    remarks: Sequence[str],
) -> int:
    """Build and walk the run; the exit code. A function of its own: all that holds a process group ends with it."""
    built = build(config, info, device, phases)
    with phases.time("state"):
        state = State(built)
    speak = partial(Reporter.open, colour=colour, width=width)
    with closing(Heart(config, info, built.mesh)) as heart:
        while True:
            code = live(built, state, phases, speak, wishes, heart, remarks)
            if code != GO_BACK:
                return code
            # now from a checkpoint of its own, whatever it began with
            built = replace(built, config=replace(config, checkpoint=replace(config.checkpoint, resume="auto")))


def live(
    built: Built,
    state: State,
    phases: Phases,
    speak: Callable[..., Reporter],
    wishes: Wishes,
    heart: Heart,
    remarks: Sequence[str],
) -> int:
    """From a checkpoint, or the beginning, to the end, or to where the run wants to go back; the exit code."""
    config, mesh = built.config, built.mesh
    keeper = Keeper(built, built.failpoints, state)
    with phases.time("state"):
        resumed = keeper.resume()
        fresh = resumed is None and config.checkpoint.init_from
        weights = keeper.begin_from(config.checkpoint.init_from) if fresh else ""
    with phases.time("data"):
        start = (1, 0) if resumed is None else (resumed.step + 1, resumed.samples)
        ledger = ledger_of(config.out, resumed, mesh.world)
        data = open_data(config, mesh, start, ledger.holes)
        if resumed is not None:
            keeper.check_data(resumed, data)
    keeper.prepare(tokenizer_files(config.data.tokenizer))
    watching = Watching(built)
    reporter = speak(config, mesh, resumed=resumed)
    guards = Guards(built, data, keeper, reporter, ledger, {} if resumed is None else resumed.state)
    heart.events = None if reporter.files is None else reporter.files.events
    try:
        reporter.start(built, data, phases, weights, remarks)
        if weights and keeper.other_tokenizer:
            spec = config.data.tokenizer
            reporter.warn("warning", f"data.tokenizer={spec} is not the one of {weights}: ids now mean other text")
        loop = Loop(built, data, reporter, keeper, wishes, watching, heart, guards)
        code = loop.make_up(resumed) or loop.run(start[0])
    except BaseException as error:
        with suppress(Exception):  # what fails in the wake of a fault must not hide it
            reporter.fault(error)
        with suppress(Exception):
            let_go(heart, watching, keeper, reporter)
        raise
    let_go(heart, watching, keeper, reporter)
    return code


def let_go(heart: Heart, watching: Watching, keeper: Keeper, reporter: Reporter) -> None:
    """Close all that one life of a run has opened, whatever becomes of some of it."""
    heart.events = None
    with ExitStack() as stack:
        for each in (reporter, keeper, watching):  # the last one first
            stack.callback(each.close)


@dataclass
class Late:
    """A step whose figures still lie on the device: they are read while the next step runs."""

    step: int
    result: StepResult
    lr: float
    began: Mark
    ended: Mark
    tokens: int
    val_loss: Tensor | None = None
    unevaluated: bool = False
    """Whether a stop leaves its evaluation out, which is made up when the run is taken up again."""


class Loop:
    """Walks the steps of a built run."""

    def __init__(
        self,
        built: Built,
        data: RunData,
        reporter: Reporter,
        keeper: Keeper,
        wishes: Wishes,
        watching: Watching,
        heart: Heart,
        guards: Guards,
    ) -> None:
        self.built, self.data, self.reporter, self.keeper, self.config = built, data, reporter, keeper, built.config
        self.wishes, self.watching, self.heart, self.guards = wishes, watching, heart, guards
        built.trainer.wishes = wishes.now
        self.late: Late | None = None

    def run(self, first_step: int = 1) -> int:
        """All steps from ``first_step`` on; each step's figures are read and written one step later: the device never
        waits for the host. Returns the exit code."""
        c, device = self.config, self.built.mesh.device
        began = Mark(device)
        for step in range(first_step, c.train.steps + 1):
            self.heart.step(step)
            self.built.failpoints.begin(step)
            batch = self.data.plan.batch(step)
            microbatches = self.data.feed.step(step)
            lr = learning_rate(c.optim, step)
            timed = step == c.log.timeline_step
            clock = StepClock(self.built.mesh) if timed or self.guards.times(step) else None
            marks = None if clock is None else clock.marks
            watched = self.due(c.log.statistics_every, step)
            self.watching.begin(step)
            result = self.built.trainer.step(microbatches, batch.size * c.train.seq_len, lr, marks, watched)
            ended = Mark(device)
            looked = self.watching.end(step, self.reporter)
            self.guards.after(step, len(microbatches), self.built.trainer.plan, marks)
            if timed and clock is not None:
                self.reporter.timeline(step, clock.read(self.built.trainer.plan(len(microbatches))))
            asked = self.flush()
            if asked.profile and self.watching.ask(step + 1):
                self.wishes.profiling()
            if self.guards.goes_back:
                return self.go_back()
            self.late = Late(step, result, lr, began, ended, batch.size * c.train.seq_len)
            evaluates, samples = self.due(c.train.eval_every, step), self.due(c.log.sample_every, step)
            saves = self.due(c.checkpoint.save_every, step) or self.due(c.checkpoint.export_hf_every, step)
            val_loss = None
            last = step == c.train.steps  # whose evaluation nobody would make up: no run is taken up after it
            if evaluates and (last or not asked.stop):
                self.heart.does("evaluation")
                self.late.val_loss = val_loss = self.evaluate(hurries=not last)
            self.late.unevaluated = evaluates and val_loss is None
            stops = asked.stop or self.late.unevaluated
            if samples and not stops:
                self.heart.does("sampling")
                self.flush()
                self.sample(step)
            self.keeper.poll(self.reporter)
            if saves or stops or asked.save:
                self.heart.does("saving")
                self.save(step, val_loss)
            if self.guards.goes_back:
                return self.go_back()
            if stops and step < c.train.steps:
                return self.stop(step)
            # a step lasts from the end of the one before, but for what is no training
            began = Mark(device) if evaluates or samples or saves or looked else ended
        self.heart.does("the end")
        self.flush()
        if self.guards.goes_back:
            return self.go_back()
        self.keeper.finish(self.reporter)
        self.reporter.finish()
        return 0

    def make_up(self, resumed: Resumed | None) -> int:
        """Make the evaluation that a stop left out after the step from which the run goes on. Returns 0, or the exit
        code where the run is asked to stop meanwhile: it is due still."""
        if resumed is None or not resumed.unevaluated or not self.config.train.eval_every:
            return 0
        self.heart.does("evaluation")
        val_loss = self.evaluate()
        if val_loss is None:
            return self.stop(resumed.step)
        self.reporter.evaluated(resumed.unevaluated, val_loss)
        self.keeper.evaluated(resumed, val_loss.item(), self.reporter)
        return 0

    def save(self, step: int, val_loss: Tensor | None) -> None:
        """Keep the state after a step. Its figures are written down before: what is resumed has no gap."""
        self.flush()
        if self.guards.goes_back:
            return
        loss = None if val_loss is None else val_loss.item()
        self.keeper.save(step, self.data, self.reporter, loss, self.guards.state() | self.reporter.state())
        self.wishes.saved()

    def go_back(self) -> int:
        """Leave, to be taken up again from a checkpoint before a spike."""
        self.heart.does("going back")
        return GO_BACK

    def stop(self, step: int) -> int:
        """Leave after ``step``, which is saved, as was asked; returns the exit code."""
        self.keeper.finish(self.reporter)
        self.wishes.stopped()
        self.reporter.stopped(step, self.wishes.heard)
        return STOPPED

    def due(self, every: int, step: int) -> bool:
        """Whether what happens every so many steps, and after the last, happens after this one; 0: never."""
        return every > 0 and (step % every == 0 or step == self.config.train.steps)

    def flush(self) -> Asked:
        """Read and report the figures of the step before; returns what was asked during it."""
        late, self.late = self.late, None
        if late is None:
            return Asked()
        self.reporter.step(late)
        self.guards.see(late.step, late.result.loss.item())
        return Asked.of(late.result.asked)

    def evaluate(self, hurries: bool = True) -> Tensor | None:
        """Mean cross-entropy over the evaluation batches, a scalar on the device; with ``hurries`` None where the run
        is asked to stop meanwhile, which a batch later is seen."""
        total = torch.zeros(5, dtype=torch.float64, device=self.built.mesh.device)
        before = None
        for microbatches in self.data.evaluation():
            batch = self.built.trainer.evaluate(microbatches)
            if hurries and before is not None and Asked.of(before[2:]).stop:
                return None
            total, before = total + batch, batch
        return total[0] / total[1]

    def sample(self, step: int) -> None:
        """Continue each prompt, on all ranks alike."""
        log, tokenizer = self.config.log, self.data.tokenizer
        assert tokenizer is not None, "a run that samples without a tokenizer is refused before it starts"
        for prompt in log.sample_prompts:
            tokens = continue_tokens(
                self.built.trainer,
                tokenizer.encode(prompt),
                log.sample_tokens,
                self.config.train.seq_len,
                log.sample_temperature,
                self.data.eod,
                seed=step,
                num_choices=tokenizer.vocab_size,
            )
            self.reporter.sample(step, prompt, tokenizer.decode(tokens))
