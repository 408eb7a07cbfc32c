"""The bytes that a block keeps, by the table against what torch allocates."""

from dataclasses import replace
from itertools import product
from typing import cast

import pytest
import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megacore.config.resolve import resolve_model
from megacore.config.schema import ModelConfig
from megacore.mesh import collectives
from megacore.mesh.group import Group, Pending
from megacore.model import offload
from megacore.parallel.tensor import TensorParallel
from megacore.spec.activations import activation_bytes, host_activation_bytes
from tests.model.stages import LENGTH, TINY, allocated, microbatch, stage_of

MODES = ("none", "selective", "full")
MODELS = {
    "llama": TINY,
    "all heads alike": replace(TINY, num_kv_heads=4),
    "qwen3": replace(TINY, qk_norm=True, qkv_bias=True),
    "normed heads, no positions": replace(TINY, qk_norm=True, position="none"),
    "gpt2": replace(TINY, norm="layernorm", activation="gelu", position="learned", mlp_bias=True, dropout=0.1),
    "alibi": replace(TINY, position="alibi", activation="relu2"),
    "window": replace(TINY, sliding_window=5, activation="geglu"),
    "neox": replace(
        TINY, norm="layernorm", activation="gelu-erf", parallel_residual=True, rotary_fraction=0.4, mlp_bias=True
    ),
    "olmo2": replace(TINY, norm_placement="post", qk_norm=True, qk_norm_over="all", dropout=0.1),
    "no positions, heads normed at once": replace(TINY, qk_norm=True, qk_norm_over="all", position="none"),
    "both norms, parallel": replace(TINY, norm_placement="both", parallel_residual=True, norm_unit_offset=True),
    "norms behind, parallel": replace(TINY, norm_placement="post", parallel_residual=True, dropout=0.1),
}
GEMMA2 = replace(
    TINY, norm_placement="both", norm_unit_offset=True, activation="geglu", tie_embeddings=True, attention_softcap=2.0,
    logit_softcap=3.0, scale_embeddings=True, sliding_window=5, full_attention_every=2,
)  # fmt: skip
DROPPING = {
    "llama": replace(TINY, attention_dropout=0.1, dropout=0.1),
    "normed heads": replace(TINY, attention_dropout=0.1, qk_norm=True, position="none"),
    "no positions": replace(TINY, attention_dropout=0.1, position="none", num_kv_heads=4),
    "window": replace(TINY, attention_dropout=0.1, sliding_window=5),
    "alibi": replace(TINY, attention_dropout=0.1, position="alibi"),
    "heads normed at once": replace(TINY, attention_dropout=0.1, qk_norm=True, qk_norm_over="all"),
    "gemma2": GEMMA2,
    "gemma2 with dropout": replace(GEMMA2, attention_dropout=0.1, position="none"),
}


def kept(
    model: ModelConfig, dtype: torch.dtype, size: int, recompute: str, documents: bool, tp: TensorParallel | None = None
) -> float:
    """Bytes per block: what two more blocks add to a stage's forward."""

    def of_stage(num_layers: int) -> int:
        stage = stage_of(replace(model, num_layers=num_layers), dtype, tp, recompute, last=False)
        inputs = microbatch(model, 0, size, documents)
        return allocated(lambda: stage(inputs))[0]

    return (of_stage(3) - of_stage(1)) / 2


