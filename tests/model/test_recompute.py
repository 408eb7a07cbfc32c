"""Recomputation changes memory, collectives and time as the papers say, and not one bit of any gradient."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor

from megacore.config.resolve import resolve_model
from megacore.config.schema import ModelConfig
from megacore.mesh.group import CommLog
from megacore.model.recompute import Save, recomputed
from megacore.model.stage import Loss, Stage
from megacore.parallel.tensor import TensorParallel
from megacore.spec.activations import activation_bytes
from tests.model.stages import LENGTH, TINY, allocated, microbatch, stage_of
from tests.parallel.ranks import surroundings
from tests.pool import WorkerPool

AGAIN = ("selective", "full", "offload")
DROPPING = replace(TINY, dropout=0.1, attention_dropout=0.1)
MODELS = {
    "llama": TINY,
    "qwen3": replace(TINY, qk_norm=True, qkv_bias=True, dropout=0.1),
    "gpt2": replace(
        TINY, norm="layernorm", activation="gelu", position="learned", dropout=0.1, attention_dropout=0.1,
        num_kv_heads=4, qkv_bias=True, attention_out_bias=True, mlp_bias=True,
    ),
    "alibi": replace(TINY, position="alibi", activation="relu2", attention_dropout=0.2),
    "window": replace(TINY, sliding_window=5, activation="geglu"),
    "neox": replace(
        TINY, norm="layernorm", activation="gelu-erf", parallel_residual=True, rotary_fraction=0.4, num_kv_heads=4,
        qkv_bias=True, attention_out_bias=True, mlp_bias=True, dropout=0.1,
    ),
    "olmo2": replace(TINY, norm_placement="post", qk_norm=True, qk_norm_over="all", dropout=0.1),
    "gemma2": replace(
        TINY, norm_placement="both", norm_unit_offset=True, activation="geglu", tie_embeddings=True, dropout=0.1,
        attention_softcap=2.0, logit_softcap=3.0, scale_embeddings=True, sliding_window=5, full_attention_every=2,
    ),
    "norms behind, parallel": replace(DROPPING, norm_placement="post", parallel_residual=True),
    "all at once": replace(DROPPING, qk_norm=True, sliding_window=7, tie_embeddings=True),
}  # fmt: skip


def forward(stage: Stage, model: ModelConfig, number: int, documents: bool) -> Tensor:
    loss = stage(microbatch(model, number, documents=documents))
    assert isinstance(loss, Loss)
    return loss.objective


def results(
    model: ModelConfig, dtype: torch.dtype, recompute: str, tp: TensorParallel | None = None, documents: bool = False
) -> dict[str, Tensor]:
    """Losses and gradients of three microbatches, two of them under way at once, the last with a split backward."""
    stage = stage_of(model, dtype, tp, recompute)
    first, second = forward(stage, model, 0, documents), forward(stage, model, 1, documents)
    first.backward()
    third = forward(stage, model, 2, documents)
    second.backward()
    with stage.tp.wgrad.put_off() as later:
        third.backward()
    assert later
    for work in later:
        work()
    gradients = {name: param.grad for name, param in stage.named_parameters() if param.grad is not None}
    return {"losses": torch.stack([first, second, third]).detach(), **gradients}


def different(ours: dict[str, Tensor], expected: dict[str, Tensor]) -> list[str]:
    """Whose bits differ."""
    assert ours.keys() == expected.keys()
    assert all(tensor.any() for tensor in expected.values()), "zeros prove nothing"
    return [name for name, tensor in expected.items() if not torch.equal(ours[name], tensor)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_the_same_bits(name: str, dtype: torch.dtype) -> None:
    for documents in (False, True):
        expected = results(MODELS[name], dtype, "none", documents=documents)
        for recompute in AGAIN:
            assert not different(results(MODELS[name], dtype, recompute, documents=documents), expected), recompute


def differences_of_rank(rank: int, world: int, sequence: bool, regather: bool) -> list[object]:
    tp = surroundings(rank, world, sequence, regather)
    found: list[object] = []
    for (name, model), dtype in product(MODELS.items(), (torch.float64, torch.float32)):
        expected = results(model, dtype, "none", tp, documents=True)
        for recompute in AGAIN:
            if wrong := different(results(model, dtype, recompute, tp, documents=True), expected):
                found.append((name, dtype, recompute, wrong))
    return found


@pytest.mark.parametrize(("sequence", "regather"), [(False, False), (True, False), (True, True)])
def test_gradients_are_the_same_bits_on_two_ranks(pool: WorkerPool, sequence: bool, regather: bool) -> None:
    assert pool.run(differences_of_rank, 2, 2, sequence, regather) == [[], []]


@pytest.mark.parametrize("recompute", AGAIN)
def test_a_stage_in_the_middle(recompute: str) -> None:
    """Its input's gradient is the same bits too, whether or not that input is a leaf."""
    x = torch.randn(2 * LENGTH, TINY.hidden_size, dtype=torch.float64)
    gradients = []
    for mode in ("none", recompute):
        stage = stage_of(DROPPING, torch.float64, recompute=mode, first=False, last=False)
        leaf = x.clone().requires_grad_()
        for given in (leaf, leaf * 2):
            y = stage(microbatch(TINY, 0), given)
            assert isinstance(y, Tensor)
            y.backward(x.cos())
        assert leaf.grad is not None
        gradients.append(leaf.grad)
    assert torch.equal(*gradients)


