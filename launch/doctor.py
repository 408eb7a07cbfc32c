"""`megacore doctor`: what this machine has, what is missing, why, and the line that fixes it.

Under torchrun or srun it is a pre-flight of the whole job: every node is looked at, every pair of ranks measured, and
what stands out is told with its host.
"""

import argparse
import json
import os
import socket
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType

from megacore.doctor.finding import FAIL, OK, WARN, Finding, examined, worst
from megacore.launch.endings import Endings
from megacore.launch.failures import Failure
from megacore.launch.terminal import colour_wanted
from megacore.mesh.rank_info import RankInfo

MARKS = MappingProxyType({OK: ("ok", "32"), WARN: ("warn", "33"), FAIL: ("FAIL", "31")})
MOST_RANKS = 128
MEASURE = "megacore.launch.doctor:measure_to"


def main(argv: list[str] | None = None) -> int:
    """Print the report; the exit code is 1 where something fails."""
    args = parser().parse_args(argv)
    if args.nproc < 1:
        raise ValueError(f"--nproc={args.nproc} must be at least 1")
    if args.nproc > MOST_RANKS:
        raise ValueError(f"--nproc={args.nproc} must be at most {MOST_RANKS}: they all measure on this machine at once")
    info = RankInfo.from_environment(os.environ)
    found = list(alone(args)) if info is None else preflight(args, info)
    if found is None:
        return 0
    if args.json:
        print(
            json.dumps({"host": socket.gethostname(), "status": worst(found), "checks": [f.as_json() for f in found]})
        )
    else:
        print("\n".join(lines(found, colour_wanted(sys.stdout))))
    if worst(found) != FAIL:
        return 0
    if info is not None and (endings := Endings.of(os.environ)):
        endings.failed(Failure(info.rank, "pre-flight", verdict(found), when=time.monotonic()))
    return 1


def verdict(found: Sequence[Finding]) -> str:
    """What a node's command says of a pre-flight that failed: the report above has the rest."""
    faults = [f"{each.name}: {each.detail}" for each in found if each.status == FAIL]
    fix = "Mend it, or leave the node out (Slurm: --exclude=NODE)."
    return "\n".join([*faults, "The run has not been started.", fix])


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="megacore doctor", description="What this machine has and lacks; under torchrun or srun, all of a job's."
    )
    parser.add_argument("--quick", action="store_true", help="look only: no measuring, no training")
    parser.add_argument("--nproc", type=int, default=2, metavar="N", help="local ranks to measure with; default 2")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="what ranks compute on")
    parser.add_argument("--out", default=".", metavar="FOLDER", help="where runs would be: its disk is measured")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def looking(out: Path, quick: bool) -> Iterator[Finding]:
    """What one process sees of its machine."""
    from megacore.doctor import gpus, machine, packages

    checks = (
        ("python", machine.python),
        ("torch", packages.torch_itself),
        ("packages", packages.needed),
        ("cuda", gpus.cuda),
        ("gpus", gpus.health),
        ("infiniband", gpus.infiniband),
        ("kernels", packages.kernels),
        ("compilers", machine.compilers),
        ("cores", machine.cores_and_memory),
        ("shared memory", machine.shared_memory),
        ("limits", machine.limits),
        ("clock", machine.clock),
        ("disk", partial(machine.disk, out, 0 if quick else machine.DISK_PROBE_BYTES)),
        ("extras", packages.extras),
    )
    for name, check in checks:
        yield from examined(name, check)


def alone(args: argparse.Namespace) -> Iterator[Finding]:
    """This machine, with ranks of our own."""
    yield from looking(Path(args.out), args.quick)
    if args.quick:
        return
    from megacore.doctor.training import trains

    with tempfile.TemporaryDirectory(prefix="megacore-doctor-") as folder:
        yield from examined("ranks", partial(local_ranks, args.nproc, args.device, Path(folder)))
        yield from examined("training", partial(trains, Path(folder), args.nproc, args.device))


def local_ranks(nproc: int, device: str, folder: Path) -> Iterator[Finding]:
    """Speeds of processes that are started here."""
    from megacore.doctor.ranks import Speeds, judge
    from megacore.launch.processes import run_local

    result = folder / "speeds.json"
    if run_local(MEASURE, (device, str(result)), nproc):
        fix = "the cause stands above, on stderr; is the loopback up (ip addr show lo)?"
        yield Finding("ranks", FAIL, "ranks on this machine cannot talk to each other", fix)
        return
    ranks = [Speeds(**each) for each in json.loads(result.read_text())]
    for each in ranks:  # JSON's keys are texts
        for of in (each.bandwidth, each.latency):
            items = list(of.items())
            of.clear()
            of.update({int(rank): value for rank, value in items})
    yield from judge(ranks)


def measure_to(info: RankInfo, device: str, path: str) -> None:
    """A rank's part of ``local_ranks``."""
    from dataclasses import asdict

    from megacore.doctor.ranks import measure
    from megacore.mesh import process_group

    where = process_group.device_of(info, device)
    process_group.start(info, where, timeout_s=120.0)
    try:
        ranks = measure(info, where)
    finally:
        process_group.stop()
    if info.rank == 0:
        Path(path).write_text(json.dumps([asdict(each) for each in ranks]))


def preflight(args: argparse.Namespace, info: RankInfo) -> list[Finding] | None:
    """The whole job, on rank 0; None elsewhere. Of each node only what is not in order is told."""
    from megacore.doctor.ranks import gathered, judge, measure
    from megacore.mesh import process_group

    own = list(looking(Path(args.out), args.quick)) if info.local_rank == 0 else []
    device = process_group.device_of(info, args.device)
    process_group.start(info, device, timeout_s=300.0)
    try:
        everyone = gathered((socket.gethostname(), own), info)
        speeds = None if args.quick else measure(info, device)
    finally:
        process_group.stop()
    if info.rank:
        return None
    found = [
        Finding(f"{host}: {each.name}", each.status, each.detail, each.fix)
        for host, findings in everyone
        for each in findings
        if each.status != OK
    ]
    hosts = sorted({host for host, findings in everyone if findings})
    found.insert(0, Finding("nodes", OK, f"{len(hosts)}: {', '.join(hosts)}; {info.world_size} ranks"))
    return [*found, *(judge(speeds) if speeds else ())]


def lines(found: Sequence[Finding], colour: bool) -> Iterator[str]:
    """A table, and below it what to do."""
    width = max(len(each.name) for each in found)
    for each in found:
        word, code = MARKS[each.status]
        mark = f"\x1b[{code}m{word:<4}\x1b[0m" if colour else f"{word:<4}"
        yield f"{mark}  {each.name:<{width}}  {each.detail}"
        if each.fix and each.status != OK:
            yield f"      {'':<{width}}  → {each.fix}"
    counts = {status: sum(each.status == status for each in found) for status in (OK, WARN, FAIL)}
    yield ""
    yield ", ".join(f"{number} {MARKS[status][0]}" for status, number in counts.items() if number)
    if missing := [each for each in found if each.status == OK and each.fix]:
        yield "could be added:"
        yield from (f"  {each.name:<{width}}  {each.fix}" for each in missing)


if __name__ == "__main__":
    from megacore.exits import run

    sys.exit(run("megacore.launch.doctor", sys.argv[1:]))
