"""What rank 0 alone does, the others would wait for: where it raises, all ranks end within seconds, with its cause.

Every such block of a run is listed here; one that is new is noticed.
"""

import ast
import json
import os
import pkgutil
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from importlib import resources
from io import StringIO
from pathlib import Path
from types import MappingProxyType
from typing import Any
from unittest.mock import patch

import pytest
import torch

from megacore.checkpoint.read import Checkpoint
from megacore.checkpoint.retain import EVALUATION_DUE
from megacore.checkpoint.write import amend
from megacore.config.schema import OptimConfig, RunConfig
from megacore.launch.failures import Failure
from megacore.launch.processes import run_local
from megacore.mesh.rank_info import RankInfo
from megacore.monitor.jsonl import read_json_lines
from megacore.monitor.run_folder import METRICS
from megacore.optim.learning_rate import learning_rate
from megacore.train.loop import train
from megacore.train.spikes import Spike, SpikeGuard
from tests.pool import JobFailed, WorkerPool
from tests.train.runs import events, requested_by, words_of

ROOMS = ("train", "checkpoint", "mesh", "data")
ALONE = (
    "rank == 0",
    "rank != 0",
    "self.files is None",
    "self.files is not None",
    "self.exporter is not None",
    "self.looks",
)
"""How such blocks begin."""
CAUSE, FIRST, RAISED, LIMIT_S = "the cause on rank 0", "what came before", "raised", 10.0
EXPORTS, PROFILES = ("checkpoint.export_hf_every=2",), ("log.profile=[2, 3]",)
SAMPLES = ("log.sample_every=2", 'log.sample_prompts=["ab"]', "log.sample_tokens=2")
RESUMES, OWES, STOPS, FAILS, GOES_ON = "resumes", "owes", "stops", "fails", "goes on"
"""In place of words: the folder has checkpoints already; the newest one's evaluation is due; rank 0 is asked to stop;
it has failed already; or nothing is lost, so the run trains on and tells it."""
SPIKES = ("guard.spike=rewind",)
CASES = MappingProxyType(
    {
        "train/heart.py::Heart.__init__": (("train.heart.Listener", ()), ("train.heart.secrets.token_hex", ())),
        "train/guards.py::ledger_of": (("train.guards.Ledger.read", (RESUMES,)),),
        "train/guards.py::Guards._go_back": (("train.guards.Ledger.write", SPIKES),),
        "train/watching.py::Watching._summarise": (("train.watching.summary_of", PROFILES),),
        "train/keeping.py::Keeper.prepare": (("train.keeping.Exporter", EXPORTS),),
        "train/keeping.py::Keeper.save": (("train.reporter.Reporter.skipped", ()),),
        "train/keeping.py::Keeper.evaluated": (("train.keeping.amend", (RESUMES, OWES, GOES_ON)),),
        "train/keeping.py::Keeper.finish": (("train.keeping.Exporter.take", EXPORTS),),
        "train/keeping.py::Keeper._report": (("train.keeping.Exporter.start", EXPORTS),),
        "train/keeping.py::Keeper._candidates": (("train.keeping._finished", ()),),
        "train/keeping.py::Keeper._put_aside": (("train.keeping._put_aside", ()),),
        "train/reporter.py::Reporter.open": (("train.reporter.open_files", ()), ("train.files.Watchers", ())),
        "train/reporter.py::Reporter.start": (
            ("train.reporter.overview", ()),
            ("train.reporter.Reporter.tell_resumed", (RESUMES,)),
        ),
        "train/reporter.py::Reporter.saved": (("train.reporter.human_bytes", ()),),
        "train/reporter.py::Reporter.exported": (("train.reporter.Reporter.exported", EXPORTS),),
        "train/reporter.py::Reporter.step": (
            ("train.reporter.Reporter.tell", ()),
            ("train.files.MetricsWriter.write", ()),
            ("train.files.Watchers.log", ()),
        ),
        "train/reporter.py::Reporter.evaluated": (("train.reporter.Files.forget_after", (RESUMES, OWES)),),
        "train/reporter.py::Reporter.sample": (("train.reporter.cut", SAMPLES),),
        "train/reporter.py::Reporter.timeline": (("train.reporter.simulate", ("log.timeline_step=3",)),),
        "train/reporter.py::Reporter.profiled": (("train.reporter.Reporter.profiled", PROFILES),),
        "train/reporter.py::Reporter.finish": (("train.reporter.human_count", ()),),
        "train/reporter.py::Reporter.stopped": (("train.reporter.Reporter.stopped", (STOPS,)),),
        "train/reporter.py::Reporter.warn": (("train.reporter.Reporter.warn", SPIKES),),
        "train/reporter.py::Reporter.fault": (("train.reporter.Reporter.fault", (FAILS,)),),
        "train/reporter.py::Reporter.close": (
            ("train.files.Watchers.close", ()),
            ("train.devices.Devices.close", ()),
        ),
        "train/wishes.py::Wishes.now": (("train.wishes.Wishes.now", ()),),
        "train/wishes.py::Wishes._remove": (("train.wishes.Wishes._remove", ()),),
        "checkpoint/save.py::Saver.preflight": (("checkpoint.save.Saver._room_problem", ()),),
        "checkpoint/save.py::Saver._has_room": (("checkpoint.save.remove_unfinished", ()),),
        "checkpoint/save.py::Saver._commit": (("checkpoint.save.commit", ()), ("checkpoint.save.prune", (GOES_ON,))),
    }
)
"""By block, where an exception is raised (below ``megacore``), and what else is asked for."""
DISKS_FAIL = (
    "train.heart.Listener",
    "train.guards.Ledger.read",
    "train.guards.Ledger.write",
    "train.keeping._finished",
    "train.keeping._put_aside",
    "train.keeping.amend",
    "train.reporter.open_files",
    "train.files.MetricsWriter.write",
    "train.reporter.Reporter.fault",
    "checkpoint.save.commit",
)
"""Where an OSError is met in a way of its own, or most likely."""
BEFORE_THERE_IS_A_RUN = (
    *("mesh/meeting.py::meet", "mesh/meeting.py::opened", "mesh/meeting.py::missing_0"),
    "mesh/process_group.py::compare_hashes",
)
"""Nobody waits there for longer than ranks may take to come (tests/mesh/test_process_group.py)."""


