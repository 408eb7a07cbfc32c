"""Every layout starts from the same weights, and no rank makes more than it holds."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megacore.config.resolve import resolve_model
from megacore.config.schema import ModelConfig
from megacore.layout import Segment
from megacore.mesh.group import Group
from megacore.parallel import parameters
from megacore.parallel.parameters import ParameterMaker
from megacore.spec import ModelSpec, ParamSpec
from megacore.spec.params import columns, rows
from tests.parallel.ranks import CPU

MODEL = resolve_model(
    ModelConfig(
        num_layers=2,
        hidden_size=12,
        ffn_hidden_size=10,
        num_heads=4,
        num_kv_heads=2,
        head_dim=3,
        vocab_size=3,
        position="learned",
        qk_norm=True,
        qkv_bias=True,
    ),
    seq_len=8,
)
SPECS = ModelSpec.of(MODEL).by_name


def make_on(rank: int, size: int, specs: dict[str, ParamSpec], **more: Any) -> dict[str, Tensor]:
    """All parameters of one rank; nothing is sent, so the group needs no process behind it."""
    ranks = tuple(range(size))
    group = Group.single("tp") if size == 1 else Group("tp", ranks, rank, handle=object(), backend="gloo")  # type: ignore[arg-type]
    make = ParameterMaker(specs, group, **{"device": CPU, "dtype": torch.float64, "seed": 1, **more})
    return {name: make(name).detach() for name in specs}


@pytest.mark.parametrize("size", [2, 4])
def test_every_rank_draws_its_slice_of_the_same_weights(size: int) -> None:
    whole = make_on(0, 1, SPECS)
    for rank in range(size):
        for name, own in make_on(rank, size, SPECS).items():
            spec = SPECS[name]
            pieces = spec.pieces(rank, size)
            assert own.shape == spec.local_shape(rank, size)
            for piece in pieces:
                mine = own.narrow(spec.dim, piece.local, piece.size)
                assert torch.equal(mine, whole[name].narrow(spec.dim, piece.start, piece.size)), name


def test_weights_are_as_wide_as_the_spec_says_and_all_different() -> None:
    drawn = [tensor.view(-1) / SPECS[name].std for name, tensor in make_on(0, 1, SPECS).items() if tensor.dim() == 2]
    together = torch.cat(drawn)
    assert together.unique().numel() == together.numel()
    assert abs(together.mean()) < 4 / together.numel() ** 0.5
    assert together.std() == pytest.approx(1, rel=0.06)
    for name, tensor in make_on(0, 1, SPECS).items():
        if SPECS[name].init != "normal":
            assert (tensor == {"ones": 1.0, "zeros": 0.0}[SPECS[name].init]).all(), name


def test_the_seed_and_nothing_else_changes_them() -> None:
    first, again, other = make_on(0, 1, SPECS), make_on(0, 1, SPECS), make_on(0, 1, SPECS, seed=2)
    for name, spec in SPECS.items():
        assert torch.equal(first[name], again[name])
        assert torch.equal(first[name], other[name]) == (spec.init != "normal"), name


def test_narrower_formats_round_the_same_numbers() -> None:
    wide, narrow = make_on(0, 1, SPECS), make_on(0, 1, SPECS, dtype=torch.bfloat16)
    for name in SPECS:
        assert torch.equal(narrow[name], wide[name].to(torch.bfloat16)), name


@pytest.mark.parametrize("chunk", [1, 50, 10**6])
def test_the_size_of_chunks_changes_nothing(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    expected = make_on(1, 2, SPECS)
    monkeypatch.setattr(parameters, "CHUNK", chunk)
    got = make_on(1, 2, SPECS)
    assert all(torch.equal(got[name], expected[name]) for name in SPECS)


class Sizes(TorchDispatchMode):
    """Notes the bytes behind every tensor that an operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[int, int] = {}
        self.kept: list[Tensor] = []  # so that no address is used twice

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tensors(out):
            self.kept.append(tensor)
            self.seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return out


def tensors(tree: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


@pytest.mark.parametrize("split", [rows(Segment(1000)), columns(Segment(1000))])
def test_no_more_than_the_own_part_and_one_chunk_is_made(monkeypatch: pytest.MonkeyPatch, split: Any) -> None:
    shape = (1000, 64) if split.dim == 0 else (64, 1000)
    spec = ParamSpec("big", shape, split, std=1.0)
    monkeypatch.setattr(parameters, "CHUNK", 512)
    with Sizes() as sizes:
        own = make_on(3, 4, {"big": spec})["big"]
    whole_bytes = sizes.seen.pop(own.untyped_storage().data_ptr())
    assert whole_bytes == own.numel() * own.element_size() == spec.numel * 8 // 4
    assert max(sizes.seen.values()) <= 512 * 8
    assert len(sizes.seen) > 10


def test_on_the_meta_device_nothing_is_filled() -> None:
    huge = {"huge": ParamSpec("huge", (1 << 20, 1 << 20), std=1.0)}
    assert make_on(0, 1, huge, device=torch.device("meta"))["huge"].is_meta


def test_names_and_absent_parameters() -> None:
    make = ParameterMaker(SPECS, Group.single("tp"), CPU, torch.float32, seed=1)
    below = make.below("layers.1").below("attention")
    assert torch.equal(below.below("qkv")("weight"), make("layers.1.attention.qkv.weight"))
    assert below.below("qkv").optional("bias") is not None
    assert below.below("out").optional("bias") is None
    with pytest.raises(KeyError, match=r"layers\.1\.attention\.out\.bias"):
        below.below("out")("bias")
