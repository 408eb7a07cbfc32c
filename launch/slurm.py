"""A job for Slurm: a batch script with one task per node, submitted with sbatch. Imports no torch."""

import re
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from types import MappingProxyType

from megacore.launch.job import WAIT, Job, explained, lines, node_command, preflight_command, quoted
from megacore.monitor.run_folder import STOP

OPTIONS = ("partition", "account", "qos", "reservation", "constraint", "time", "mem", "nodelist", "exclude")
"""Those of sbatch that are passed on where they are given."""
_DURATION = re.compile(
    r"(?P<m>\d+)|(?P<m1>\d+):(?P<s1>\d+)|(?P<h2>\d+):(?P<m2>\d+):(?P<s2>\d+)"
    r"|(?P<d>\d+)-(?P<h>\d+)(?::(?P<m3>\d+)(?::(?P<s3>\d+))?)?"
)
_SECONDS = MappingProxyType({"d": 86400, "h": 3600, "m": 60, "s": 1})


def problems(options: Mapping[str, str], more: Sequence[str], grace_s: int) -> list[str]:
    """What is wrong with sbatch's options, which stand in lines that sbatch cuts at blanks."""
    given = [f"--{name}={options[name]}" for name in OPTIONS if options.get(name)]
    found = [
        f"{each!r} has blanks, quotes, # or \\, which a line of #SBATCH does not keep; write it without"
        for each in (*given, *more)
        if re.search(r"[\s'\"#\\]", each)
    ]
    found += [f"--sbatch={each} must be an option of sbatch, such as --sbatch=--mail-type=END" for each in more
              if not each.startswith("-")]  # fmt: skip
    if limit := options.get("time", ""):
        seconds = duration(limit)
        if seconds is None:
            found.append(f"--time={limit} must be minutes, H:M:S or D-H:M:S, such as 1-00:00:00")
        elif seconds <= grace_s:
            found.append(
                f"--time={limit} is not longer than --grace={grace_s}: the run would be asked to stop as it starts; "
                "give more time or less grace"
            )
    return found


def duration(text: str) -> float | None:
    """Seconds of a time limit as Slurm writes it, without end for UNLIMITED; None if it is none."""
    if text.upper() in ("UNLIMITED", "INFINITE"):
        return float("inf")
    match = _DURATION.fullmatch(text)
    if not match:
        return None
    return sum(int(value) * _SECONDS[name[0]] for name, value in match.groupdict().items() if value)


def batch_script(job: Job, options: Mapping[str, str], cpus: int = 0, more: Sequence[str] = ()) -> str:
    """The script. ``options`` are sbatch's, of ``OPTIONS``, ``more`` others as they are; ``cpus`` per node, 0: all."""
    meet = '"$meet:$port"'
    # A step takes no --cpus-per-task from its job since Slurm 22.05, and many sites bind a task to few cores.
    step = ["srun", *container(job), "--ntasks-per-node=1", *([f"--cpus-per-task={cpus}"] if cpus else [])]
    step += ["--cpu-bind=none", "--wait=0"]
    parts = [
        "#!/bin/bash",
        *headers(job, options, cpus, more),
        "",
        "# Written by `megacore launch slurm`. Submit it again whenever it has ended: the run goes on where it was.",
        "set -u",
        f"cd {quoted(job.workdir)} || exit 1",
        f"run={quoted(job.out)}",
        'mkdir -p "$run"',
        "",
        "# The nodes meet at the first of them; two jobs that share a node nearly always have different ports.",
        'meet=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
        "port=$((20000 + SLURM_JOB_ID % 10000))",
        "",
        *explained(job.environment),
        "",
        f"# {job.grace_s} s before the time limit Slurm sends USR1 to this script alone: the run is asked to save and",
        "# stop, again and again, since a run that is just starting takes the file for an old one.",
        "step='' stopping=0 woken=0",
        "# shellcheck disable=SC2329  # the trap calls it",
        "stop() {",
        "    stopping=1 woken=1",
        f'    while kill -0 "${{step:-none}}" 2>/dev/null; do touch "$run/{STOP}"; sleep 10; done &',
        "}",
        "trap stop USR1",
    ]
    if job.preflight:
        checks = [*step, "--kill-on-bad-exit=1", *preflight_command(job, meet)]
        parts += ["", "# Look at every node, measure every pair of ranks; the report names what is not in order."]
        parts += [f"{lines(checks)} || exit 1"]
        parts += ['[ "$stopping" -eq 0 ] || { scontrol requeue "$SLURM_JOB_ID"; exit 75; }']
    parts += [
        "",
        f"{lines([*step, '--kill-on-bad-exit=0', *node_command(job, meet)])} &",
        "step=$!",
        WAIT.rstrip(),
        "",
        "# 75: saved and stopped on request. If the time limit or a job that goes first was the reason, this one goes",
        f"# back into the queue; if it was a person (touch {STOP}, scancel), it is over.",
        'preempted() { scontrol show job "$SLURM_JOB_ID" | grep -q "PreemptTime=[0-9]"; }',
        'if [ "$code" -eq 75 ] && { [ "$stopping" -eq 1 ] || preempted; }; then',
        '    scontrol requeue "$SLURM_JOB_ID"',
        "fi",
        'exit "$code"',
    ]
    return "\n".join(parts) + "\n"


def headers(job: Job, options: Mapping[str, str], cpus: int, more: Sequence[str]) -> list[str]:
    """The lines that sbatch reads. A whole node is its processors and, which --exclusive does not give, its memory."""
    found = [f"--job-name={job.name}", f"--nodes={job.range.replace(':', '-')}", "--ntasks-per-node=1"]
    found += [f"--gpus-per-node={job.gpus}"] if job.has_gpus else []
    found += [f"--cpus-per-task={cpus}"] if cpus else ["--exclusive"]
    found += ["--mem=0"] if not cpus and not options.get("mem") else []
    found += [f"--{name}={options[name]}" for name in OPTIONS if options.get(name)]
    found += more
    found += ["--output=%x-%j.out", "--open-mode=append", "--requeue", f"--signal=B:USR1@{job.grace_s}"]
    return [f"#SBATCH {each}" for each in found]


def container(job: Job) -> list[str]:
    """Options of pyxis (enroot) for srun."""
    if not job.image:
        return []
    return [
        f"--container-image={quoted(job.image)}",
        f"--container-mounts={quoted(','.join(mounts(job)))}",
        f"--container-workdir={quoted(job.workdir)}",
    ]


def mounts(job: Job) -> list[str]:
    """Those asked for, and the folders where the job runs and where it writes, if those are not within."""
    found = list(job.mounts)
    for folder in (PurePosixPath(job.workdir), PurePosixPath(job.workdir, job.out)):
        inside = [PurePosixPath(each.split(":")[1]) for each in found]
        if not any(folder.is_relative_to(each) for each in inside):
            found.append(f"{folder}:{folder}")
    return found