def seen_by_rank(rank: int, world: int, recompute: str, sequence: bool, regather: bool) -> list[tuple[str, int]]:
    log = CommLog()
    stage = stage_of(DROPPING, torch.float64, surroundings(rank, world, sequence, regather, log), recompute)
    objective = forward(stage, DROPPING, 0, False)
    log.clear()
    objective.backward()
    return [(record.operation, record.num_elements) for record in log]


@pytest.mark.parametrize("recompute", ["none", *AGAIN])
@pytest.mark.parametrize(("sequence", "regather"), [(False, False), (True, False), (True, True)])
def test_collectives_in_backward(pool: WorkerPool, recompute: str, sequence: bool, regather: bool) -> None:
    """A block that is made again repeats its forward's collectives but the last; the core of attention has none."""
    activation = 2 * LENGTH * TINY.hidden_size
    summed = ("all_reduce", activation)
    if sequence:
        gather, scatter = ("all_gather", activation), ("reduce_scatter", activation)
        column, row, repeated = [gather, scatter] if regather else [scatter], [gather], [gather, scatter, gather]
        embedding = [gather]
    else:
        column, row, repeated, embedding = [summed], [], [summed], []
    layer = (repeated if recompute == "full" else []) + (row + column) * 2
    expected = column + layer * TINY.num_layers + embedding  # the head is a column-parallel layer
    assert pool.run(seen_by_rank, 2, 2, recompute, sequence, regather) == [expected] * 2


@pytest.mark.parametrize(("recompute", "num_blocks"), [("selective", 8), ("full", 7)])
def test_the_most_that_is_held_at_once(recompute: str, num_blocks: int) -> None:
    """In all of a step a block's share is saved in every block; of those made again whole, one is there as without.

    (The core of attention is small again by the time that the last block has come back to it.)
    """
    model = replace(TINY, num_layers=8)

    def peak(mode: str) -> int:
        stage, inputs = stage_of(model, torch.float64, recompute=mode, last=False), microbatch(model, 0, 4)

        def step() -> None:
            y = stage(inputs)
            assert isinstance(y, Tensor)
            y.backward(y.detach())

        return allocated(step)[1]

    none, less = (
        activation_bytes(resolve_model(model, LENGTH), LENGTH, 4, recompute=mode, dtype_bytes=8)
        for mode in ("none", recompute)
    )
    assert peak("none") - peak(recompute) == pytest.approx(num_blocks * (none - less), rel=0.05)


@pytest.mark.parametrize("recompute", AGAIN)
def test_nothing_is_kept_where_no_backward_follows(recompute: str) -> None:
    stage, inputs = stage_of(TINY, torch.float64, recompute=recompute, last=False), microbatch(TINY, 0)
    with torch.no_grad():
        y = stage(inputs)
        assert isinstance(y, Tensor)
        assert not y.requires_grad
        assert allocated(lambda: stage(inputs))[0] == y.nbytes


def test_a_second_run_that_saves_something_else_is_noticed() -> None:
    def again(x: Tensor, save: Save) -> None:
        save(x[:1])

    y = recomputed(lambda x: x.exp(), again, torch.ones(3, requires_grad=True))
    with pytest.raises(AssertionError, match="saved at first"):
        y.sum().backward()


def test_what_was_made_again_is_used_once() -> None:
    y = recomputed(lambda x: x.exp(), lambda x, save: x.exp(), torch.ones(3, requires_grad=True))
    y.sum().backward(retain_graph=True)
    with pytest.raises(AssertionError, match="wanted twice"):
        y.sum().backward()
