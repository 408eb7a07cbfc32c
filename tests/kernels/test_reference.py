"""The references against their definitions, written in another way."""

import math

import pytest
import torch

from megacore.kernels import reference


def test_rope_turns_pairs_as_complex_numbers() -> None:
    torch.manual_seed(0)
    x, angle = torch.randn(2, 5, 3, 8, dtype=torch.float64), torch.randn(2, 5, 1, 4, dtype=torch.float64)
    turned = torch.complex(x[..., :4], x[..., 4:]) * torch.polar(torch.ones_like(angle), angle)
    got = reference.rope(x, angle.cos(), angle.sin())
    torch.testing.assert_close(got, torch.cat((turned.real, turned.imag), -1), rtol=1e-13, atol=1e-13)


def test_activations_number_by_number() -> None:
    gates, ups = [-3.0, -0.5, 0.0, 0.7, 4.0], [1.5, -2.0, 3.0, -0.25, 0.5]
    x = torch.tensor([*gates, *ups], dtype=torch.float64)

    def gelu(g: float) -> float:
        return 0.5 * g * (1 + math.tanh(math.sqrt(2 / math.pi) * (g + 0.044715 * g**3)))

    assert reference.swiglu(x).tolist() == pytest.approx([g / (1 + math.exp(-g)) * u for g, u in zip(gates, ups)])
    assert reference.geglu(x).tolist() == pytest.approx([gelu(g) * u for g, u in zip(gates, ups)])
    assert reference.gelu(x).tolist() == pytest.approx([gelu(g) for g in gates + ups])
    assert reference.relu2(x).tolist() == pytest.approx([max(0.0, g) ** 2 for g in gates + ups])


def test_attention_query_by_query() -> None:
    torch.manual_seed(0)
    b, n, m, s, d, scale = 2, 4, 2, 6, 3, 0.4
    q, k, v = (torch.randn(b, heads, s, d, dtype=torch.float64) for heads in (n, m, m))
    document = torch.tensor([[0, 0, 0, 1, 1, 1], [0, 1, 1, 1, 1, 2]])
    mask = document[:, None, :, None] == document[:, None, None, :]
    keep = (torch.rand(b, n, s, s) < 0.6).double() / 0.6
    got = reference.attention(q, k, v, mask, True, scale, keep)
    for i in range(b):
        for head in range(n):
            shared = head // (n // m)  # neighbours share a key/value head
            for query in range(s):
                seen = [key for key in range(query + 1) if document[i, key] == document[i, query]]
                weights = [math.exp(scale * float(q[i, head, query] @ k[i, shared, key])) for key in seen]
                want = sum(
                    w / sum(weights) * float(keep[i, head, query, key]) * v[i, shared, key]
                    for w, key in zip(weights, seen)
                )
                torch.testing.assert_close(got[i, head, query], want, rtol=1e-12, atol=1e-12)


def test_norms_give_unit_rows() -> None:
    x = torch.randn(4, 50, dtype=torch.float64) * 3 + 1
    one = torch.ones(50, dtype=torch.float64)
    rms = reference.rms_norm(x, one, 0.0)
    torch.testing.assert_close(rms.square().mean(-1), torch.ones(4, dtype=torch.float64))
    torch.testing.assert_close(rms / rms[:, :1], x / x[:, :1])
    layer = reference.layer_norm(x, 2 * one, 3 * one, 0.0)
    torch.testing.assert_close(layer.mean(-1), torch.full((4,), 3.0, dtype=torch.float64))
    torch.testing.assert_close(layer.std(-1, correction=0), torch.full((4,), 2.0, dtype=torch.float64))
