"""Optimizers a bucket at a time, with state in host memory, in files, or beside weights that another device trains."""

import errno
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megacore.config.optimizers import defaults, optimizer_names
from megacore.config.schema import OptimConfig
from megacore.optim.formats import StateFormat
from megacore.optim.offload import HostMemory, Memory, Offloaded, Transfer, place_rule
from megacore.optim.rule import Rule, Share
from megacore.optim.rules import make_rule
from megacore.sharding.mapped import MappedMemory
from tests.optim.pretend import (
    CPU,
    SPECS,
    TAKEN,
    bits,
    grads_of,
    make_share,
    random_cuts,
    rate,
    rule_of,
    run_steps,
    whole,
)

BUCKETS = (("embedding", "fused"), ("narrow", "nothing"), ("bias", "one", "norm"))
NAMES = optimizer_names()


def offloaded(name: str, share: Share, memory: Memory, transfer: Transfer | None = None) -> Offloaded:
    def make(part: Share, settings: Mapping[str, float]) -> Rule:
        return make_rule(name, part, settings)

    return Offloaded(share, rule_of(name, share).settings, make, BUCKETS, memory, transfer)


def assert_same(got: Rule, want: Rule) -> None:
    """Every bit. State of matrices comes bucket by bucket, which is another order than that of the whole share."""

    def parts(rule: Rule) -> list[tuple[str, bytes]]:
        return [(key.rpartition(" ")[0] or key, tensor.numpy().tobytes()) for key, tensor in bits(rule).items()]

    in_order = len(got.share.runs) * (1 + len(got.state())) + 1 == len(bits(got))
    assert (parts(got) if in_order else sorted(parts(got))) == (parts(want) if in_order else sorted(parts(want)))
    for ours, theirs in zip(got.share.weights, want.share.weights, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("where", ["host", "files"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", NAMES)
def test_every_rule_does_the_same_bucket_by_bucket(name: str, dtype: torch.dtype, where: str, tmp_path: Path) -> None:
    """To the bit where a rule treats elements or matrices alone; whole-model sums may be added in another order."""
    memory = HostMemory() if where == "host" else MappedMemory(tmp_path, len(BUCKETS))
    got, want = offloaded(name, make_share(whole(), dtype), memory), rule_of(name, make_share(whole(), dtype))
    run_steps(got, range(1, 8))
    run_steps(want, range(1, 8))
    assert_same(got, want)


@pytest.mark.parametrize("state", [StateFormat("bf16"), StateFormat("bf16", True, 3), StateFormat("int8")], ids=str)
def test_every_format_does(state: StateFormat, tmp_path: Path) -> None:
    share = replace(make_share(whole(), torch.float32), format=state)
    want = rule_of("adamw", replace(share, weights=tuple(weight.clone() for weight in share.weights)))
    got = offloaded("adamw", share, MappedMemory(tmp_path, len(BUCKETS)))
    run_steps(got, range(1, 8))
    run_steps(want, range(1, 8))
    assert_same(got, want)


def test_shards_may_hold_little_or_nothing_of_a_bucket(tmp_path: Path) -> None:
    for number, cut in enumerate([*random_cuts(3, seed=5, multiple=64), [(0, 0)] * len(SPECS)]):
        got = offloaded("adamw", make_share(cut), MappedMemory(tmp_path / str(number), len(BUCKETS)))
        want = rule_of("adamw", make_share(cut))
        run_steps(got, range(1, 4))
        run_steps(want, range(1, 4))
        assert_same(got, want)


def test_a_step_that_is_not_taken_changes_no_bit(tmp_path: Path) -> None:
    rule = offloaded("adamw", make_share(whole()), MappedMemory(tmp_path, len(BUCKETS)))
    run_steps(rule, range(1, 3))
    before = bits(rule)
    rule.update([torch.zeros_like(weight) for weight in rule.share.weights], rate(3), torch.zeros(()))
    assert all(torch.equal(now, before[key]) for key, now in bits(rule).items())


def test_buckets_are_asked_for_ahead_and_given_back_behind() -> None:
    told: list[tuple[str, int]] = []

    class Telling(HostMemory):
        def fetch(self, bucket: int) -> None:
            told.append(("fetch", bucket))

        def release(self, bucket: int) -> None:
            told.append(("release", bucket))

    run_steps(offloaded("lion", make_share(whole()), Telling()), (1,))
    assert told == [
        ("fetch", 0), ("fetch", 1), ("release", 0), ("fetch", 2), ("release", 1), ("fetch", 3), ("release", 2)
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["adamw", "lion"])
@pytest.mark.parametrize("target", [torch.float32, torch.bfloat16])
def test_another_device_gets_the_new_weights_in_its_format(target: torch.dtype, name: str) -> None:
    """With the CPU in the other device's place: the copies are the same, but nothing overlaps."""
    share = make_share(whole(), torch.float32)
    targets = [weight.to(target, copy=True) for weight in share.weights]
    grads = grads_of(share, 1)
    transfer = Transfer(share.weights, targets, grads, CPU)
    got = offloaded(name, share, HostMemory(), transfer)
    want = rule_of(name, make_share(whole(), torch.float32))
    back = target.itemsize if target != torch.float32 else 0
    assert transfer.nbytes == sum(weight.nbytes + back * weight.numel() for weight in share.weights)
    for step in range(1, 5):
        run_steps(want, (step,))
        grads = grads_of(share, step)
        got.update(grads, rate(step), TAKEN)
        assert got.writes_copies
        for grad in grads:
            grad.fill_(torch.nan)  # theirs to overwrite, once the update is done
        for run, weight in enumerate(want.share.weights):
            assert torch.equal(targets[run], weight.to(target))
    assert_same(got, want)


def test_a_step_that_is_not_taken_sends_nothing() -> None:
    """Not even what a kernel would leave in the room for rounded weights before it ever ran."""
    share = make_share(whole(), torch.float32)
    targets = [torch.full_like(weight, 7, dtype=torch.bfloat16) for weight in share.weights]
    transfer = Transfer(share.weights, targets, share.weights, CPU)
    rule = offloaded("adamw", share, HostMemory(), transfer)
    before = bits(rule)
    for staged in transfer.staged:
        staged.fill_(torch.nan)
    rule.update(grads_of(share, 1), rate(1), torch.zeros(()))
    assert all((target == 7).all() for target in targets)
    assert all(torch.equal(now, before[key]) for key, now in bits(rule).items())


def test_gradients_keep_their_format_on_the_way() -> None:
    """Those of bf16 weights that are updated themselves are float32."""
    share = make_share(whole(), torch.bfloat16)
    targets = [weight.clone() for weight in share.weights]
    grads = [grad.float() * (1 + 2**-12) for grad in grads_of(share, 1)]
    transfer = Transfer(share.weights, targets, grads, CPU)
    assert not transfer.staged, "weights leave from where they are"
    here, _ = transfer.start(grads, [range(len(grads))], TAKEN)
    assert all(torch.equal(there, grad) for there, grad in zip(here, grads, strict=True))


def test_the_kernels_of_all_buckets_are_said_once() -> None:
    rule = offloaded("adamw", make_share(whole(), torch.float32), HostMemory())
    assert rule.kernels == rule_of("adamw", make_share(whole(), torch.float32)).kernels


def test_state_can_be_put_back(tmp_path: Path) -> None:
    """As a checkpoint does: into the tensors that ``state`` gives, through which the files are written."""
    old = offloaded("adamw", make_share(whole()), MappedMemory(tmp_path / "old", len(BUCKETS)))
    run_steps(old, range(1, 4))
    new = offloaded("adamw", make_share(whole()), MappedMemory(tmp_path / "new", len(BUCKETS)))
    for name, tensors in old.state().items():
        for mine, theirs in zip(new.state()[name], tensors, strict=True):
            mine.copy_(theirs)
    for mine, theirs in zip(new.share.weights, old.share.weights):
        mine.copy_(theirs)
    new.set_clock(old.clock)
    run_steps(old, range(4, 6))
    run_steps(new, range(4, 6))
    assert_same(new, old)


def test_a_run_says_where_state_lives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    share = make_share(whole(), torch.float32)
    transfer = Transfer(share.weights, [weight.clone() for weight in share.weights], share.weights, CPU)

    def placed(offload: str, to: Transfer | None = None, folder: str = "") -> Rule:
        optim = OptimConfig(name="lion", offload=offload, offload_folder=folder)
        return place_rule(optim, share, defaults("lion"), BUCKETS, tmp_path / "run", to)

    assert not isinstance(placed("none"), Offloaded)
    in_files, on_host = placed("nvme"), placed("cpu", transfer)
    assert isinstance(in_files, Offloaded) and isinstance(in_files.memory, MappedMemory)
    assert in_files.memory.folder == tmp_path / "run"
    assert isinstance(on_host, Offloaded) and isinstance(on_host.memory, HostMemory) and on_host.transfer is transfer
    elsewhere = placed("nvme", folder=str(tmp_path / "other"))
    assert isinstance(elsewhere, Offloaded) and (tmp_path / "other").is_dir()
    monkeypatch.delattr(os, "posix_fadvise")
    with pytest.raises(ValueError, match="optim.offload=nvme: this system has no posix_fadvise; use none or cpu$"):
        placed("nvme")


def test_a_folder_that_cannot_hold_the_state_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"optim.offload_folder=.*file cannot hold 40 more bytes.*make it writable"):
        MappedMemory(tmp_path / "file", 1).zeros(0, 10, torch.float32)

    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(ValueError, match=r"No space left on device; free space there or name another folder"):
        MappedMemory(tmp_path / "new", 1).zeros(0, 10, torch.float32)


def test_files_have_no_names(tmp_path: Path) -> None:
    memory = MappedMemory(tmp_path / "new" / "folder", 1)
    data = memory.zeros(0, 1000, torch.bfloat16)
    assert (data == 0).all() and data.dtype == torch.bfloat16
    data.fill_(3)
    memory.release(0)
    memory.fetch(0)
    assert (data == 3).all()
    assert not list((tmp_path / "new" / "folder").iterdir())


# 128 MiB of AdamW's moments in 16 buckets. All weights share memory, and so do gradients: only state counts.
MEASURED = """
import re, sys, torch
from pathlib import Path
from megacore.config.optimizers import defaults
from megacore.layout.shards import Run
from megacore.mesh.group import Group
from megacore.optim.offload import HostMemory, Offloaded
from megacore.optim.rule import Share
from megacore.optim.rules import make_rule
from megacore.sharding.mapped import MappedMemory
from megacore.spec import ParamSpec

def peak():
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

size, num = 1 << 20, 16
names = [f"weight {i}" for i in range(num)]
weight, grad = torch.ones(size), torch.ones(size)
share = Share(
    tuple(Run(name, 0, size, i * size) for i, name in enumerate(names)),
    tuple(ParamSpec(name, (size,)) for name in names),
    (weight,) * num, (0.1,) * num, (1.0,) * num, Group.single("tp"), Group.single("dp"), torch.float32, weight.device)
folder = sys.argv[1]
before = peak()
memory = MappedMemory(Path(folder), num) if folder else HostMemory()
buckets = [[name] for name in names]
rule = Offloaded(share, defaults("adamw"), lambda *given: make_rule("adamw", *given), buckets, memory)
for step in range(2):
    rule.update([grad] * num, 1e-3, torch.ones(()))
print(peak() - before, float(weight.double().sum()))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_memory_does_not_grow_with_the_state(tmp_path: Path) -> None:
    def measure(folder: str) -> tuple[int, float]:
        done = subprocess.run([sys.executable, "-c", MEASURED, folder], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        grown, weights = done.stdout.split()
        return int(grown), float(weights)

    state = 2 * 4 * 16 * (1 << 20)
    in_memory, expected = measure("")
    in_files, got = measure(str(tmp_path))
    assert got == expected
    assert in_memory > 0.9 * state
    assert in_files < state / 3
