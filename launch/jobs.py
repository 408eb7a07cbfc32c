"""`megacore launch`: from a run file and a number of nodes to a job: on this machine, for Slurm, Kubernetes, SkyPilot.

The run is checked for its number of ranks first; then the job's file is written into the run's folder and submitted, or
only printed with --dry-run. On every node it runs the same command, `python -m megacore.launch.node`.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import MappingProxyType

from megacore.config.load import load
from megacore.config.resolve import resolve
from megacore.config.schema import RunConfig
from megacore.config.secrets import in_overrides, without_secrets
from megacore.config.validate import check
from megacore.launch import kubernetes, sky, slurm
from megacore.launch.environment import Capability, Setting, problem_with, settings_for
from megacore.launch.job import OF_JOBS, Job, explained, lines, meeting, node_command, torchrun_command
from megacore.launch.node import node_range
from megacore.launch.places import free_port
from megacore.launch.train import NO_DATA, complete, with_model

KINDS = ("local", "slurm", "k8s", "sky")
SUBMIT = MappingProxyType({"slurm": ("sbatch",), "k8s": ("kubectl", "create", "-f"), "sky": ("sky", "jobs", "launch")})
CAPABILITIES: MappingProxyType[str, Capability] = MappingProxyType(
    {
        **dict.fromkeys(("a100", "a100-40gb", "a100-80gb", "a100-pcie", "a800"), (8, 0)),
        **dict.fromkeys(("h100", "h100-96gb", "h100-pcie", "h100-nvl", "h200"), (9, 0)),
        **dict.fromkeys(("b200", "gb200"), (10, 0)),
        **dict.fromkeys(("b300", "gb300"), (10, 3)),
    }
)
"""Of the GPUs that `megacore plan` knows."""
ACCELERATORS = MappingProxyType({"a100-80gb": "A100-80GB"})
"""SkyPilot's names, where they are not the first part of ours."""
SEES_DATA = ("local", "slurm")
"""Where the job is started from a machine that sees the job's files."""
LOOPBACK = "127.0.0.1"


def main(argv: list[str] | None = None) -> int:
    """Write, print or start the job."""
    args = parser().parse_intermixed_args(argv)
    if args.run and "=" in args.run:  # only overrides were given
        args.overrides.insert(0, args.run)
        args.run = None
    fewest, most = node_range(args.nodes)
    check_options(args, fewest, most)
    if secrets := list(in_overrides(args.overrides)):
        raise ValueError("\n".join(secrets))
    config = load(args.run, args.overrides, args.preset)
    check_place(args, config, most)
    for nodes in sorted({fewest, most}):
        checked(config, nodes * args.gpus, args.kind, not args.dry_run)
    job = job_of(args, config, fewest, most)
    if not config.data.blend:
        sys.stderr.write("megacore: data.blend is not given yet; only a dry run can do without\n")
    if args.run and args.kind not in SEES_DATA and not job.run_text:
        sys.stderr.write(
            f"megacore: {args.run} says whom to alert, so it stays here; nodes must see it under that name\n"
        )
    if args.kind == "local":
        return local(job, args.dry_run)
    text = rendered(job, args)
    if args.dry_run:
        print(text, end="")
        return 0
    path = Path(args.output or (Path(config.out) / "job.sbatch" if args.kind == "slurm" else f"{job.name}.yaml"))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    except OSError as error:
        raise ValueError(f"{path} cannot be written: {error.strerror}; --output=FILE puts it elsewhere") from None
    print(f"written: {path}", flush=True)
    return submit([*SUBMIT[args.kind], str(path)])


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="megacore launch", description=(__doc__ or "").partition(": ")[2])
    parser.add_argument("kind", choices=KINDS, help="where: this machine, or what the cluster understands")
    parser.add_argument("run", nargs="?", metavar="RUN.toml", help="the run file, as nodes see it")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="keys that win over the file's")
    parser.add_argument("--preset", metavar="NAME", help="start from a known model")
    parser.add_argument("--nodes", default="1", metavar="N", help="nodes; A:B: go on with A where B are not to be had")
    parser.add_argument("--gpus", type=int, default=8, metavar="N", help="GPUs (ranks) per node; default 8")
    parser.add_argument("--gpu", default="h100", metavar="NAME", help=f"which: {', '.join(CAPABILITIES)}; or cpu")
    parser.add_argument("--dry-run", action="store_true", help="print the job, write and start nothing")
    parser.add_argument(
        "--output", metavar="FILE", help="where to write it; default: Slurm: out/job.sbatch, else NAME.yaml here"
    )
    parser.add_argument("--name", metavar="NAME", help="of the job; default: of the run's folder")
    parser.add_argument("--grace", type=int, default=600, metavar="S", help="to save in before the end; default 600")
    parser.add_argument("--wait", type=int, default=1800, metavar="S", help="for nodes that are missing; default 1800")
    parser.add_argument(
        "--max-restarts", type=int, default=3, metavar="N", help="without a newer checkpoint; default 3"
    )
    parser.add_argument("--preflight", action="store_true", help="`megacore doctor` over all nodes first")
    parser.add_argument("--python", metavar="COMMAND", help="the nodes' Python; default: this one, in images python")
    parser.add_argument("--workdir", metavar="FOLDER", help="where it runs; default: here, k8s: the first claim")
    parser.add_argument("--image", default="", metavar="IMAGE", help="container image (Slurm: with pyxis)")
    parser.add_argument("--env", action="append", default=[], metavar="NAME=VALUE", help="a variable more, or another")
    of_slurm = parser.add_argument_group("slurm")
    for name in slurm.OPTIONS:
        of_slurm.add_argument(f"--{name}", default="", metavar="X", help="passed on to sbatch")
    of_slurm.add_argument("--cpus", type=int, default=0, metavar="N", help="per node; default: the whole node")
    of_slurm.add_argument(
        "--sbatch", action="append", default=[], metavar="=OPTION", help="any other, such as --sbatch=--mail-type=END"
    )
    of_slurm.add_argument(
        "--mount", action="append", default=[], metavar="SRC:DST", help="into the container; sky: s3://BUCKET:/PATH"
    )
    of_k8s = parser.add_argument_group("k8s")
    of_k8s.add_argument("--manifest", choices=("jobset", "trainjob"), default="jobset", help="default jobset")
    of_k8s.add_argument("--namespace", default="", metavar="NAME", help="default: kubectl's")
    of_k8s.add_argument("--claim", action="append", default=[], metavar="CLAIM:PATH", help="a volume all pods see")
    of_k8s.add_argument(
        "--resource", action="append", default=[], metavar="NAME=N", help="per node, such as rdma/hca_shared=8"
    )
    of_k8s.add_argument("--runtime", default="torch-distributed", metavar="NAME", help="of a trainjob")
    of_sky = parser.add_argument_group("sky")
    of_sky.add_argument("--infra", default="", metavar="X", help="cloud, region or cluster, such as aws/us-east-1")
    of_sky.add_argument("--setup", default=sky.SETUP, metavar="COMMAND", help=f"default: {sky.SETUP}")
    of_sky.add_argument("--spot", action="store_true", help="on machines that may be taken away")
    return parser


