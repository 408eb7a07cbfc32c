"""A task for SkyPilot, on any cloud that it knows; launched with `sky jobs launch`. Imports no torch."""

from collections.abc import Sequence
from typing import Any

from megacore.exits import STOPPED
from megacore.launch.job import Job, lines, node_command, preflight_command
from megacore.launch.kubernetes import run_file, written
from megacore.launch.places import PORT

HEAD = '"$(head -n 1 <<< "$SKYPILOT_NODE_IPS")"'
OWN = '"$(sed -n "$((SKYPILOT_NODE_RANK + 1))p" <<< "$SKYPILOT_NODE_IPS")"'
SETUP = "bash launch/setup.sh"


AGAIN = "# Written by `megacore launch sky`. Launched again after its end, the run goes on where it was.\n"
CORES = 2
"""The least per rank on machines without GPUs."""


def task(job: Job, accelerator: str, infra: str, setup: str, spot: bool) -> str:
    """A managed job: nodes that are lost, and runs that stop with 75, are recovered by the same command."""
    meet = f"{HEAD}:{PORT}"
    checks = f"{lines(preflight_command(job, meet, OWN))}\n" if job.preflight else ""
    resources: dict[str, Any] = {
        **({"accelerators": f"{accelerator}:{job.gpus}"} if job.has_gpus else {"cpus": f"{CORES * job.gpus}+"}),
        "use_spot": spot,
        "network_tier": "best",
        "job_recovery": {
            "strategy": "EAGER_NEXT_REGION" if spot else "FAILOVER",
            "max_restarts_on_errors": job.max_restarts,
            "recover_on_exit_codes": [STOPPED],
        },
    }
    if infra:
        resources["infra"] = infra
    if job.image:
        resources["image_id"] = f"docker:{job.image}"
    return written(
        job,
        {
            "name": job.name,
            "workdir": job.workdir,
            "num_nodes": job.nodes,
            "resources": resources,
            **({"file_mounts": buckets(job.mounts)} if job.mounts else {}),
            "envs": {each.name: each.value for each in job.environment},
            "setup": setup + "\n",
            "run": f"set -eu\n{run_file(job)}{checks}{lines(node_command(job, meet, OWN))}\n",
        },
        AGAIN,
    )


def buckets(mounts: Sequence[str]) -> dict[str, Any]:
    """Buckets that all nodes see, written ``s3://BUCKET:/PATH``."""
    pairs = (each.rpartition(":") for each in mounts)
    return {path: {"source": bucket, "mode": "MOUNT"} for bucket, _, path in pairs}
