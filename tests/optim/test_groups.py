"""Settings of single parameters: groups by pattern, frozen ones, and what is said of patterns that do nothing."""

import pytest

from megacore.config.errors import ConfigError
from megacore.config.load import load
from megacore.config.param_groups import ParamGroup, param_groups
from megacore.config.resolve import resolve_model
from megacore.config.schema import ModelConfig, OptimConfig
from megacore.config.validate import validate
from megacore.config.write import to_toml
from megacore.spec import ModelSpec
from megacore.spec.settings import UpdateSettings, settings_of

MODEL = resolve_model(
    ModelConfig(num_layers=2, hidden_size=8, num_heads=2, vocab_size=5, qkv_bias=True, mlp_bias=True), seq_len=4
)
SPECS = ModelSpec.of(MODEL).params


def optim(*groups: str, freeze: tuple[str, ...] = ()) -> OptimConfig:
    return OptimConfig(weight_decay=0.1, groups=groups, freeze=freeze)


def problems(config: OptimConfig) -> list[str]:
    with pytest.raises(ConfigError) as raised:
        settings_of(SPECS, config)
    return list(raised.value.problems)


def test_without_groups_norms_biases_and_embeddings_are_not_decayed() -> None:
    settings = settings_of(SPECS, optim())
    assert list(settings) == [spec.name for spec in SPECS]
    for name, own in settings.items():
        exempt = name.endswith((".bias", "norm.weight")) or name.startswith("embedding")
        assert own == UpdateSettings(weight_decay=0.0 if exempt else 0.1, lr_scale=1.0, frozen=False), name


def test_the_first_group_that_matches_counts() -> None:
    settings = settings_of(
        SPECS,
        optim("layers.0.mlp.*: lr_scale=0.5", "layers.0.*: lr_scale=0.1, weight_decay=0", "*.bias: weight_decay=0.2"),
    )
    assert settings["layers.0.mlp.down.weight"] == UpdateSettings(0.1, 0.5)  # what it leaves open is as ever
    assert settings["layers.0.mlp.down.bias"] == UpdateSettings(0.0, 0.5)
    assert settings["layers.0.attention.qkv.weight"] == UpdateSettings(0.0, 0.1)
    assert settings["layers.1.mlp.down.bias"] == UpdateSettings(0.2, 1.0)  # said by name, an exempt one is decayed
    assert settings["layers.1.mlp.down.weight"] == UpdateSettings(0.1, 1.0)


def test_frozen_parameters() -> None:
    settings = settings_of(SPECS, optim(freeze=("embedding.*", "layers.[0].*")))
    frozen = {name for name, own in settings.items() if own.frozen}
    assert frozen == {name for name in settings if name.startswith(("embedding", "layers.0."))}


@pytest.mark.parametrize(
    ("config", "start", "hint"),
    [
        (
            optim("layers.*.mpl.down.weight: lr_scale=1"),
            'optim.groups holds "layers.*.mpl',
            "layers.*.mlp.down.weight?",
        ),
        (optim(freeze=("embeding.tokens.weight",)), 'optim.freeze holds "embeding', "embedding.tokens.weight?"),
        (optim("LAYERS.*: lr_scale=1"), 'optim.groups holds "LAYERS.*', "known are embedding.tokens.weight, layers.*"),
        (optim("*.bias: lr_scale=1", "layers.0.*.bias: lr_scale=2"), 'optim.groups holds "layers.0', "move it before"),
        (optim(freeze=("*.weight", "*.bias")), "optim.freeze=", "leave one of the patterns out"),
    ],
)
def test_patterns_that_do_nothing_are_refused(config: OptimConfig, start: str, hint: str) -> None:
    (problem,) = problems(config)
    assert problem.startswith(start)
    assert hint in problem


def test_all_problems_are_told_at_once() -> None:
    assert len(problems(optim("x.*: lr_scale=1", "y.*: lr_scale=1", freeze=("z.*",)))) == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("*.bias", "write"),
        ("*.bias:", "write"),
        (": lr_scale=1", "write"),
        ("*.bias: lr_scal=1", "there is no lr_scal; did you mean lr_scale?"),
        ("*.bias: lr=1", "there is no lr; "),
        ("*.bias: =1", "there is no setting without a name"),
        ("*.bias: lr_scale", 'lr_scale is ""; it must be a number of at least 0'),
        ("*.bias: lr_scale=fast", 'lr_scale is "fast"'),
        ("*.bias: lr_scale=-1", 'lr_scale is "-1"'),
        ("*.bias: weight_decay=inf", 'weight_decay is "inf"'),
        ("*.bias: weight_decay=nan", 'weight_decay is "nan"'),
        ("*.bias: lr_scale=1, lr_scale=2", "gives lr_scale 2 times"),
    ],
)
def test_what_cannot_be_read_is_refused_before_anything_starts(text: str, message: str) -> None:
    found = validate(load(None, [f'optim.groups=["{text}"]'], "demo"), None)
    assert found
    for problem in found:
        assert problem.startswith(f'optim.groups holds "{text}"')
        assert message in problem


def test_groups_survive_being_written(tmp_path) -> None:
    config = load(None, ['optim.groups=["a*: lr_scale=.5", " b.?: weight_decay=1e-2 ,lr_scale=0"]'], "demo")
    path = tmp_path / "run.toml"
    path.write_text(to_toml(config))
    assert param_groups(load(str(path)).optim.groups) == (
        ParamGroup("a*", lr_scale=0.5),
        ParamGroup("b.?", lr_scale=0.0, weight_decay=0.01),
    )
    assert not validate(config, None)


@pytest.mark.parametrize("clip", ["value", "adagc"])
def test_clipping_without_a_bound_is_refused(clip: str) -> None:
    (problem,) = validate(load(None, [f"optim.clip={clip}", "optim.clip_grad=0"], "demo"), None)
    assert problem.startswith("optim.clip_grad=0.0 turns clipping off")
