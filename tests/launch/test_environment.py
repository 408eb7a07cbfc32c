"""What is set before torch starts: a function of the run and the GPU, which never overrules the user."""

import os
import stat
from pathlib import Path

import pytest

from megacore.config.load import load
from megacore.config.resolve import resolve
from megacore.config.schema import RunConfig
from megacore.launch import environment
from megacore.launch.environment import ALLOCATOR, CONNECTIONS, capability_here, lines_of, prepare, settings_for

HOPPER, BLACKWELL = (9, 0), (10, 0)
PRIORITY = "TORCH_NCCL_HIGH_PRIORITY"


def run_of(world_size: int = 1, *overrides: str) -> RunConfig:
    return resolve(load(None, overrides, "llama3-8b"), world_size)


def values(config: RunConfig, capability: tuple[int, int] | None) -> dict[str, str]:
    return {setting.name: setting.value for setting in settings_for(config, capability)}


@pytest.mark.parametrize(
    ("world_size", "overrides", "capability", "connections"),
    [
        (1, (), HOPPER, None),
        (8, (), HOPPER, None),
        (8, ("parallel.tp=8",), (8, 0), "1"),
        (8, ("parallel.tp=8",), HOPPER, "1"),
        (8, ("parallel.cp=2",), HOPPER, "1"),
        (8, ("parallel.tp=8",), BLACKWELL, None),
        (8, ("parallel.zero=3",), HOPPER, None),
        (8, ("parallel.tp=2", "parallel.zero=2"), HOPPER, "1"),
        (8, ("parallel.tp=2", "parallel.zero=3"), HOPPER, "32"),
        (8, ("parallel.cp=2", "parallel.zero=3"), HOPPER, "32"),
        (8, ("parallel.tp=2", "parallel.zero=3"), BLACKWELL, None),
    ],
)
def test_queues_to_the_device(
    world_size: int, overrides: tuple[str, ...], capability: tuple[int, int], connections: str | None
) -> None:
    """1 before Blackwell with tp or cp; never 1 with ZeRO-3."""
    found = values(run_of(world_size, *overrides), capability)
    assert found.get(CONNECTIONS) == connections
    assert found[ALLOCATOR] == "expandable_segments:True"
    assert (PRIORITY in found) == (world_size > 1)


def test_without_a_gpu_nothing_is_set() -> None:
    assert settings_for(run_of(8, "parallel.tp=8"), None) == ()
    assert settings_for(run_of(8, "parallel.tp=8", "train.device=cpu"), HOPPER) == ()
    assert set(values(run_of(1, "profile=[1,2]"), None)) == {"KINETO_LOG_LEVEL"}


def test_the_user_is_not_overruled() -> None:
    config = run_of(8, "parallel.tp=8")
    given = {CONNECTIONS: "8", "PYTORCH_ALLOC_CONF": "max_split_size_mb:512", "HOME": "/root"}
    kept = dict(given)
    added = prepare(config, given, HOPPER)
    assert given == kept | {PRIORITY: "1"}
    assert [setting.name for setting in added] == [PRIORITY]
    assert prepare(config, given, HOPPER) == (), "what is there stays"


def test_every_setting_is_explained() -> None:
    lines = lines_of(settings_for(run_of(8, "parallel.tp=8"), HOPPER))
    assert lines[0].startswith(f"{ALLOCATOR}=expandable_segments:True: memory")
    assert len(lines) == 3 and all(line.count(": ") and len(line) < 120 for line in lines)


def test_one_queue_and_zero_3_are_refused() -> None:
    config = run_of(8, "parallel.zero=3")
    with pytest.raises(ValueError, match="CUDA_DEVICE_MAX_CONNECTIONS=1 with parallel.zero=3 .* unset it, or use 32"):
        prepare(config, {CONNECTIONS: "1"}, BLACKWELL)
    assert prepare(config, {CONNECTIONS: "1"}, None) == (), "without a GPU it is nobody's concern"
    prepare(run_of(8, "parallel.zero=2"), {CONNECTIONS: "1"}, HOPPER)


@pytest.mark.parametrize(
    ("says", "expected"),
    [("echo 9.0; echo 9.0", (9, 0)), ("echo 12.0", (12, 0)), ("echo nothing; exit 1", None), ("echo N/A", None)],
)
def test_the_drivers_tool_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, says: str, expected: tuple[int, int] | None
) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\n{says}\n")
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert capability_here() == expected
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert capability_here() is None
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setenv("PATH", "")
    assert capability_here() is None


def test_what_is_set_is_there_before_ranks_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """`megacore train` sets it, and the ranks' first words are what was set."""
    from megacore.launch import train

    seen: dict[str, object] = {}

    def run_local(target: str, args: tuple[object, ...], nproc: int, **rest: object) -> int:
        seen.update(environment=dict(os.environ), remarks=args[3], nproc=nproc)
        return 0

    monkeypatch.setattr(train, "run_local", run_local)
    monkeypatch.setattr(train, "capability_here", lambda: HOPPER)
    monkeypatch.setattr(train, "requested", lambda args, info: (run_of(2, "parallel.tp=2"), 2))
    names = (ALLOCATOR, "PYTORCH_ALLOC_CONF", CONNECTIONS, PRIORITY)
    for name in names:
        monkeypatch.setenv(name, "")  # so that they are put back afterwards
        monkeypatch.delenv(name)
    assert train.main(["--preset", "demo"]) == 0
    assert seen["environment"][CONNECTIONS] == "1"  # type: ignore[index]
    assert seen["remarks"] == lines_of(environment.settings_for(run_of(2, "parallel.tp=2"), HOPPER))


def test_mlflow_is_let_use_files_where_there_is_no_server() -> None:
    files = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_ALLOW_FILE_STORE": "true"}
    assert values(run_of(1, "log.mlflow=true"), None) == files
    served = values(run_of(1, "log.mlflow=true", "log.mlflow_uri=http://host:5000"), None)
    assert served == {"MLFLOW_DISABLE_TELEMETRY": "true"}
