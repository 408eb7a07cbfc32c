"""What `kernels.use` may hold."""

import pytest

from megacore.config.kernels import operations_of, wanted, wanted_of_model
from megacore.config.load import load
from megacore.config.rules import RULES
from megacore.config.schema import RunConfig
from megacore.config.validate import check
from tests.engine.common import run_config


def problems(*texts: str, **more: str) -> str:
    overrides = [f"kernels.use={list(texts)}".replace("'", '"'), *(f"{key}={value}" for key, value in more.items())]
    with pytest.raises(ValueError) as raised:
        check(run_config(1, *overrides), 1)
    return str(raised.value)


def test_backends_are_named() -> None:
    config = run_config(1, 'kernels.use=["rms_norm=reference", " adamw = torch "]')
    check(config, 1)
    assert wanted(config.kernels.use) == {"rms_norm": "reference", "adamw": "torch"}
    assert wanted_of_model(config.kernels.use) == {"rms_norm": "reference"}
    assert load(None, ["kernels.use=rope=reference"]).kernels.use == ("rope=reference",)


def test_what_is_misspelt_is_guessed() -> None:
    assert "there is no operation rmsnorm; did you mean rms_norm?" in problems("rmsnorm=fused")
    assert "rms_norm has no backend trition; did you mean triton?" in problems("rms_norm=trition")
    assert "known are native, fused, apex, cuda, triton, reference" in problems("rms_norm=metal")
    assert 'write "OPERATION=BACKEND"' in problems("rms_norm")
    assert 'write "OPERATION=BACKEND"' in problems("=fused")
    assert "rms_norm is named 2 times" in problems("rms_norm=fused", "rms_norm=reference")


def test_what_would_not_be_called_is_refused() -> None:
    told = problems("geglu=reference")
    assert "geglu=reference" in told and "does not call; it calls adamw, attention, linear" in told
    assert "which this run does not call" in problems("adamw=torch", **{"optim.name": "muon"})
    assert "there is no operation softmax" in problems("softmax=triton")


def test_models_call_what_their_features_need() -> None:
    model = RunConfig().model
    assert operations_of(load(None, ["model.family=llama"]).model) >= {"rms_norm", "rms_norm_add", "swiglu", "rope"}
    assert operations_of(load(None, ["model.family=gpt2"]).model) >= {"layer_norm", "bias_gelu", "squares", "linear"}
    assert operations_of(model, "delayed") - operations_of(model, "block") == {"quantise"}
    assert "attention_softcap" in operations_of(load(None, ["model.family=gemma2"]).model)
    assert isinstance(operations_of(model), frozenset)


def test_a_rule_asks() -> None:
    assert any("kernels.use" in keys for _, keys in RULES)
