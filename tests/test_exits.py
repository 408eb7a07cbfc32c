"""What a command raises becomes the exit code that COMMANDS promise."""

import sys
from types import ModuleType

import pytest

from megacore.exits import run


@pytest.fixture
def command(monkeypatch):
    """Installs a command that does `action`, as if it were megacore's own code or a library's."""

    def install(action, name="megacore.a_command"):
        module = ModuleType(name)
        module.action = action
        exec("def main(argv):\n    return action()", vars(module))
        monkeypatch.setitem(sys.modules, name, module)
        return name

    return install


def raises(source):
    """A function that raises as code of the module `source` would."""
    scope = {"__name__": source}
    exec("def act(error):\n    raise error", scope)
    return scope["act"]


def test_the_commands_own_code_is_returned(command):
    assert run(command(lambda: 75), []) == 75


def test_our_value_errors_are_the_users(command, capsys):
    assert run(command(lambda: raises("megacore.config.load")(ValueError("optim.lr=x"))), []) == 2
    assert capsys.readouterr().err == "megacore: optim.lr=x\n"


def test_a_librarys_value_error_is_our_fault(command, capsys):
    assert run(command(lambda: raises("numpy.core")(ValueError("shapes"))), []) == 1
    assert "Traceback" in capsys.readouterr().err


def test_faults_show_a_traceback(command, capsys):
    assert run(command(lambda: raises("megacore.mesh")(RuntimeError("broken"))), []) == 1
    assert "RuntimeError: broken" in capsys.readouterr().err


def test_the_keyboard_stops_quietly(command, capsys):
    assert run(command(lambda: raises("megacore.train")(KeyboardInterrupt())), []) == 130
    assert capsys.readouterr().err == ""


def test_a_checkout_that_is_not_installed_says_so(monkeypatch, capsys):
    def import_module(name):
        raise ModuleNotFoundError("No module named 'megacore.tools'", name="megacore.tools")

    monkeypatch.setattr("megacore.exits.import_module", import_module)
    assert run("megacore.tools.presets", []) == 2
    message = capsys.readouterr().err
    assert "not installed" in message
    assert "bash launch/setup.sh" in message