def blocks_in(room: str) -> Iterator[str]:
    """FILE::FUNCTION of what rank 0 alone does."""
    root = Path(str(resources.files("megacore")))
    for path in sorted((root / room).rglob("*.py")):
        for names, node in named(ast.parse(path.read_text()), ()):
            if isinstance(node, ast.If | ast.IfExp) and any(each in ast.unparse(node.test) for each in ALONE):
                yield f"{path.relative_to(root)}::{'.'.join(names)}"


def named(node: ast.AST, names: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], ast.AST]]:
    """All below a node, with the names of the classes and functions around it."""
    for child in ast.iter_child_nodes(node):
        inner = (*names, child.name) if isinstance(child, ast.FunctionDef | ast.ClassDef) else names
        yield inner, child
        yield from named(child, inner)


def test_all_blocks_are_listed() -> None:
    found = {block for room in ROOMS for block in blocks_in(room)}
    assert found == {*CASES, *BEFORE_THERE_IS_A_RUN}


def raising(error: type[Exception], raised: Path, text: str = CAUSE) -> Callable[..., Any]:
    """Instead of a function; ``raised`` then says when it first was."""

    def instead(*ignored: object, **also: object) -> None:
        if not raised.exists():
            raised.write_text(str(time.time()))
        raise error(text)

    return instead


def replaced(name: str, new: Callable[..., Any]) -> Any:
    """A patch of ``megacore.name``."""
    owner, _, attribute = f"megacore.{name}".rpartition(".")
    found = getattr(pkgutil.resolve_name(owner), attribute)
    return patch(f"megacore.{name}", property(new) if isinstance(found, property) else new)


def jump(guard: SpikeGuard, step: int, loss: float) -> Spike | None:
    return Spike(step, loss, 1.0, 9.0) if step == 3 else None


def asked_to_stop(optim: OptimConfig, step: int) -> float:
    os.kill(os.getpid(), signal.SIGUSR1)
    return learning_rate(optim, step)


