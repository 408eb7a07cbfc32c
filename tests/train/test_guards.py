"""Losses that jump are undone, copies that differ and slow ranks are named."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from megacore.checkpoint.read import Checkpoint
from megacore.config.schema import GuardConfig
from megacore.config.validate import validate
from megacore.data.skipping import place
from megacore.launch.train import main
from megacore.monitor.run_folder import SKIPPED
from megacore.train.failpoints import VARIABLE, Provoked
from megacore.train.replicas import digest, odd_ones
from megacore.train.spikes import FEWEST, Ledger, SpikeGuard
from megacore.train.stragglers import OwnTime, slow_ones
from tests.train.runs import events, figures, interrupted, last_state, words_of


def test_a_jump_is_seen_and_a_ripple_is_not() -> None:
    guard = SpikeGuard(GuardConfig(), {})
    generator = np.random.default_rng(1)
    losses = 4 - 0.01 * np.arange(100) + generator.normal(0, 0.03, 100)
    assert not any(guard.see(step, loss) for step, loss in enumerate(losses.tolist()))
    spike = guard.see(100, 5.0)
    assert spike is not None and spike.step == 100 and spike.sigmas > 6 and "lies" in spike.text
    assert guard.see(101, float(losses[-1])) is None, "one odd loss moves no median"


@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_does_not_poison_it(odd: float) -> None:
    guard = SpikeGuard(GuardConfig(), {})
    for step in range(40):
        assert guard.see(step, 2.0 + 0.001 * (step % 3)) is None
    assert guard.see(40, odd) is None
    again = SpikeGuard(GuardConfig(), json.loads(json.dumps(guard.state())))
    assert all(map(math.isfinite, again.losses)) and len(again.losses) == 40
    assert again.see(41, 2.001) is None and again.see(42, 3.0) is not None


def test_too_few_losses_judge_nothing() -> None:
    guard = SpikeGuard(GuardConfig(), {})
    assert not any(guard.see(step, 1.0 + 100 * (step == FEWEST - 1)) for step in range(FEWEST))


def test_holes_move_what_comes_after() -> None:
    ledger = Ledger().with_batch([8, 9, 10, 11])
    assert place(np.arange(12), ledger.holes).tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 12, 13, 14, 15]
    ledger = ledger.with_batch(place(np.arange(6, 10), ledger.holes).tolist())  # 6 7 12 13, around the first one
    assert ledger.holes == ((6, 8), (8, 12), (12, 14)) and ledger.batches == 2
    assert place(np.arange(8), ledger.holes).tolist() == [0, 1, 2, 3, 4, 5, 14, 15]


def test_a_damaged_ledger_is_refused(tmp_path: Path) -> None:
    assert Ledger.read(tmp_path) == Ledger()
    Ledger(((3, 5),), 1).write(tmp_path)
    assert Ledger.read(tmp_path) == Ledger(((3, 5),), 1)
    assert Ledger(((3, 5),), 1).joined(Ledger(((3, 5), (7, 9)), 2)) == Ledger(((3, 5), (7, 9)), 2)
    (tmp_path / SKIPPED).write_text('{"samples": 3')
    with pytest.raises(ValueError, match="restore it, or remove it"):
        Ledger.read(tmp_path)


LONG = ("train.steps=30", "guard.spike=rewind", "checkpoint.save_every=5", "checkpoint.keep=0", "optim.decay_steps=30")


def spoil(monkeypatch: pytest.MonkeyPatch, bad: int) -> None:
    """From the sample with this ordinal on, its batch makes the loss jump: its labels are all one rare token."""
    from megacore.train.feed import Feed

    taken = Feed.step

    def spoilt(feed: Feed, step: int) -> object:
        batches = taken(feed, step)
        for each in batches:
            hit = ((each.ordinal_b >= bad) & (each.ordinal_b < bad + 8)).view(-1, 1)
            each.label_bs.copy_(torch.where(hit, 200, each.label_bs))
        return batches

    monkeypatch.setattr(Feed, "step", spoilt)


def test_back_before_a_spike(letters: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run goes back, leaves the batch out, and ends as one that never had it in its data; a second start knows."""
    spoil(monkeypatch, bad=8 * 22)
    words = words_of(letters, tmp_path / "run", *LONG)
    assert main(words) == 0
    (rewind,) = events(tmp_path / "run", "rewind")
    assert (rewind["step"], rewind["to_step"], rewind["samples"]) == (23, 20, [176, 184])
    assert json.loads((tmp_path / "run" / SKIPPED).read_text()) == {
        "skipped_samples": [[176, 184]],
        "skipped_batches": 1,
    }
    assert [each["step"] for each in figures(tmp_path / "run")] == list(range(1, 31))
    assert max(each["loss"] for each in figures(tmp_path / "run")[15:]) < figures(tmp_path / "run")[0]["loss"]
    without = tmp_path / "without"
    without.mkdir()
    monkeypatch.setattr("megacore.train.loop.ledger_of", lambda *_: Ledger(((176, 184),), 1))
    assert main(words_of(letters, without, *LONG)) == 0
    assert figures(without) == figures(tmp_path / "run")
    assert last_state(without, 30) == last_state(tmp_path / "run", 30)


