"""A job for Kubernetes: a JobSet, or a TrainJob of Kubeflow Trainer, applied with kubectl. Imports no torch."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from megacore.exits import STOPPED
from megacore.launch.job import WAIT, Job, lines, meeting, node_command, preflight_command, quoted

NODE = "node"
"""The name of the container, and of the replicated job: those that Kubeflow's runtimes use."""
MANAGER = "megacore.local/launch"
USER_ERROR = 2
ADDRESS = "POD_IP"
ADDRESS_OF_POD = f'"${ADDRESS}"'
END = "END_OF_RUN_FILE"
RDMA = ("rdma", "hca", "infiniband", "efa")
"""Words in the names of resources that are InfiniBand's, or the like."""


AGAIN = """\
# Written by `megacore launch k8s`. After its end, `kubectl replace --force -f THIS_FILE` goes on where it was.
"""


def jobset(job: Job, namespace: str, claims: Sequence[str], more: Mapping[str, int]) -> str:
    """A JobSet: one indexed Job with a pod per node, a headless service for their names. ``claims``: CLAIM:PATH;
    ``more``: resources besides GPUs, such as InfiniBand's.

    A pod that leaves with 75 has saved and was stopped on request, so it is made again without counting, as one that
    was evicted is; 2 (wrong input) ends the job, any other code restarts all pods.
    """
    name = checked_name(job.name)
    container = {
        "name": NODE,
        "image": job.image,
        **({"workingDir": job.workdir} if job.workdir else {}),
        "command": ["bash", "-c", escaped(script(job, meeting(f"{name}-{NODE}-0-0.{name}")))],
        "env": environment(job),
        **resources(job, more, "resources"),
        **security(more),
        "volumeMounts": volume_mounts(claims),
    }
    on_exit = [("Ignore", STOPPED), ("FailJob", USER_ERROR)]
    rules: list[dict[str, Any]] = [
        {"action": action, "onExitCodes": {"containerName": NODE, "operator": "In", "values": [code]}}
        for action, code in on_exit
    ]
    rules.insert(1, {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]})
    pod = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": job.grace_s,
        "containers": [container],
        "volumes": volumes(claims),
    }
    one_job = {
        "parallelism": job.nodes,
        "completions": job.nodes,
        "completionMode": "Indexed",
        "backoffLimit": 0,
        "podFailurePolicy": {"rules": rules},
        "template": {"spec": pod},
    }
    found = {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": metadata(name, namespace),
        "spec": {
            "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
            "failurePolicy": {
                "maxRestarts": job.max_restarts,
                "rules": [{"name": "wrong_input", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}],
            },
            "replicatedJobs": [{"name": NODE, "replicas": 1, "template": {"spec": one_job}}],
        },
    }
    return written(job, found)


def trainjob(job: Job, namespace: str, claims: Sequence[str], more: Mapping[str, int], runtime: str) -> str:
    """A TrainJob of Kubeflow Trainer over the ClusterTrainingRuntime ``runtime``, whose containers are named node.

    The runtime's own policy counts every exit code but 0, so a pod whose run was stopped because another pod was
    evicted starts it again by itself.
    """
    name = checked_name(job.name)
    pod = {
        "terminationGracePeriodSeconds": job.grace_s,
        "volumes": volumes(claims),
        "containers": [{"name": NODE, **security(more), "volumeMounts": volume_mounts(claims)}],
    }
    of_node = {"name": NODE, "template": {"spec": {"template": {"spec": pod}}}}
    found = {
        "apiVersion": "trainer.kubeflow.org/v1alpha1",
        "kind": "TrainJob",
        "metadata": metadata(name, namespace),
        "spec": {
            "runtimeRef": {
                "apiGroup": "trainer.kubeflow.org",
                "kind": "ClusterTrainingRuntime",
                "name": runtime,
            },
            "trainer": {
                "image": job.image,
                "command": ["bash", "-c", escaped(again_script(job, '"$PET_MASTER_ADDR:$PET_MASTER_PORT"'))],
                "numNodes": job.nodes,
                "numProcPerNode": job.gpus,
                "env": environment(job),
                **resources(job, more, "resourcesPerNode"),
            },
            "runtimePatches": [
                {
                    "manager": MANAGER,
                    "trainingRuntimeSpec": {"template": {"spec": {"replicatedJobs": [of_node]}}},
                }
            ],
        },
    }
    return written(job, found)


