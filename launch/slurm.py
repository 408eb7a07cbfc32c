"""A job for Slurm: a batch script with one task per node, submitted with sbatch. Imports no torch."""

from collections.abc import Mapping

from megacore.launch.job import WAIT, Job, explained, lines, node_command, preflight_command, quoted
from megacore.monitor.run_folder import STOP

OPTIONS = ("partition", "account", "qos", "reservation", "constraint", "time")
"""Those of sbatch that are passed on where they are given."""


def batch_script(job: Job, options: Mapping[str, str], cpus: int = 0) -> str:
    """The script. ``options`` are sbatch's, of ``OPTIONS``; ``cpus`` per node, 0: all."""
    meet = '"$meet:$port"'
    step = ["srun", *container(job), "--ntasks-per-node=1", "--kill-on-bad-exit=0"]
    parts = [
        "#!/bin/bash",
        *headers(job, options, cpus),
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
        checks = [*step[:-1], "--kill-on-bad-exit=1", *preflight_command(job, meet)]
        parts += ["", "# Look at every node, measure every pair of ranks; the report names what is not in order."]
        parts += [f"{lines(checks)} || exit 1"]
        parts += ['[ "$stopping" -eq 0 ] || { scontrol requeue "$SLURM_JOB_ID"; exit 75; }']
    parts += [
        "",
        f"{lines([*step, *node_command(job, meet)])} &",
        "step=$!",
        WAIT.rstrip(),
        "",
        "# 75: saved and stopped on request. If the time limit was the reason, the job goes back into the queue; if it",
        f"# was a person (touch {STOP}, scancel), it is over.",
        'if [ "$code" -eq 75 ] && [ "$stopping" -eq 1 ]; then',
        '    scontrol requeue "$SLURM_JOB_ID"',
        "fi",
        'exit "$code"',
    ]
    return "\n".join(parts) + "\n"


def headers(job: Job, options: Mapping[str, str], cpus: int) -> list[str]:
    """The lines that sbatch reads."""
    found = [f"--job-name={job.name}", f"--nodes={job.range.replace(':', '-')}", "--ntasks-per-node=1"]
    found += [f"--gpus-per-node={job.gpus}", f"--cpus-per-task={cpus}" if cpus else "--exclusive"]
    found += [f"--{name}={options[name]}" for name in OPTIONS if options.get(name)]
    found += ["--output=%x-%j.out", "--open-mode=append", "--requeue", f"--signal=B:USR1@{job.grace_s}"]
    return [f"#SBATCH {each}" for each in found]


def container(job: Job) -> list[str]:
    """Options of pyxis (enroot) for srun."""
    if not job.image:
        return []
    mounts = ",".join(job.mounts or (f"{job.workdir}:{job.workdir}",))
    return [
        f"--container-image={quoted(job.image)}",
        f"--container-mounts={quoted(mounts)}",
        f"--container-workdir={quoted(job.workdir)}",
    ]
