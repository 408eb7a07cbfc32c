"""The baselines compute what they are said to compute: a comparison with a wrong program is worth nothing."""

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, distributed

from megacore.bench.baselines.ddp import ddp_step
from megacore.bench.baselines.dtensor_tp import PLANS, dtensor_step
from megacore.bench.baselines.plain_llama import PlainLlama, training_step
from megacore.bench.weights import plain_weights
from megacore.config.schema import ModelConfig, OptimConfig
from tests.oracle.model import PlainDecoder, random_weights
from tests.pool import WorkerPool

MODEL = ModelConfig(
    num_layers=2, hidden_size=32, ffn_hidden_size=48, num_heads=4, num_kv_heads=2, head_dim=8, vocab_size=64
)
OPTIM = OptimConfig(lr=1e-3)
SEQ_LEN = 16
STEPS = 3


def batch() -> tuple[Tensor, Tensor]:
    text = torch.randint(MODEL.vocab_size, (4, SEQ_LEN + 1), generator=torch.Generator().manual_seed(0))
    return text[:, :-1].contiguous(), text[:, 1:].contiguous()


def oracle_loss() -> float:
    tokens, labels = batch()
    return PlainDecoder(MODEL, random_weights(MODEL)).loss(tokens, labels).item()


def fused_parts(weights: dict[str, Tensor], layer: int) -> dict[str, Tensor]:
    """One layer's matrices, the fused ones cut apart."""
    rows = [heads * MODEL.head_dim for heads in (MODEL.num_heads, MODEL.num_kv_heads, MODEL.num_kv_heads)]
    wq, wk, wv = weights[f"layers.{layer}.attention.qkv.weight"].split(rows)
    gate, up = weights[f"layers.{layer}.mlp.gate_up.weight"].chunk(2)
    return {"wq": wq, "wk": wk, "wv": wv, "gate": gate, "up": up}


def test_the_plain_model_is_the_oracle() -> None:
    model = PlainLlama(MODEL, SEQ_LEN)
    model.load_state_dict(plain_weights(MODEL, random_weights(MODEL)))
    tokens, labels = batch()
    loss = torch.nn.functional.cross_entropy(model(tokens).flatten(0, 1), labels.flatten())
    assert loss.item() == pytest.approx(oracle_loss(), rel=1e-4)


def test_transformers_model_is_the_oracle() -> None:
    pytest.importorskip("transformers")
    from megacore.bench.baselines.hf_llama import hf_llama

    weights = random_weights(MODEL)
    renamed = {
        "embed_tokens.weight": weights["embedding.tokens.weight"],
        "norm.weight": weights["final_norm.weight"],
    }
    for layer in range(MODEL.num_layers):
        name, parts = f"layers.{layer}", fused_parts(weights, layer)
        renamed |= {f"{name}.self_attn.{letter[1]}_proj.weight": parts[letter] for letter in ("wq", "wk", "wv")}
        renamed |= {f"{name}.mlp.{part}_proj.weight": parts[part] for part in ("gate", "up")}
        renamed[f"{name}.self_attn.o_proj.weight"] = weights[f"{name}.attention.out.weight"]
        renamed[f"{name}.mlp.down_proj.weight"] = weights[f"{name}.mlp.down.weight"]
        renamed[f"{name}.input_layernorm.weight"] = weights[f"{name}.attention_norm.weight"]
        renamed[f"{name}.post_attention_layernorm.weight"] = weights[f"{name}.mlp_norm.weight"]
    model = hf_llama(MODEL, SEQ_LEN)
    whole = {f"model.model.{name}": weight for name, weight in renamed.items()}
    model.load_state_dict(whole | {"model.lm_head.weight": weights["head.weight"]})
    tokens, labels = batch()
    loss = torch.nn.functional.cross_entropy(model(tokens).flatten(0, 1), labels.flatten())
    assert loss.item() == pytest.approx(oracle_loss(), rel=1e-4)


def losses_of(make: Callable[[], Callable[[Tensor, Tensor], Tensor]], tokens: Tensor, labels: Tensor) -> list[float]:
    """Losses of a few steps from the weights of seed 0."""
    torch.manual_seed(0)
    step = make()
    return [step(tokens, labels).item() for _ in range(STEPS)]


def dtensor_losses(rank: int, plan: str) -> list[float]:
    mesh = distributed.device_mesh.init_device_mesh("cpu", (distributed.get_world_size(),))
    return losses_of(lambda: dtensor_step(MODEL, OPTIM, SEQ_LEN, mesh, plan), *batch())


def ddp_losses(rank: int) -> list[float]:
    tokens, labels = (x.chunk(2)[rank] for x in batch())
    return losses_of(lambda: ddp_step(MODEL, OPTIM, SEQ_LEN), tokens, labels)


def single_losses() -> list[float]:
    losses = losses_of(lambda: training_step(PlainLlama(MODEL, SEQ_LEN), OPTIM), *batch())
    assert all(later < earlier for earlier, later in itertools.pairwise(losses))
    return losses


@pytest.mark.parametrize("plan", PLANS)
def test_dtensor_trains_as_one_process(pool: WorkerPool, plan: str) -> None:
    for losses in pool.run(dtensor_losses, 2, plan):
        assert losses == pytest.approx(single_losses(), rel=1e-5)


def test_ddp_trains_as_one_process(pool: WorkerPool) -> None:
    ranks = pool.run(ddp_losses, 2)
    means = [sum(losses) / 2 for losses in zip(*ranks, strict=True)]
    assert means == pytest.approx(single_losses(), rel=1e-5)