def check_options(args: argparse.Namespace, fewest: int, most: int) -> None:
    """What is wrong with the job itself. Raises ValueError with all of it."""
    wrong = [
        f"--{name}={value} must be at least {least}"
        for name, value, least in (
            ("gpus", args.gpus, 1),
            ("grace", args.grace, 30),
            ("wait", args.wait, 1),
            ("max-restarts", args.max_restarts, 0),
            ("cpus", args.cpus, 0),
        )
        if value < least
    ]
    if (
        not args.run
        and not args.preset
        and not any(word.startswith("checkpoint.init_from=") for word in args.overrides)
    ):
        wrong.append("a job needs a run file, or --preset NAME (`megacore presets` lists them)")
    if args.gpu not in (*CAPABILITIES, "cpu"):
        wrong.append(f"--gpu={args.gpu} is not known; it is one of {', '.join(CAPABILITIES)}, cpu")
    if fewest != most and args.kind in ("k8s", "sky"):
        wrong.append(f"--nodes={args.nodes}: {args.kind} gives all nodes or none; give one number")
    if args.kind == "k8s" and not args.image:
        wrong.append("megacore launch k8s needs --image=IMAGE, which has Python and megacore")
    wrong += [f"--env={each} must be NAME=VALUE" for each in args.env if not re.match(r"[A-Za-z_]\w*=", each)]
    for name in ("claim", "mount"):
        wrong += [
            f"--{name}={each} must be A:/PATH" for each in getattr(args, name) if not re.match(r".+:/[^:/]", each)
        ]
    wrong += [f"--resource={each} must be NAME=N" for each in args.resource if not re.fullmatch(r"[\w./-]+=\d+", each)]
    if args.name and not re.fullmatch(r"[\w.-]+", args.name):
        wrong.append(f"--name={args.name} must be letters, digits, dots, hyphens and underscores: files bear it, too")
    if args.kind == "slurm":
        wrong += slurm.problems(vars(args), args.sbatch, args.grace)
    if wrong:
        raise ValueError("\n".join(wrong))