def scalars(model: ModelConfig) -> int:
    """Bytes of the factors on a block's scores, which torch keeps as tensors."""
    return 16 if model.attention_softcap else 8 if model.attention_dropout else 0


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of every tensor that is offloaded, however small."""
    gone: list[int] = []
    begin = offload._Trip.__init__

    def noted(trip: offload._Trip, tensor: Tensor) -> None:
        begin(trip, tensor)
        gone.append(trip.host.nbytes)

    monkeypatch.setattr(offload, "MIN_BYTES", 0)
    monkeypatch.setattr(offload._Trip, "__init__", noted)
    return gone


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("name", [*MODELS, *(f"{name}, dropout" for name in DROPPING)])
def test_what_is_offloaded_leaves_nothing_behind(sent: list[int], name: str, size: int) -> None:
    """All that torch allocates for backward are the copies, which on the CPU are in the same memory."""
    given = MODELS[name] if name in MODELS else DROPPING[name.removesuffix(", dropout")]
    model = resolve_model(given, LENGTH)
    first, second, third = (
        host_activation_bytes(model, LENGTH, size, dtype_bytes=8, layer=layer) for layer in range(3)
    )
    assert activation_bytes(model, LENGTH, size, recompute="offload", dtype_bytes=8) == 0
    assert kept(model, torch.float64, size, "offload", False) == (second + third) / 2 + scalars(model)
    sent.clear()
    stage_of(replace(model, num_layers=2), torch.float64, None, "offload", last=False)(microbatch(model, 0, size))
    assert sum(sent) == first + second


def test_units_keep_their_inputs() -> None:
    model = resolve_model(TINY, LENGTH)
    whole, sharded = (activation_bytes(model, LENGTH, 2, 2, cut, "offload", by_unit=True) for cut in (False, True))
    assert whole == 2 * LENGTH * TINY.hidden_size * 2 == 2 * sharded


@pytest.mark.parametrize("recompute", MODES)
@pytest.mark.parametrize("name", MODELS)
def test_every_byte_is_accounted_for(name: str, recompute: str) -> None:
    model = resolve_model(MODELS[name], LENGTH)
    for dtype, size, documents in ((torch.float64, 2, False), (torch.float32, 1, True)):
        expected = activation_bytes(model, LENGTH, size, recompute=recompute, dtype_bytes=dtype.itemsize)
        assert kept(model, dtype, size, recompute, documents) == expected


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("name", DROPPING)
def test_the_explicit_path_of_attention(name: str, size: int) -> None:
    model = resolve_model(DROPPING[name], LENGTH)
    for recompute, dtype in product(MODES, (torch.float32, torch.bfloat16)):
        of_layers = [
            activation_bytes(model, LENGTH, size, recompute=recompute, dtype_bytes=dtype.itemsize, layer=layer)
            for layer in (1, 2)
        ]
        assert kept(model, dtype, size, recompute, False) == sum(of_layers) / 2 + scalars(model), (recompute, dtype)


class Echo:
    """Collectives over two ranks that hold the same: their results have the real ones' sizes, and no thread of a
    backend holds on to anything."""

    @staticmethod
    def all_reduce(x: Tensor, group: Group, op: str) -> Pending:
        return Pending.done(x)

    @staticmethod
    def all_gather(x: Tensor, group: Group, dim: int, sizes: list[int], out: None) -> Pending:
        return Pending.done(torch.cat([x, x], dim))

    @staticmethod
    def reduce_scatter(x: Tensor, group: Group, dim: int, sizes: list[int], out: None) -> Pending:
        return Pending.done(x.chunk(2, dim)[0].clone())


@pytest.mark.parametrize("recompute", MODES)
@pytest.mark.parametrize("name", ["llama", "gpt2", "neox", "olmo2", "norms behind, parallel"])
def test_what_a_rank_of_two_keeps(monkeypatch: pytest.MonkeyPatch, name: str, recompute: str) -> None:
    monkeypatch.setattr(collectives, "_backend", lambda group: Echo)
    group = Group("tp", (0, 1), 0, cast(ProcessGroup, object()))
    model = resolve_model(MODELS[name], LENGTH)
    for sequence, regather in ((False, False), (True, False), (True, True)):
        tp = TensorParallel(group, sequence, regather)
        expected = activation_bytes(model, LENGTH, 2, 2, sequence, recompute, 8, regather)
        assert kept(model, torch.float64, 2, recompute, False, tp) == expected, (sequence, regather)


def test_against_the_published_formula() -> None:
    """GPT-3 in 16 bits (Korthikanti et al. 2022, table 2): 34 s b h less what differs, item by item."""
    gpt3 = ModelConfig(
        num_layers=96, hidden_size=12288, num_heads=96, vocab_size=51200, norm="layernorm", activation="gelu",
        position="learned", dropout=0.1,
    )  # fmt: skip
    model, s, b, h = resolve_model(gpt3, 2048), 2048, 1, 12288
    tokens = s * b
    wider_masks = 2 * 3 * tokens * h  # theirs take one byte, ours four
    statistics = 4 * tokens * 4
    for recompute, logarithms in (("none", 96 * tokens * 4), ("selective", 0)):
        ours = activation_bytes(model, s, b, recompute=recompute)
        assert ours == 34 * tokens * h + wider_masks + statistics + logarithms
    assert activation_bytes(model, s, b, recompute="full") == 2 * tokens * h
    with_tp = activation_bytes(model, s, b, tp=8, recompute="selective")
    assert with_tp == tokens * h * (10 + 24 // 8) + wider_masks + statistics
    split = activation_bytes(model, s, b, 8, True, "selective", regather_inputs=True)
    assert split == (34 * tokens * h + wider_masks + statistics) / 8


def test_less_is_kept_step_by_step() -> None:
    for model in (*MODELS.values(), *DROPPING.values()):
        none, selective, full = (activation_bytes(resolve_model(model, 64), 64, 2, recompute=mode) for mode in MODES)
        assert full < selective < none
