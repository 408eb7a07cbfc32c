"""One node's part of a job: starts its ranks, meets the other nodes, starts again after faults, stops when asked.

    python -m megacore.launch.node --nodes 8 --nproc 8 --meet gpu001:29400 RUN.toml key=value ...

The same command runs on every node; job files of all schedulers come down to it. Under it is torch.distributed's
elastic agent, as under torchrun, with what a training run wants besides (``agent.py``): a stop is no fault, restarts
are counted by progress, one cause is shown, and a meeting point that was lost is looked for again.

Exit codes: 0 done; 2 wrong input; 1 a fault; 75 stopped on request, saved: the same command goes on.
"""

import argparse
import os
import re
import sys
import time

from megacore.launch import train
from megacore.launch.places import interface_of, is_here, meeting_point, own_address
from megacore.launch.restarts import MAX_RESTARTS
from megacore.processes import usable_cores

WAIT_S = 1800.0
LOOK_EVERY_S = 2.0


def main(argv: list[str] | None = None) -> int:
    """Run this node's ranks until the job is over; the exit code."""
    args, words = parser().parse_known_args(argv)
    fewest, most = node_range(args.nodes)
    for name, value, least in (("--nproc", args.nproc, 1), ("--max-restarts", args.max_restarts, 0)):
        if value < least:
            raise ValueError(f"{name}={value} must be at least {least}")
    asked = train.parser().parse_intermixed_args(words)
    if asked.nproc or asked.dry_run or asked.max_restarts is not None:
        raise ValueError("--dry-run and `megacore train`'s own --nproc are not for a node; give --nproc before the run")
    asked.nproc = fewest * args.nproc
    train.requested(asked, None)  # what is wrong is told once, before anything starts
    asked.nproc = most * args.nproc
    config, _ = train.requested(asked, None)
    place = placed(args, most)
    if place is None:
        return 1
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # names that cannot be looked up are warned of, per socket
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGQUIT"  # the others are ours
    # Each attempt has a store of its own, kept by rank 0; torch 2.13 else remembers where an earlier rank 0 was.
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, usable_cores() // args.nproc)))
    from megacore.launch.agent import run_node  # these bring torch
    from megacore.launch.rendezvous import Nodes, Place

    command, restarts = ("train", *words), args.max_restarts
    if args.preflight:
        command, restarts = ("doctor", "--out", config.out, "--device", config.train.device), 0
    return run_node(config, command, Nodes(fewest, most, args.nproc), Place(*place), restarts, args.wait)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="megacore.launch.node",
        description="One node's part of a job. What is not listed here goes to `megacore train`: RUN.toml, key=value.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--nodes", default="1", metavar="N", help="nodes of the job; A:B starts with A to B of them, as many as come"
    )
    parser.add_argument("--nproc", type=int, default=8, metavar="N", help="ranks on this node, one per GPU; default 8")
    parser.add_argument("--meet", default="", metavar="HOST[:PORT]", help="the node that keeps the list of nodes")
    parser.add_argument("--address", default="", metavar="IP", help="of this node; default: its way to --meet")
    parser.add_argument("--job", default="megacore", metavar="ID", help="tells jobs apart that share a meeting point")
    parser.add_argument("--preflight", action="store_true", help="`megacore doctor` on all ranks instead of the run")
    parser.add_argument("--max-restarts", type=int, default=MAX_RESTARTS, metavar="N", help="without progress")
    parser.add_argument(
        "--wait", type=float, default=WAIT_S, metavar="S", help=f"seconds to wait for other nodes; default {WAIT_S:g}"
    )
    return parser


def node_range(text: str) -> tuple[int, int]:
    """The fewest and the most nodes of ``N`` or ``A:B``. Raises ValueError."""
    match = re.fullmatch(r"(\d{1,9})(?::(\d{1,9}))?", text)
    fewest, most = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not 1 <= fewest <= most:
        raise ValueError(f"--nodes={text} must be a number of nodes, such as 8, or a range, such as 6:8")
    return fewest, most


def placed(args: argparse.Namespace, nodes: int) -> tuple[str, str, int, str, bool] | None:
    """Job, host and port of the meeting point (0: any that is free), own address, and whether the meeting point is
    here. Tells NCCL and gloo which interface that is, unless the user has. None, and a word: the host stayed unknown
    for ``--wait`` seconds."""
    if not args.meet:
        if nodes > 1:
            raise ValueError(f"--nodes={nodes} needs --meet=HOST[:PORT], one of the nodes, the same on all of them")
        return args.job, "127.0.0.1", 0, args.address or "127.0.0.1", True
    host, port = meeting_point(args.meet)
    deadline = time.monotonic() + args.wait
    while True:
        try:
            here = is_here(host)
            address = args.address or own_address(host)
            break
        except OSError as reason:  # names of pods are known once the pods are
            if time.monotonic() >= deadline:
                sys.stderr.write(f"megacore: --meet={args.meet}: this node knows no way to {host}: {reason}\n")
                return None
            time.sleep(LOOK_EVERY_S)
    if nodes > 1 and not args.address and address.startswith("127."):
        raise ValueError(f"other nodes cannot reach this one at {address}; give --address=IP")
    if name := interface_of(address):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={name}")  # "=": this one, not all that begin so
    return args.job, host, port, address, here


if __name__ == "__main__":
    from megacore.exits import run

    sys.exit(run("megacore.launch.node", sys.argv[1:]))
