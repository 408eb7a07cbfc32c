"""The spec against published parameter counts and against the modules that are built from it."""

import itertools
import math
from dataclasses import replace

import pytest
import torch

from megacore.config.load import load
from megacore.config.presets import preset_names
from megacore.config.resolve import resolve_model
from megacore.config.schema import ModelConfig
from megacore.kernels.table import resolve
from megacore.mesh.group import Group
from megacore.model.stage import Objective, Stage
from megacore.parallel.parameters import ParameterMaker
from megacore.parallel.tensor import TensorParallel
from megacore.spec import ModelSpec
from tests.config.test_presets import PUBLISHED
from tests.presets import trained

TINY = ModelConfig(num_layers=3, hidden_size=24, num_heads=6, num_kv_heads=2, head_dim=4, vocab_size=31)
MODELS = (
    TINY,
    replace(TINY, tie_embeddings=True, qk_norm=True, qkv_bias=True, activation="geglu"),
    replace(TINY, norm="layernorm", activation="gelu", position="learned", attention_out_bias=True, mlp_bias=True),
    replace(TINY, activation="relu2", position="alibi", num_kv_heads=1, vocab_size=1),
    replace(TINY, qk_norm=True, qk_norm_over="all", norm_placement="both", norm_unit_offset=True, num_kv_heads=1),
)


def model_of(preset: str) -> ModelConfig:
    run = load(None, preset=preset)
    return resolve_model(run.model, run.train.seq_len)


def stage_of(model: ModelConfig, rank: int, size: int, sequence: bool = False) -> Stage:
    """The module of one rank on the meta device, where nothing is stored or sent."""
    ranks = tuple(range(size))
    group = Group.single("tp") if size == 1 else Group("tp", ranks, rank, handle=object(), backend="gloo")  # type: ignore[arg-type]
    device, dtype = torch.device("meta"), torch.float32
    tp = TensorParallel(group, sequence)
    make = ParameterMaker(ModelSpec.of(model, tp.sequence).by_name, group, device, dtype, seed=0)
    return Stage(model, make, tp, resolve(device, dtype)[0], Objective(), range(model.num_layers))


@pytest.mark.parametrize(("preset", "count"), PUBLISHED.items())
def test_presets_have_the_published_number_of_parameters(preset: str, count: int) -> None:
    assert ModelSpec.of(model_of(preset)).num_params == count


def test_every_preset_of_a_published_model_is_counted() -> None:
    assert set(preset_names()) - set(PUBLISHED) == {"demo"}


@pytest.mark.parametrize("preset", trained())
def test_presets_as_modules_are_what_the_spec_says(preset: str) -> None:
    model = model_of(preset)
    params = [(name, tuple(param.shape)) for name, param in stage_of(model, 0, 1).named_parameters()]
    assert params == [(param.name, param.shape) for param in ModelSpec.of(model).params]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("sequence", [False, True])
def test_modules_hold_the_slices_that_the_spec_deals_out(model: ModelConfig, sequence: bool) -> None:
    model = resolve_model(model, seq_len=16)
    spec = ModelSpec.of(model, sequence)
    for size in (1, 2):
        for rank in range(size):
            params = [(n, tuple(p.shape)) for n, p in stage_of(model, rank, size, sequence).named_parameters()]
            assert params == [(param.name, param.local_shape(rank, size)) for param in spec.params]


# All sizes of tp that six query heads and the model's kv heads allow.
@pytest.mark.parametrize(
    ("model", "num"), [(m, n) for m in MODELS for n in (1, 2, 3, 6) if n % m.num_kv_heads == 0 or n == 1]
)
def test_owned_slices_add_up_to_the_whole(model: ModelConfig, num: int) -> None:
    for param in ModelSpec.of(resolve_model(model, seq_len=16)).params:
        rest = param.numel // param.shape[param.dim]
        owned = sum(p.size for i in range(num) for p in param.pieces(i, num) if p.copy == 0)
        assert owned * rest == param.numel
        held = sum(math.prod(param.local_shape(i, num)) for i in range(num))
        weights = sum(p.size / p.copies for i in range(num) for p in param.pieces(i, num)) * rest
        assert held >= param.numel
        assert weights == pytest.approx(param.numel)


def test_units_are_in_global_order_and_count_themselves() -> None:
    spec = ModelSpec.of(resolve_model(TINY, seq_len=16))
    assert [unit.name for unit in (spec.embedding, *spec.blocks, spec.head)] == [
        "embedding",
        "layers.0",
        "layers.1",
        "layers.2",
        "head",
    ]
    assert sum(unit.num_params for unit in (spec.embedding, *spec.blocks, spec.head)) == spec.num_params
    assert list(spec.by_name) == [param.name for param in spec.params]


def test_only_matrices_decay_and_only_what_reads_activations_counts_as_a_product() -> None:
    for model in MODELS:
        for param in ModelSpec.of(resolve_model(model, seq_len=16)).params:
            assert param.is_matmul == (len(param.shape) == 2 and not param.name.startswith("embedding.")), param.name
            assert param.decay == param.is_matmul, param.name


def test_gradients_are_partial_where_ranks_see_only_a_part() -> None:
    """Without sequence parallelism: the norms of heads alone. With it: everything outside the matrices."""
    model = resolve_model(replace(MODELS[2], qk_norm=True, qkv_bias=True), seq_len=16)
    plain = {param.name for param in ModelSpec.of(model).params if param.partial}
    assert plain == {f"layers.{i}.attention.{n}_norm.weight" for i, n in itertools.product(range(3), "qk")}
    sequence = {param.name for param in ModelSpec.of(model, sequence_parallel=True).params if param.partial}
    on_sequence = {
        f"layers.{i}.{name}"
        for i in range(3)
        for name in (
            "attention_norm.weight",
            "attention_norm.bias",
            "mlp_norm.weight",
            "mlp_norm.bias",
            "attention.out.bias",
            "mlp.down.bias",
        )
    }
    assert sequence == plain | on_sequence | {"embedding.positions.weight", "final_norm.weight", "final_norm.bias"}


def test_what_writes_into_the_residual_stream_starts_smaller() -> None:
    model = resolve_model(TINY, seq_len=16)
    for scaled in (True, False):
        spec = ModelSpec.of(replace(model, init_scale_residual=scaled))
        for param in spec.params:
            if not param.is_matmul:
                continue
            writes = param.name.endswith(("attention.out.weight", "mlp.down.weight"))
            assert param.std == pytest.approx(0.02 / math.sqrt(6) if writes and scaled else 0.02), param.name
