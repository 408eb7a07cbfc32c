"""transformer-engine and apex: found or not, with the reason; and what is called of them is what their sources have.

The contract is read from the sources of an installed package, without importing it: drift is found without a GPU.
"""

import ast
import sys
from importlib import metadata
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace

import pytest
import torch

from megacore.kernels import apex, transformer_engine
from megacore.kernels.adamw import Moments, Rates
from tests.contracts import definitions, sources

CPU, CUDA = torch.device("cpu"), torch.device("cuda")

TE_CALLS = {
    "autocast": ("enabled", "recipe", "amax_reduction_group"),
    "quantized_model_init": ("recipe",),
    "is_fp8_available": ("return_reason",),
    "Linear": (
        *("in_features", "out_features", "tp_group", "tp_size", "sequence_parallel", "parallel_mode", "params_dtype"),
        *("fuse_wgrad_accumulation", "get_rng_state_tracker"),
    ),
    "LayerNormLinear": ("normalization", "tp_group", "sequence_parallel", "fuse_wgrad_accumulation"),
    "LayerNormMLP": ("activation", "normalization", "tp_group", "fuse_wgrad_accumulation"),
    "DotProductAttention": ("num_attention_heads", "kv_channels", "num_gqa_groups", "attn_mask_type"),
}
"""What of transformer-engine is used, with the keyword arguments."""
TE_RECIPES = ("DelayedScaling", "Float8CurrentScaling", "Float8BlockScaling", "MXFP8BlockScaling")
APEX_CALLS = {
    "fused_rms_norm_affine": ("input", "weight", "normalized_shape", "eps"),
    "fused_layer_norm_affine": ("input", "weight", "bias", "normalized_shape", "eps"),
    "MultiTensorApply.__call__": ("op", "noop_flag_buffer", "tensor_lists", "*args"),
}
"""What of apex is called, with the arguments in their order."""


@pytest.mark.parametrize("name", TE_CALLS)
def test_transformer_engine_takes_our_arguments(name: str) -> None:
    known = sources("transformer_engine")
    assert any(set(TE_CALLS[name]) <= set(args) for args in known.get(name, [])), known.get(name)


def test_transformer_engine_has_our_recipes() -> None:
    assert set(TE_RECIPES) <= set(sources("transformer_engine"))


@pytest.mark.parametrize("name", APEX_CALLS)
def test_apex_takes_our_arguments(name: str) -> None:
    known = sources("apex")
    if find_spec("amp_C") is None and name not in known:
        pytest.skip("the apex that is installed is not NVIDIA's")
    wants = APEX_CALLS[name]
    assert any([arg for arg in args if arg != "self"][: len(wants)] == list(wants) for args in known[name])


def test_a_contract_notices_another_signature() -> None:
    tree = ast.parse("class Linear:\n def __init__(self, a, *, tp_group=None): ...\nif x:\n def f(b, *c): ...\n")
    assert dict(definitions(tree)) == {
        "Linear": ["self", "a", "tp_group"],
        "Linear.__init__": ["self", "a", "tp_group"],
        "f": ["b", "*c"],
    }


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Detection as on a machine with a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


