"""One process computes what an independent plain-PyTorch decoder computes: gradients per parameter, in float64."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.engine.common import assemble, batch_of, built_rank, parts, run_config, step_of, worst_difference
from tests.oracle.model import PlainDecoder, random_weights

LONGROPE = (
    "model.rope_scaling.type=longrope",
    "model.rope_scaling.factor=4",
    "model.rope_scaling.original_seq_len=16",
    "model.rope_scaling.short_factor=[1.0, 1.1, 1.3]",
    "model.rope_scaling.long_factor=[1.5, 2.5, 5.0]",
)
NEOX = ("model.family=gpt-neox", "model.head_dim=8")
OLMO2 = ("model.family=olmo2",)
GEMMA2 = (
    "model.family=gemma2",
    "model.sliding_window=5",
    "model.attention_softcap=1.5",
    "model.logit_softcap=6",
    "model.attention_scale_dim=10",
)
FEATURES = {
    "llama": (),
    "gpt2": ("model.family=gpt2",),
    "qwen3": ("model.family=qwen3", "model.tie_embeddings=true"),
    "multi-query": ("model.num_kv_heads=1",),
    "all heads": ("model.num_kv_heads=4", "model.head_dim=10"),
    "one head": ("model.num_heads=1", "model.num_kv_heads=1"),
    "geglu": ("model.activation=geglu", "model.mlp_bias=true"),
    "relu2": ("model.activation=relu2", "model.norm=layernorm"),
    "gelu": ("model.activation=gelu", "model.qkv_bias=true", "model.attention_out_bias=true"),
    "alibi": ("model.position=alibi", "model.num_heads=6", "model.num_kv_heads=3"),
    "no positions": ("model.position=none",),
    "learned positions": ("model.position=learned", "model.max_positions=20"),
    "window": ("model.sliding_window=5",),
    "window as long as the sequence": ("model.sliding_window=16",),
    "window with alibi": ("model.sliding_window=3", "model.position=alibi"),
    "documents": ("data.reset_attention=true",),
    "documents, window, alibi": ("data.reset_attention=true", "model.sliding_window=4", "model.position=alibi"),
    "tied": ("model.tie_embeddings=true",),
    "smoothing": ("train.label_smoothing=0.1",),
    "z-loss": ("train.z_loss=0.01", "train.label_smoothing=0.05"),
    "linear scaling": ("model.rope_scaling.type=linear", "model.rope_scaling.factor=2"),
    "ntk scaling": ("model.rope_scaling.type=ntk", "model.rope_scaling.factor=4"),
    "yarn scaling": (
        "model.rope_scaling.type=yarn",
        "model.rope_scaling.factor=4",
        "model.rope_scaling.original_seq_len=64",
        "model.head_dim=16",
    ),
    "llama3 scaling": (
        "model.rope_scaling.type=llama3",
        "model.rope_scaling.factor=8",
        "model.rope_scaling.original_seq_len=32",
        "model.head_dim=16",
    ),
    "longrope, short": LONGROPE,
    "longrope, long": (*LONGROPE, "model.rope_scaling.original_seq_len=12"),
    "longrope, by the positions of each sample": (
        *LONGROPE,
        "model.rope_scaling.original_seq_len=12",
        "data.reset_positions=true",
    ),
    "neox": NEOX,
    "neox, another rotary part, post norms": (*NEOX, "model.rotary_fraction=0.6", "model.norm_placement=post"),
    "olmo2": OLMO2,
    "olmo2, unit offset, one kv head": (*OLMO2, "model.norm_unit_offset=true", "model.num_kv_heads=1"),
    "gemma2": GEMMA2,
    "gemma2, other ends": (
        *GEMMA2,
        "model.full_attention_every=0",
        "model.sliding_window_from=2",
        "model.parallel_residual=true",
        "model.qk_norm=true",
        "data.reset_attention=true",
        "train.label_smoothing=0.1",
        "train.z_loss=0.01",
        "model.logit_softcap=2",
    ),
    "gpipe": ("parallel.schedule=gpipe",),
    "one microbatch": ("train.micro_batch_size=8",),
    "one layer": ("model.num_layers=1",),
}


@pytest.mark.parametrize("name", FEATURES)
def test_gradients_are_those_of_an_independent_model(name: str) -> None:
    config = run_config(1, "optim.clip_grad=0", *FEATURES[name])
    built = built_rank(0, 1, config)
    weights = random_weights(config.model)
    for name_of, parameter in built.stages[0].named_parameters():
        parameter.data.copy_(weights[name_of])
    loss, norm = step_of(built, step=1)
    oracle, whole, t = PlainDecoder(config.model, weights), batch_of(config, 1), config.train
    positions = whole.position_bs
    arguments = (whole.token_bs, whole.label_bs, t.label_smoothing, t.z_loss, positions, whole.document_bs)
    expected = oracle.gradients(*arguments)
    plain_loss = oracle.loss(whole.token_bs, whole.label_bs, t.label_smoothing, 0.0, positions, whole.document_bs)
    assert loss == pytest.approx(plain_loss.item(), rel=1e-12)  # what is reported leaves the z-loss out
    assert norm == pytest.approx(sum(grad.square().sum().item() for grad in expected.values()) ** 0.5, rel=1e-12)
    difference, where = worst_difference(assemble(config, [parts(built, "grads")]), expected)
    assert difference < 1e-10, where


@pytest.mark.parametrize("name", ["gemma2", "olmo2", "neox", "longrope, long"])
def test_logits_are_those_of_an_independent_model(name: str) -> None:
    """What generation and comparisons with other libraries read."""
    config = run_config(1, *FEATURES[name])
    built, whole = built_rank(0, 1, config), replace(batch_of(config, 1), training=False)
    weights = random_weights(config.model)
    for name_of, parameter in built.stages[0].named_parameters():
        parameter.data.copy_(weights[name_of])
    logits = built.stages[0](whole, logits=True)
    assert isinstance(logits, Tensor)
    expected = PlainDecoder(config.model, weights).forward(whole.token_bs)
    torch.testing.assert_close(logits.view(expected.shape), expected, rtol=1e-11, atol=1e-11)


def test_evaluation_reports_the_plain_cross_entropy() -> None:
    """Without smoothing, z-loss and dropout, so that validation losses of different runs can be compared."""
    config = run_config(1, "train.label_smoothing=0.2", "train.z_loss=0.1", "model.dropout=0.5")
    built, whole = built_rank(0, 1, config), batch_of(config, 1)
    total, count = built.trainer.evaluate([replace(whole, training=False)]).tolist()[:2]
    weights = {name: parameter.detach() for name, parameter in built.stages[0].named_parameters()}
    plain = replace(config.model, dropout=0.0)
    assert total / count == pytest.approx(PlainDecoder(plain, weights).loss(whole.token_bs, whole.label_bs).item())