def script(job: Job, meet: str) -> str:
    """What a pod runs; the node's command becomes its first process, which Kubernetes asks to stop."""
    checks = f"{lines(preflight_command(job, meet, ADDRESS_OF_POD))}\n" if job.preflight else ""
    return f"set -eu\n{run_file(job)}{checks}exec {lines(node_command(job, meet, ADDRESS_OF_POD))}\n"


def again_script(job: Job, meet: str) -> str:
    """What a pod runs where nobody starts it again after a stop that was not its own."""
    checks = f"{lines(preflight_command(job, meet, ADDRESS_OF_POD))} || exit 1\n" if job.preflight else ""
    go = f"cd {quoted(job.workdir)} || exit 1\n" if job.workdir else ""
    return f"""\
set -u
{go}{run_file(job)}asked=0 woken=0 step='' code={STOPPED}
trap 'asked=1 woken=1; [ -z "$step" ] || kill -TERM "$step"' TERM
{checks}# stopped, but it was another pod that had to go: wait for its successor, and go on
while [ "$code" -eq {STOPPED} ] && [ "$asked" -eq 0 ]; do
{lines(node_command(job, meet, ADDRESS_OF_POD))} &
step=$!
{WAIT}done
exit "$code"
"""


def run_file(job: Job) -> str:
    """Lines that give a node its run file, which the job brings along: it sees none of the machine that wrote it."""
    if not job.run_text:
        return ""
    return f"cat > {run_path(job.name)} << '{END}'\n{job.run_text.rstrip()}\n{END}\n"


def run_path(name: str) -> str:
    """Where ``run_file`` puts it."""
    return f"/tmp/megacore-{name}.toml"


def escaped(text: str) -> str:
    """For Kubernetes, which puts a variable's value for $(NAME), and $ for $$."""
    return re.sub(r"\$(?=[$(])", "$$", text)


def environment(job: Job) -> list[Mapping[str, Any]]:
    """Variables of the container."""
    address = {"name": ADDRESS, "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}}
    return [address, *({"name": each.name, "value": escaped(each.value)} for each in job.environment)]


def resources(job: Job, more: Mapping[str, int], name: str) -> dict[str, Any]:
    """Of one node, under ``name``; nothing where nothing is asked for."""
    wanted = {**({"nvidia.com/gpu": job.gpus} if job.has_gpus else {}), **more}
    return {name: {"limits": wanted}} if wanted else {}


def security(more: Mapping[str, int]) -> dict[str, Any]:
    """RDMA registers memory that must stay where it is, for which a container needs leave."""
    if not any(any(word in name for word in RDMA) for name in more):
        return {}
    return {"securityContext": {"capabilities": {"add": ["IPC_LOCK"]}}}


def volumes(claims: Sequence[str]) -> list[Mapping[str, Any]]:
    """Shared memory, which containers else have 64 MiB of, and the files that all pods see."""
    shared = [
        {"name": f"files-{number}", "persistentVolumeClaim": {"claimName": claim.partition(":")[0]}}
        for number, claim in enumerate(claims)
    ]
    return [{"name": "dshm", "emptyDir": {"medium": "Memory"}}, *shared]


def volume_mounts(claims: Sequence[str]) -> list[Mapping[str, str]]:
    """Where they lie."""
    shared = [{"name": f"files-{number}", "mountPath": claim.partition(":")[2]} for number, claim in enumerate(claims)]
    return [{"name": "dshm", "mountPath": "/dev/shm"}, *shared]


def metadata(name: str, namespace: str) -> dict[str, Any]:
    """Name and labels."""
    found: dict[str, Any] = {"name": name}
    if namespace:
        found["namespace"] = namespace
    return {**found, "labels": {"app.kubernetes.io/name": "megacore", "app.kubernetes.io/instance": name}}


def checked_name(name: str) -> str:
    """A name that a host may bear. Raises ValueError."""
    if not re.fullmatch(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?", name):
        raise ValueError(
            f"--name={name} must be at most 40 small letters, digits and hyphens, beginning with a letter: pods are "
            "named after it"
        )
    return name


def written(job: Job, found: Mapping[str, Any], head: str = AGAIN) -> str:
    """As YAML, the reasons of its variables before it."""
    import yaml  # --help can do without

    class Dumper(yaml.SafeDumper):
        """Text of several lines is written as it is."""

        def ignore_aliases(self, data: Any) -> bool:
            return True

    def text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
        return dumper.represent_scalar("tag:yaml.org,2002:str", value, style="|" if "\n" in value else None)

    Dumper.add_representer(str, text)
    why = "".join(f"# {each.name}={each.value}: {each.why}\n" for each in job.environment)
    body: str = yaml.dump(found, Dumper=Dumper, sort_keys=False, width=120)
    return head + why + body