def test_what_a_checkpoint_before_a_spike_lacks_begins_anew(
    letters: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where nothing was trained after it: what the spike's step had left behind is gone."""
    run, without, words = tmp_path / "run", tmp_path / "without", (*LONG, "train.steps=25")
    interrupted(monkeypatch, 22, words_of(letters, run, *words))
    shutil.copytree(run, without)
    words = (*words, "optim.clip=adagc", "optim.adagc_warmup_steps=1")
    with monkeypatch.context() as patch:
        spoil(patch, bad=8 * 22)
        assert main(words_of(letters, run, *words)) == 0
    (rewind,) = events(run, "rewind")
    assert (rewind["step"], rewind["to_step"]) == (23, 20)
    assert Checkpoint.open(str(run)).read_key("state/clip/clock", (), ()).item() == 5
    monkeypatch.setattr("megacore.train.loop.ledger_of", lambda *_: Ledger(((176, 184),), 1))
    assert main(words_of(letters, without, *words)) == 0
    assert figures(without) == figures(run)
    assert last_state(without, 25) == last_state(run, 25)


def test_an_alert_changes_nothing(letters: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(monkeypatch, bad=8 * 22)
    assert main(words_of(letters, tmp_path, "train.steps=25", "checkpoint.save_every=0")) == 0
    (spike,) = events(tmp_path, "spike")
    assert spike["step"] == 23 and spike["sigmas"] > 6 and "usually" in spike["text"]
    assert not events(tmp_path, "rewind") and not (tmp_path / SKIPPED).exists()


def test_what_cannot_be_undone_is_told(letters: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(monkeypatch, bad=8 * 22)
    assert main(words_of(letters, tmp_path, *LONG, "guard.max_rewinds=0")) == 0
    (spike,) = events(tmp_path, "spike")
    assert spike["not_undone"] == "guard.max_rewinds=0 batches are left out already"
    other = tmp_path / "other"
    assert main(words_of(letters, other, *LONG, "checkpoint.save_every=29")) == 0
    assert "no checkpoint before it" in events(other, "spike")[0]["not_undone"]


def test_a_nan_poisons_neither_a_run_nor_the_one_that_goes_on(
    letters: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One loss is none, so its step is skipped; what is resumed then skips nothing, and knows a jump from a ripple."""
    spoil(monkeypatch, bad=8 * 26)
    more = ("train.steps=30", "train.eval_every=0", "checkpoint.save_every=5", "optim.decay_steps=30")
    monkeypatch.setenv(VARIABLE, "activation#2:0:18:nan")
    assert main(words_of(letters, tmp_path / "whole", *more)) == 0
    monkeypatch.setenv(VARIABLE, "activation#2:0:18:nan,step:0:23:raise")
    words = words_of(letters, tmp_path / "run", *more)
    with pytest.raises(Provoked):
        main(words)
    kept = Checkpoint.open(str(tmp_path / "run")).manifest.state["guard"]["losses"]
    assert len(kept) == 19 and all(map(math.isfinite, kept)) and len(kept) > FEWEST
    monkeypatch.delenv(VARIABLE)
    assert main(words) == 0
    assert events(tmp_path / "run", "resume")[0]["step"] == 20
    assert {each["first_step"] for each in events(tmp_path / "run", "skip")} == {18}
    assert [each["step"] for each in figures(tmp_path / "run") if each["skipped"]] == [18]
    assert [each["step"] for each in events(tmp_path / "run", "spike")] == [27]
    assert figures(tmp_path / "run")[18:] == figures(tmp_path / "whole")[18:]
    assert last_state(tmp_path / "run", 30) == last_state(tmp_path / "whole", 30)


def test_rules_of_guards() -> None:
    from megacore.config.load import load

    def told(*words: str) -> str:
        return "\n".join(validate(load(None, list(words), "demo"), 1))

    assert "save_every=0 makes none" in told("guard.spike=rewind", "checkpoint.save_every=0")
    assert "data.index=megacore" in told("guard.spike=rewind", "data.index=megatron", "checkpoint.save_every=5")
    assert "raise it" in told("guard.abort_s=3")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.uint8])
def test_any_bit_changes_the_digest(dtype: torch.dtype) -> None:
    x = torch.arange(1, 100).to(dtype)
    before = digest(x)
    for place_ in (0, 7, 98):
        for bit in range(8 * x.element_size()):
            words = x.clone().view(torch.uint8)
            words[place_ * x.element_size() + bit // 8] ^= 1 << bit % 8
            assert digest(words.view(dtype)) != before


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.uint8])
def test_the_digest_is_one_of_elements_wherever_they_lie(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megacore.train.replicas.PIECE", 8)  # so that there are several
    for number in (0, 1, 7, 8, 9, 45):
        x = torch.randn(number, generator=torch.Generator().manual_seed(number)).abs().mul(50).to(dtype)
        for offset in range(1, 9):
            ones = torch.ones(offset, dtype=dtype)
            assert digest(torch.cat((ones, x, ones))[offset : offset + number]) == digest(x)


def test_who_differs() -> None:
    assert odd_ones({0: 5, 1: 5, 2: 5}) is None
    assert odd_ones({0: 5, 3: 5, 6: 4}) == ((6,), True)
    assert odd_ones({0: 5, 1: 4}) == ((0, 1), False)


def test_the_slow_rank_is_named() -> None:
    times = [OwnTime(rank, f"node{rank // 4}", rank % 2, 0.1 + 0.001 * rank + 0.1 * (rank == 9)) for rank in range(16)]
    (found,) = slow_ones(times)
    assert found.own.rank == 9 and "rank 9 (node2)" in found.text and "times as long" in found.text
    assert slow_ones([each for each in times if each.rank != 9]) == ()
    two = [OwnTime(0, "a", 0, 0.1), OwnTime(1, "b", 0, 0.2)]
    assert [each.own.rank for each in slow_ones(two)] == [1]


def test_stragglers_are_timed_in_a_run(letters: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Timing changes no bit; of a run of one process nobody is slow."""
    more = ("guard.stragglers_every=2", "guard.replicas_every=2")
    assert main(words_of(letters, tmp_path / "timed", *more)) == 0
    assert main(words_of(letters, tmp_path / "plain")) == 0
    assert last_state(tmp_path / "timed") == last_state(tmp_path / "plain")
    assert not events(tmp_path / "timed", "straggler")
