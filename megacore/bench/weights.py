"""The engine's weights under the plain model's names, so that both can start alike."""

from collections.abc import Iterator, Mapping
from types import MappingProxyType

from torch import Tensor

from megacore.config.schema import ModelConfig

ENDS = MappingProxyType(
    {
        "embedding.tokens.weight": "tok_embeddings.weight",
        "final_norm.weight": "norm.weight",
        "head.weight": "output.weight",
    }
)
IN_BLOCK = MappingProxyType(
    {
        "attention_norm.weight": "attention_norm.weight",
        "attention.out.weight": "attention.wo.weight",
        "mlp_norm.weight": "ffn_norm.weight",
        "mlp.down.weight": "feed_forward.w2.weight",
    }
)


def plain_weights(model: ModelConfig, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those of a whole model or of a stage of it, not split over ranks. The fused matrices are cut apart, as views."""
    return {name: part for pair in weights.items() for name, part in _plain(model, *pair)}


def _plain(model: ModelConfig, name: str, weight: Tensor) -> Iterator[tuple[str, Tensor]]:
    if name in ENDS:
        yield ENDS[name], weight
        return
    layers, number, inside = name.split(".", 2)
    block = f"{layers}.{number}"
    if inside == "attention.qkv.weight":
        heads = (model.num_heads, model.num_kv_heads, model.num_kv_heads)
        parts = weight.split([each * model.head_dim for each in heads])
        yield from zip((f"{block}.attention.{letter}.weight" for letter in ("wq", "wk", "wv")), parts, strict=True)
    elif inside == "mlp.gate_up.weight":
        yield from zip(
            (f"{block}.feed_forward.{letter}.weight" for letter in ("w1", "w3")), weight.chunk(2), strict=True
        )
    else:
        yield f"{block}.{IN_BLOCK[inside]}", weight
