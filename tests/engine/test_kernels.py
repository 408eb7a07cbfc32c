"""A run takes the kernels that it names, from the first step to the optimizer's."""

import pytest
import torch

from megacore.config.schema import RunConfig
from megacore.kernels import adamw, fused, reference
from tests.engine.common import built_rank, run_config, step_of

OPERATIONS = ("rms_norm", "rms_norm_add", "swiglu", "rope", "attention", "logit_statistics", "squares", "adamw")
NAMED = tuple(f"{operation}=reference" for operation in OPERATIONS)


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
    assert set(taken) == {"linear", *OPERATIONS}
    assert built.trainer.rule.kernel is adamw.reference
    assert built.stages[0].get_submodule("final_norm").kernel is reference.rms_norm
    assert built.stages[0].get_submodule("layers.0.mlp_norm").adding is reference.rms_norm_add
    assert built.stages[0].vocab.statistics is reference.logit_statistics
    assert built.trainer.clip.norm.kernel is reference.squares
    plain = built_rank(0, 1, run_of(more=("kernels.explain=true",)))
    assert any(line.startswith("apex: ") for line in plain.kernel_reasons)
    (told,) = (line for line in plain.kernel_reasons if line.startswith("rms_norm (fused)"))
    assert "not triton: " in told and told.endswith("not reference: fused comes first")
    assert built_rank(0, 1, run_of()).kernel_reasons == ()


GPT2 = ("model.norm=layernorm", "model.activation=gelu", "model.mlp_bias=true", "model.position=learned")


@pytest.mark.parametrize("more", [(), ("parallel.recompute=full",), ("model.norm_placement=both",)], ids=str)
def test_biases_and_sums_may_go_into_the_next_operation(more: tuple[str, ...]) -> None:
    names = ("layer_norm_add=reference", "bias_gelu=reference")
    config = run_of(*names, more=(*GPT2, *more))
    stage = built_rank(0, 1, config).stages[0]
    assert stage.get_submodule("layers.0.mlp").bias_gelu is reference.bias_gelu
    assert stage.get_submodule("layers.0.mlp_norm").adding is reference.layer_norm_add
    assert losses(config) == pytest.approx(losses(run_of(more=(*GPT2, *more))), rel=1e-12)


def test_codes_of_8_bits_are_made_by_the_named_kernel() -> None:
    sizes = ("model.hidden_size=64", "model.head_dim=16", "model.ffn_hidden_size=48")
    more = ("precision.dtype=bf16", "precision.fp8=delayed", *sizes)
    built = built_rank(0, 1, run_of("quantise=reference", more=more))
    assert "quantise" in {choice.operation for choice in built.kernels}
    assert built.trainer.fp8 is not None and built.trainer.fp8.recipe.kernel is reference.quantise


def test_what_cannot_be_had_ends_the_start_with_the_reason() -> None:
    with pytest.raises(ValueError, match="no rms_norm for torch.float64 on cpu: apex: no CUDA device"):
        built_rank(0, 1, run_of("rms_norm=apex"))
    with pytest.raises(ValueError, match="no adamw .*: native: it updates float32 weights"):
        built_rank(0, 1, run_of("adamw=native"))
    with pytest.raises(ValueError, match="kernels.use holds adamw=torch, but kernels keep moments in floating point"):
        built_rank(0, 1, run_of("adamw=torch", more=("optim.state_dtype=int8",)))