def run_of_rank(rank: int, config: RunConfig, name: str, error: type[Exception], more: list[str], told: Path) -> None:
    """A run that leaves in ``told`` how it ends on this rank: when, text of what was raised or '', whether that is
    about a lost peer. A rank that raises is gone then, as in a run of its own."""
    patches = [patch("megacore.train.loop.join", lambda config, info: torch.device("cpu"))]
    patches += [redirect_stdout(StringIO()), redirect_stderr(StringIO())]
    if config.guard.spike == "rewind":
        patches.append(patch.object(SpikeGuard, "see", jump))
    if rank == 0:
        patches += [patch("megacore.train.loop.learning_rate", asked_to_stop)] if STOPS in more else []
        patches += (
            [replaced("train.reporter.Reporter.tell", raising(KeyError, told / RAISED, FIRST))] if FAILS in more else []
        )
        patches += [replaced(name, raising(error, told / RAISED))] if name else []
    text, is_follow_up = "", False
    with ExitStack() as stack:
        for each in patches:
            stack.enter_context(each)
        try:
            train(RankInfo(rank, 2, rank, 2), config)
        except Exception as reason:
            failure = Failure.of_exception(rank, reason)
            text, is_follow_up = f"{failure.title}: {failure.message}", failure.is_follow_up
    outcome = {"ended": time.time(), "text": text, "is_follow_up": is_follow_up}
    (told / str(rank)).write_text(json.dumps(outcome))
    if rank == 0 and text:
        os._exit(1)


def outcomes(
    pool: WorkerPool, config: RunConfig, name: str, error: type[Exception], more: Sequence[str], told: Path
) -> list[dict[str, Any]]:
    """Of both ranks. Raises AssertionError where one does not end."""
    failed = ""
    try:
        pool.run(run_of_rank, 2, config, name, error, list(more), told, timeout_s=90)
    except JobFailed as reason:  # its rank 0 is gone
        failed = str(reason)
    assert {"0", "1"} <= {file.name for file in told.iterdir()}, f"a rank has not ended: {failed}"
    return [json.loads((told / rank).read_text()) for rank in "01"]


@pytest.fixture(scope="module")
def begun(pool: WorkerPool, letters: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that could be longer."""
    out = tmp_path_factory.mktemp("begun") / "run"
    config = requested_by(words_of(letters, out, "train.steps=4", "optim.decay_steps=6"), 2)
    found = outcomes(pool, config, "", OSError, (), tmp_path_factory.mktemp("told"))
    assert [each["text"] for each in found] == ["", ""]
    return out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "words", "error"),
    [
        (*case, error)
        for cases in CASES.values()
        for case in cases
        for error in (OSError, RuntimeError)
        if error is RuntimeError or case[0] in DISKS_FAIL
    ],
)
def test_all_ranks_end_with_the_cause(
    pool: WorkerPool,
    begun: Path,
    name: str,
    words: tuple[str, ...],
    error: type[Exception],
    letters: str,
    tmp_path: Path,
) -> None:
    out = tmp_path / "run"
    if RESUMES in words:
        shutil.copytree(begun, out)
    if OWES in words:
        checkpoint = Checkpoint.open(str(out))
        amend(checkpoint.store, {**checkpoint.manifest.state, EVALUATION_DUE: read_json_lines(out / METRICS)[-1]})
    keys = [word for word in words if "=" in word]
    config = requested_by(words_of(letters, out, "optim.decay_steps=6", *keys), 2)
    told = tmp_path / "told"
    told.mkdir()
    own, other = outcomes(pool, config, name, error, words, told)
    goes_on = GOES_ON in words or (name == "train.heart.Listener" and error is OSError)
    if goes_on:
        assert GOES_ON not in words or any(CAUSE in each["text"] for each in events(out, "warning"))
        assert own["text"] == other["text"] == "" and events(out, "finish")
        return
    assert max(own["ended"], other["ended"]) - float((told / RAISED).read_text()) < LIMIT_S
    assert (FIRST if FAILS in words else CAUSE) in own["text"] and not own["is_follow_up"]
    assert not other["text"] or other["is_follow_up"] or CAUSE in other["text"]


def meets_nobody(info: RankInfo, config: RunConfig) -> int:
    """A run whose rank 0 fails while it compares what the ranks are to run, for which they wait."""
    if info.rank == 0:
        with patch("megacore.mesh.process_group.compare_hashes", raising(RuntimeError, Path(config.out) / RAISED)):
            return train(info, config)
    return train(info, config)


@pytest.mark.slow
def test_a_run_that_never_met_ends_too(letters: str, tmp_path: Path) -> None:
    said: list[str] = []
    config = requested_by(words_of(letters, tmp_path), 2)
    assert run_local(f"{__name__}:meets_nobody", (config,), 2, said.append) == 1
    assert time.time() - float((tmp_path / RAISED).read_text()) < LIMIT_S
    assert "rank 0 of 2 failed" in said[0] and CAUSE in said[0]