def check_place(args: argparse.Namespace, config: RunConfig, nodes: int) -> None:
    """Whether what a run saves outlives its nodes. Raises ValueError; whoever gives a whole path knows what he does."""
    relative = not config.out.startswith("/") and "://" not in (config.checkpoint.folder or "")
    fix = {"k8s": "give --claim=CLAIM:/PATH, a volume that all pods see", "sky": ""}.get(args.kind)
    if fix is None or not relative or not config.checkpoint.save_every:
        return
    if args.kind == "sky" and (nodes > 1 or args.spot):
        fix = "give --mount=s3://BUCKET:/PATH and out=/PATH/NAME, or checkpoint.folder=s3://BUCKET/NAME"
    elif args.claim or args.workdir:
        return
    if fix:
        raise ValueError(f"out={config.out} lies on the disks of single machines and would be lost with them; {fix}")


def checked(config: RunConfig, world_size: int, kind: str, needs_data: bool = True) -> RunConfig:
    """The run, resolved for so many ranks. Raises ValueError with everything that is wrong. Data are looked at where
    this machine sees what nodes will see."""
    if kind in SEES_DATA:
        return complete(config, world_size, needs_data)
    config = with_model(config)
    check(config, world_size, (NO_DATA,) if needs_data and not config.data.blend else ())
    return resolve(config, world_size)


def job_of(args: argparse.Namespace, config: RunConfig, fewest: int, most: int) -> Job:
    """The job that the options describe."""
    resolved = resolve(with_model(config), most * args.gpus)
    wanted = {each.name: each for each in (*OF_JOBS, *settings_for(resolved, CAPABILITIES.get(args.gpu)))}
    for name, _, value in (each.partition("=") for each in args.env):
        wanted[name] = Setting(name, value, "as --env says")
    if args.gpu != "cpu" and (problem := problem_with(resolved, {each.name: each.value for each in wanted.values()})):
        raise ValueError(problem)
    name = args.name or re.sub(r"[^a-z0-9-]+", "-", Path(config.out).name.lower()).strip("-") or "megacore"
    brought = bool(args.run) and args.kind not in SEES_DATA and without_secrets(config) is config
    run = kubernetes.run_path(name) if brought else args.run
    words = [*([run] if run else []), *(["--preset", args.preset] if args.preset else []), *args.overrides]
    python = "python" if args.image else ".venv/bin/python" if args.kind == "sky" else sys.executable
    return Job(
        name=name,
        words=tuple(words),
        out=config.out,
        nodes=most,
        fewest=fewest,
        gpus=args.gpus,
        has_gpus=args.gpu != "cpu",
        environment=tuple(wanted.values()),
        python=args.python or python,
        workdir=args.workdir or default_workdir(args),
        image=args.image,
        mounts=tuple(args.mount),
        grace_s=args.grace,
        wait_s=args.wait,
        max_restarts=args.max_restarts,
        preflight=args.preflight,
        run_text=Path(args.run).read_text(encoding="utf-8") if brought else "",
    )


def default_workdir(args: argparse.Namespace) -> str:
    """Where the job runs if nobody says."""
    if args.kind == "k8s":  # "": wherever the image says
        return args.claim[0].partition(":")[2] if args.claim else ""
    return "." if args.kind == "sky" else os.getcwd()


def rendered(job: Job, args: argparse.Namespace) -> str:
    """The job's file."""
    if args.kind == "slurm":
        return slurm.batch_script(job, vars(args), args.cpus, args.sbatch)
    if args.kind == "sky":
        accelerator = ACCELERATORS.get(args.gpu, args.gpu.partition("-")[0].upper())
        return sky.task(job, accelerator, args.infra, args.setup, args.spot)
    more = {name: int(number) for name, _, number in (each.partition("=") for each in args.resource)}
    if args.manifest == "trainjob":
        return kubernetes.trainjob(job, args.namespace, args.claim, more, args.runtime)
    return kubernetes.jobset(job, args.namespace, args.claim, more)


def submit(command: Sequence[str]) -> int:
    """Hand the job to its scheduler; the exit code."""
    if not shutil.which(command[0]):
        raise ValueError(f"{command[0]} is not on this machine; where it is, say: {' '.join(command)}")
    return 1 if subprocess.run(command, check=False).returncode else 0


def local(job: Job, dry_run: bool) -> int:
    """The job on this machine: one node's command, or, to try a job out, that of several nodes side by side."""
    if dry_run:
        print("\n".join(explained(job.environment)))
        where = "on this node" if job.nodes == 1 else "on every node; MEET is one of them"
        print(f"# {where}\n" + lines(node_command(job, meeting("MEET"))))
        print("\n# the same with plain torchrun\n" + lines(torchrun_command(job, meeting("MEET"))))
        return 0
    for each in job.environment:
        os.environ.setdefault(each.name, each.value)
    from megacore.launch.local import run_nodes

    return run_nodes(job, f"{LOOPBACK}:{free_port()}", LOOPBACK)


if __name__ == "__main__":
    from megacore.exits import run

    sys.exit(run("megacore.launch.jobs", sys.argv[1:]))