def present(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """As if these modules could be found, and no other of apex'."""
    monkeypatch.setattr(apex, "find_spec", lambda name: object() if name in names else None)


def test_without_a_gpu_nothing_else_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert apex.refuses(CPU, torch.float32) == "no CUDA device"
    assert transformer_engine.unavailable.__wrapped__() == "no CUDA device"


def test_apex_is_nvidias_or_refused(monkeypatch: pytest.MonkeyPatch, gpu: None) -> None:
    look = apex.unavailable.__wrapped__
    present(monkeypatch)
    assert look().startswith("it is not installed; APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip install")
    present(monkeypatch, "apex")
    assert look().startswith("the apex that is installed is not NVIDIA's (no amp_C)")
    present(monkeypatch, "apex", "amp_C")
    assert look().startswith("it was built without fused_layer_norm_cuda")
    present(monkeypatch, "apex", *apex.NEEDED)
    assert look().startswith("it does not load: ")
    assert apex.refuses(CPU, torch.float32) == "made for CUDA, not cpu"
    assert "not torch.float64" in apex.refuses(CUDA, torch.float64)


def test_transformer_engine_is_new_enough_and_loads(monkeypatch: pytest.MonkeyPatch, gpu: None) -> None:
    look = transformer_engine.unavailable.__wrapped__

    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    def broken(name: str) -> ModuleType:
        raise RuntimeError("found empty `transformer-engine` meta package")

    monkeypatch.setattr(metadata, "version", missing)
    assert look().startswith("it is not installed; pip install --no-build-isolation")
    monkeypatch.setattr(metadata, "version", lambda name: "2.8.1")
    assert look().startswith("2.8.1 is installed, 2.9 or later is needed")
    monkeypatch.setattr(metadata, "version", lambda name: "2.10.0")
    monkeypatch.setattr(transformer_engine, "import_module", broken)
    assert look().startswith("it does not load: found empty `transformer-engine` meta package")
    monkeypatch.setattr(transformer_engine, "import_module", lambda name: ModuleType(name))
    assert look() == ""


def test_apex_gets_what_its_kernels_take(monkeypatch: pytest.MonkeyPatch) -> None:
    """The norms' shapes and factors; of AdamW a call per learning rate and weight decay, with lists in apex' order."""
    called: list[tuple[object, ...]] = []

    def noted(*args: object) -> torch.Tensor:
        called.append(args)
        return torch.zeros(())

    norms = SimpleNamespace(fused_rms_norm_affine=noted, fused_layer_norm_affine=noted)
    monkeypatch.setitem(sys.modules, "apex", ModuleType("apex"))
    monkeypatch.setitem(sys.modules, "apex.normalization", ModuleType("apex.normalization"))
    monkeypatch.setitem(sys.modules, "apex.normalization.fused_layer_norm", norms)
    monkeypatch.setitem(sys.modules, "apex.multi_tensor_apply", SimpleNamespace(multi_tensor_applier=noted))
    monkeypatch.setitem(sys.modules, "amp_C", SimpleNamespace(multi_tensor_adam_capturable="kernel"))
    x, weight = torch.randn(2, 3), torch.randn(3)
    apex.rms_norm(x, weight, 1e-5, 1.0)
    apex.layer_norm(x, weight, weight, 1e-6)
    assert torch.equal(called[0][1], weight + 1) and called[0][2:] == ((3,), 1e-5)
    assert called[1][3:] == ((3,), 1e-6)
    called.clear()
    weights, copies = [torch.full((2,), float(i)) for i in range(3)], [torch.zeros(2, dtype=torch.bfloat16)] * 3
    grads = [tensor.bfloat16() for tensor in weights]
    moments = Moments([tensor + 10 for tensor in weights], [tensor + 20 for tensor in weights], torch.tensor(4.0))
    rates = Rates([0.1, 0.2, 0.1], [0.0, 0.0, 0.0], 0.9, 0.95, 1e-8)
    apex.adamw(weights, grads, moments, rates, torch.tensor(0.0), copies)
    (kernel, skip, lists, lr, *rest), second = called
    assert kernel == "kernel" and skip.tolist() == [1] and skip.dtype == torch.int32  # 1: nothing may change
    assert [[each[0].item() for each in tensors] for tensors in lists] == [[0, 2], [0, 2], [10, 12], [20, 22]]
    assert all(each.dtype == torch.float32 for tensors in lists for each in tensors)
    assert lists[1][1] is weights[2] and lr.tolist() == pytest.approx([0.1])
    beta1, beta2, eps, step, adam_w, corrects, decay, inverse_scale = rest
    assert (beta1, beta2, eps, adam_w, corrects, decay) == (0.9, 0.95, 1e-8, 1, 1, 0.0)
    assert step.tolist() == [4] and step.dtype == torch.int32 and inverse_scale.tolist() == [1.0]
    assert second[3].tolist() == pytest.approx([0.2]) and len(second[2][0]) == 1
    assert copies[0].tolist() == [2.0, 2.0]  # one tensor thrice: the last one's
