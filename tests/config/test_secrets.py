"""What a run alone knows is not written down with it, and is no change when it goes on."""

from dataclasses import asdict

import pytest

from megacore.config.changes import changes
from megacore.config.load import from_tree, load
from megacore.config.secrets import HIDDEN, hidden_keys, without_secrets
from megacore.config.validate import validate
from megacore.config.write import to_toml
from megacore.exits import run
from tests.engine.common import BASE

URL, LINE = "https://hooks.example.com/T0/topsecret?key=b", "send --key 'topsecret x'"
KEYS = ("log.alert_webhook", "log.alert_command")


def config_of(*words: str):
    return load(None, [*BASE, *words])


def with_secrets(*words: str):
    return config_of(f"log.alert_webhook={URL}", f"log.alert_command={LINE}", *words)


def test_what_is_written_down_is_the_run_without_its_secrets(tmp_path):
    written = to_toml(without_secrets(with_secrets()))
    assert "topsecret" not in written and "hooks.example.com" not in written
    assert written.count(HIDDEN) == 2
    (tmp_path / "run.toml").write_text(written)
    again = load(str(tmp_path / "run.toml"))
    assert hidden_keys(again) == list(KEYS)
    assert not [line for line in validate(again, 1) if "alert" in line]
    assert without_secrets(config_of()) == config_of()


def test_going_on_tells_nothing_of_secrets():
    ours = with_secrets()
    assert changes(from_tree(asdict(without_secrets(ours)), "it"), ours) == []
    assert changes(ours, with_secrets("log.alert_webhook=https://example.com/other")) == []
    begun = [str(change) for change in changes(config_of(), ours)]
    assert begun == [f'{key}: "" -> {HIDDEN} (safe)' for key in KEYS]


@pytest.mark.parametrize("kind", ["slurm", "local"])
def test_a_job_takes_no_secrets_from_the_command_line(kind, capsys, tmp_path):
    words = [kind, "--preset", "demo", "--nodes", "1", "--dry-run", f"out={tmp_path}", f"log.alert_webhook={URL}"]
    assert run("megacore.launch.jobs", words) == 2
    said = capsys.readouterr()
    assert "put it into the run file" in said.err
    assert "topsecret" not in said.err + said.out


def test_problems_do_not_say_the_secret():
    lines = validate(with_secrets("log.alert_webhook=ftp://topsecret", "log.alert_command=send 'topsecret"), 1)
    lines += validate(config_of("log.mlflow_uri=https://me:topsecret@mlflow.example.com"), 1)
    told = [line for line in lines if line.startswith(("log.alert", "log.mlflow_uri"))]
    assert len(told) == 3
    assert "topsecret" not in "".join(told)
    assert not [
        line for line in validate(config_of("log.mlflow_uri=https://mlflow.example.com"), 1) if "mlflow" in line
    ]
