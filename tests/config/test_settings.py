"""Hyper-parameters: an optimizer's own, the keys that they have, and the options that they have not."""

import ast

import pytest

from megacore.config.load import load
from megacore.config.optimizers import RULES, defaults, kept, optimizer_names, state
from megacore.config.resolve import resolve, resolve_optim
from megacore.config.schema import OptimConfig
from megacore.config.settings import OWN, resolve_settings, setting_problems, settings
from megacore.config.validate import validate
from megacore.config.write import flatten, to_toml

KEYS = ("beta1", "beta2", "eps", "momentum", "weight_decay")


def test_optimizers_are_the_files_of_their_folder() -> None:
    assert set(optimizer_names()) == {
        path.stem.replace("_", "-") for path in RULES.iterdir() if path.stem[0] not in "_."
    }
    assert {"adam", "adamw", "lion", "sgd"} <= set(optimizer_names())


@pytest.mark.parametrize("name", optimizer_names())
def test_what_a_file_says_fits_together(name: str) -> None:
    own = defaults(name)
    assert own["weight_decay"] >= 0
    assert all(isinstance(value, float) and value != OWN for value in own.values()), own
    assert settings(OptimConfig(name=name)) == own
    for kind in state(name).values():
        condition = kind.partition(" if ")[2]
        assert not condition or condition in own
    tree = ast.parse((RULES / f"{name.replace('-', '_')}.py").read_text(encoding="utf-8"))
    assert ast.get_docstring(tree), "says where the defaults come from"


def test_conditions_of_state() -> None:
    assert kept({"a": "moment", "b": "square if x", "c": "moment if y"}, {"x": 0.1, "y": 0.0}) == {
        "a": "moment",
        "b": "square",
    }


@pytest.mark.parametrize("name", optimizer_names())
def test_resolving_fills_in_all_and_only_what_the_optimizer_has(name: str) -> None:
    resolved = resolve_optim(OptimConfig(name=name), 100)
    own = defaults(name)
    for key in KEYS:
        assert getattr(resolved, key) == own.get(key, OWN)
    assert len(resolved.options) == len([key for key in own if key not in KEYS])
    assert settings(resolved) == own
    assert resolve_settings(resolved) == resolved
    assert not list(setting_problems(resolved))


def test_given_values_win() -> None:
    optim = OptimConfig(name="sgd", momentum=0.0, weight_decay=0.25, options=(" nesterov = true",))
    assert settings(optim) == {"momentum": 0.0, "nesterov": 1.0, "weight_decay": 0.25}
    assert resolve_settings(optim).options == ("nesterov=1",)
    assert settings(OptimConfig(weight_decay=0.0))["weight_decay"] == 0.0


def test_a_resolved_run_is_the_same_run_when_it_is_read_again(tmp_path) -> None:
    given = ["optim.name=sgd", "optim.momentum=0.9", 'optim.options=["nesterov=1"]']
    run = resolve(load(None, given, "demo"), 1)
    path = tmp_path / "run.toml"
    path.write_text(to_toml(run), encoding="utf-8")
    again = load(str(path))
    assert flatten(again) == flatten(run)
    assert resolve(again, 1) == run
    assert not validate(again, 1)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optim.name=lion", "optim.eps=1e-6"], "optim.eps=1e-06 is not known to lion, which has beta1, beta2"),
        (["optim.name=lyon"], "did you mean lion?"),
        (["optim.options=['nesterov=1']"], "adamw has no nesterov; leave it out"),
        (["optim.name=sgd", "optim.options=['nestrov=1']"], "sgd has no nestrov; did you mean nesterov?"),
        (["optim.name=sgd", "optim.options=['nesterov']"], 'holds "nesterov"; write "name=number"'),
        (["optim.name=sgd", "optim.options=['nesterov=yes']"], 'holds "nesterov=yes"; write "name=number"'),
        (["optim.name=sgd", "optim.options=['nesterov=nan']"], 'write "name=number"'),
        (["optim.name=sgd", "optim.options=['nesterov=1', 'nesterov=0']"], "holds nesterov twice"),
        (["optim.options=['beta1=0.8']"], "has a key of its own; write optim.beta1=0.8"),
        (
            ["optim.beta2=1"],
            "optim.beta2=1.0 is out of range; it must be at least 0 and less than 1, or -1 for the opt",
        ),
        (["optim.weight_decay=-0.1"], "it must be at least 0, or -1 for the optimizer's own"),
        (["optim.eps=0"], "it must be more than 0, or -1 for the optimizer's own"),
        (["optim.state_rounding=stochastic"], "needs optim.state_dtype=bf16, not auto"),
        (["optim.name=sgd", "optim.state_dtype=int8"], "optim.state_dtype=int8 has no effect on sgd"),
        (["optim.state_dtype=fp8"], "optim.state_dtype=fp8 is not one of auto, fp32, bf16, int8"),
    ],
)
def test_what_is_wrong_is_said_with_its_fix(overrides: list[str], message: str) -> None:
    try:
        problems = validate(load(None, overrides, "demo"), 1)
    except ValueError as error:
        problems = [str(error)]
    assert len(problems) == 1
    assert message in problems[0]


def test_zero_is_a_value() -> None:
    assert not validate(load(None, ["optim.weight_decay=0", "optim.beta1=0"], "demo"), 1)
