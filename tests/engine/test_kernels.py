"""A run takes the kernels that it names, from the first step to the optimizer's."""

import pytest
import torch

from megacore.config.schema import RunConfig
from megacore.kernels import adamw, fused, reference
from tests.engine.common import built_rank, run_config, step_of

NAMED = ("rms_norm=reference", "swiglu=reference", "rope=reference", "attention=reference", "adamw=reference")


def run_of(*names: str, more: tuple[str, ...] = ()) -> RunConfig:
    return run_config(1, f"kernels.use={list(names)}".replace("'", '"'), "optim.name=adamw", *more)


def losses(config: RunConfig) -> list[float]:
    built = built_rank(0, 1, config)
    return [step_of(built, step, lr=1e-3)[0] for step in range(3)]


def test_the_named_kernels_are_taken_and_mean_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    want = losses(run_of())

    def broken(*args: object) -> None:
        raise AssertionError("this kernel was not named")

    for module, name in ((fused, "_RmsNorm"), (fused, "_Swiglu"), (fused, "_Rope")):
        monkeypatch.setattr(getattr(module, name), "apply", broken)
    monkeypatch.setattr(torch, "_fused_adamw_", broken)
    assert losses(run_of(*NAMED)) == pytest.approx(want, rel=1e-12)
    with pytest.raises(AssertionError, match="was not named"):
        losses(run_of())


def test_choices_and_reasons_are_kept_for_the_start() -> None:
    built = built_rank(0, 1, run_of(*NAMED, more=("kernels.explain=true",)))
    taken = {choice.operation: choice.backend for choice in built.kernels}
    assert taken.items() >= dict(name.split("=") for name in NAMED).items()
    assert set(taken) == {"linear", "rms_norm", "swiglu", "rope", "attention", "adamw"}
    assert built.trainer.rule.kernel is adamw.reference
    assert built.stages[0].get_submodule("final_norm").kernel is reference.rms_norm
    plain = built_rank(0, 1, run_of(more=("kernels.explain=true",)))
    assert any(line.startswith("apex: ") for line in plain.kernel_reasons)
    (told,) = (line for line in plain.kernel_reasons if line.startswith("rms_norm (fused)"))
    assert "not triton: " in told and told.endswith("not reference: fused comes first")
    assert built_rank(0, 1, run_of()).kernel_reasons == ()


def test_what_cannot_be_had_ends_the_start_with_the_reason() -> None:
    with pytest.raises(ValueError, match="no rms_norm for torch.float64 on cpu: apex: no CUDA device"):
        built_rank(0, 1, run_of("rms_norm=apex"))
    with pytest.raises(ValueError, match="no adamw .*: native: it updates float32 weights"):
        built_rank(0, 1, run_of("adamw=native"))
    with pytest.raises(ValueError, match="kernels.use holds adamw=torch, but kernels keep moments in floating point"):
        built_rank(0, 1, run_of("adamw=torch", more=("optim.state_dtype=int8",)))
