"""A task for SkyPilot, on any cloud that it knows; launched with `sky jobs launch`. Imports no torch."""

from typing import Any

from megacore.exits import STOPPED
from megacore.launch.job import Job, lines, node_command, preflight_command
from megacore.launch.kubernetes import written
from megacore.launch.places import PORT

HEAD = '"$(head -n 1 <<< "$SKYPILOT_NODE_IPS")"'
OWN = '"$(sed -n "$((SKYPILOT_NODE_RANK + 1))p" <<< "$SKYPILOT_NODE_IPS")"'
SETUP = "bash launch/setup.sh"


def task(job: Job, infra: str, setup: str, spot: bool) -> str:
    """A managed job: nodes that are lost, and runs that stop with 75, are recovered by the same command."""
    meet = f"{HEAD}:{PORT}"
    checks = f"{lines(preflight_command(job, meet, OWN))}\n" if job.preflight else ""
    resources: dict[str, Any] = {
        "accelerators": f"{job.gpu.upper()}:{job.gpus}",
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
            "envs": {each.name: each.value for each in job.environment},
            "setup": setup + "\n",
            "run": f"set -eu\n{checks}{lines(node_command(job, meet, OWN))}\n",
        },
    )
