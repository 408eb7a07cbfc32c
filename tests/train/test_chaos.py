"""Random kills of ranks, launchers and hosts: runs end as if there were none, and every sample is accounted for.

`MEGACORE_KILLS=200 bash tests/run.sh -m slow -s tests/train/test_chaos.py` kills 203 times in all: 51 in jobs over two
hosts of a network, 50 while the number of ranks changes, the others on one machine with one layout. What is killed when
is drawn from a seed, MEGACORE_CHAOS (default 0).
"""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.launch.chaos import Hosts, hosts_or_skip
from tests.train.chaos import BATCH, SMALL, Chaos, Local, startup_of, weights_apart
from tests.train.notes import MICROBATCH, accounted, environment, order_of, same_order
from tests.train.runs import figures, last_state, words_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(7200)]

KILLS = int(os.environ.get("MEGACORE_KILLS", "16"))
SEED = os.environ.get("MEGACORE_CHAOS", "0")
STEPS = 24
LAYOUTS = {
    "tp": ("parallel.tp=2", "parallel.sequence_parallel=true"),
    "pp": ("parallel.pp=2", "parallel.schedule=zb-h1"),
    "zero3": ("parallel.zero=3",),
}
LADDER = (
    ("parallel.dp=4", "--nproc", "4"),
    ("parallel.dp=2", "--nproc", "2"),
    ("--nproc", "1"),
    ("parallel.dp=2", "parallel.zero=3", "--nproc", "2"),
    ("parallel.tp=2", "--nproc", "2"),
    ("--nproc", "1"),
    ("parallel.pp=2", "parallel.schedule=zb-h1", "--nproc", "2"),
)
# ranks per host, and the share of kills: one in so many
JOBS = {
    "two ranks": (1, 6, ("parallel.pp=2", "parallel.schedule=1f1b")),
    "four ranks": (2, 12, ("parallel.tp=2", "parallel.zero=1")),
}
TOLERANCE = 1e-9


class Whole:
    """A run that nobody kills."""

    def __init__(self, letters: str, folder: Path, layout: tuple[str, ...]) -> None:
        self.out, self.notes = folder / "run", folder / "notes"
        self.words = [*SMALL, f"train.steps={STEPS}"]
        command = [sys.executable, "-m", "megacore", "train", *words_of(letters, self.out, *self.words, *layout)]
        began = time.time()
        subprocess.run(command, env=environment(self.notes), check=True, stdout=subprocess.DEVNULL, timeout=300)
        self.startup_s = startup_of(began, self.notes)
        self.order: dict[int, tuple[MICROBATCH, ...]] = order_of(self.notes, STEPS, BATCH)


def checked(out: Path, notes: Path, whole: Whole) -> str:
    """Samples and their order, by what ranks did and by what the run's folder tells."""
    begun = same_order(notes, whole.order)
    again = accounted(out, notes, STEPS, BATCH)
    return f"{begun} steps begun again, {again} samples told of as trained again"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_random_kills_change_nothing(layout: str, letters: str, tmp_path: Path) -> None:
    """At one layout: the bits of all figures and of the last checkpoint."""
    more = (*LAYOUTS[layout], "--nproc", "2")
    whole = Whole(letters, tmp_path / "whole", more)
    chaos, kills = Chaos(f"{SEED} {layout}", whole.startup_s), -(-KILLS // 6)
    while chaos.kills < kills:
        folder = tmp_path / str(chaos.kills)
        run = Local([more], words_of(letters, folder / "run", *whole.words), folder)
        chaos.to_the_end(run, kills - chaos.kills)
        assert figures(folder / "run") == figures(whole.out)
        assert last_state(folder / "run", STEPS) == last_state(whole.out, STEPS)
        print(f"\n{layout}: {chaos.summary()}; {checked(folder / 'run', run.notes, whole)}", flush=True)


def test_random_kills_and_other_numbers_of_ranks(letters: str, tmp_path: Path) -> None:
    """After each kill of the launcher the run goes on in another layout: one process' figures and weights, but for
    rounding, from the very same samples in the same order."""
    whole = Whole(letters, tmp_path / "whole", ("--nproc", "1"))
    chaos, kills = Chaos(f"{SEED} ladder", whole.startup_s), -(-KILLS // 4)
    while chaos.kills < kills:
        folder = tmp_path / str(chaos.kills)
        run = Local(LADDER, words_of(letters, folder / "run", *whole.words), folder)
        chaos.to_the_end(run, kills - chaos.kills)
        for ours, expected in zip(figures(folder / "run"), figures(whole.out), strict=True):
            assert ours == pytest.approx(expected, rel=TOLERANCE, abs=0)
        apart = weights_apart(folder / "run", whole.out, STEPS)
        assert apart <= TOLERANCE
        told = f"{run.starts} layouts, weights apart by {apart:.1e} of the largest"
        print(f"\nladder: {chaos.summary()}; {told}; {checked(folder / 'run', run.notes, whole)}", flush=True)


@pytest.mark.parametrize("job", JOBS)
def test_random_kills_of_hosts_change_nothing(job: str, letters: str, tmp_path: Path) -> None:
    """A job over two hosts of a network loses ranks, commands, and whole hosts with all their processes."""
    nproc, share, layout = JOBS[job]
    whole = Whole(letters, tmp_path / "whole", (*layout, "--nproc", str(2 * nproc)))
    chaos, kills = Chaos(f"{SEED} {job}", 2 * whole.startup_s), -(-KILLS // share)
    while chaos.kills < kills:
        folder = tmp_path / str(chaos.kills)
        with hosts_or_skip(2, nproc, folder / "cluster") as cluster:
            run = Hosts(cluster, words_of(letters, folder / "run", *whole.words, *layout), folder)
            chaos.to_the_end(run, kills - chaos.kills)
        assert figures(folder / "run") == figures(whole.out)
        assert last_state(folder / "run", STEPS) == last_state(whole.out, STEPS)
        print(f"\nhosts, {job}: {chaos.summary()}; {checked(folder / 'run', run.notes, whole)}", flush=True)
