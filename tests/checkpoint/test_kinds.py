"""Every optimizer, format of state and of weights: on the same layout not a bit is lost, on another the same state."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megacore.checkpoint.find import folder_of
from megacore.checkpoint.read import Checkpoint
from megacore.checkpoint.store import open_store
from megacore.config import updates
from megacore.config.optimizers import optimizer_names
from megacore.optim.quantise import BLOCK, codebook, decode
from megacore.spec import ModelSpec
from tests.checkpoint.common import config_of, digests, read_rank, world_of, write_rank
from tests.pool import WorkerPool

NUM, MORE = 3, 3
MULTIPLES = ("model.hidden_size=32", "model.head_dim=8")
"""Heads are whole blocks of 64: copies of kv heads have the same codes."""
SHARDED = {"tp": 2, "dp": 2, "zero": 2}
OTHER = {"dp": 2, "zero": 3}
FP32, BF16, FP16 = (f"precision.dtype={name}" for name in ("fp32", "bf16", "fp16"))
OPTIMIZERS = {name: (f"optim.name={name}", "optim.lr=0.001") for name in optimizer_names()}
FORMATS = {
    "bf16 moments": (FP32, "optim.state_dtype=bf16"),
    "bf16 moments by chance": (FP32, "optim.state_dtype=bf16", "optim.state_rounding=stochastic"),
    "int8": (FP32, "optim.state_dtype=int8", *MULTIPLES),
    "int8, 1 kv head": (FP32, "optim.state_dtype=int8", "model.num_kv_heads=1", *MULTIPLES),
    "int8 muon": (FP32, "optim.name=muon", "optim.state_dtype=int8", *MULTIPLES),
    "bf16 weights": (BF16,),
    "split": (BF16, "precision.master=split", "optim.name=lion"),
    "no master": (BF16, "precision.master=none", "optim.state_dtype=bf16"),
    "fp16": (FP16, "precision.loss_scale_every=2"),
    "adagc": ("optim.clip=adagc", "optim.adagc_warmup_steps=1"),
    "offloaded": (FP32, "optim.offload=cpu"),
    "in files": (FP32, "optim.offload=nvme"),
    "tied, came": (FP32, "optim.name=came", "model.tie_embeddings=true"),
}
QUICK = ("adafactor", "muon", "int8, 1 kv head", "split", "fp16", "in files")
ALL = OPTIMIZERS | FORMATS
CASES = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in ALL]


def words_of(name: str, folder: Path) -> tuple[str, ...]:
    return (*ALL[name], *((f"optim.offload_folder={folder}/state",) if name == "in files" else ()))


def without_codes(found: dict[str, str]) -> dict[str, str]:
    """Without what is cut by the layout: codes of 8 bits and their scales."""
    return {key: digest for key, digest in found.items() if "@tp" not in key}


@pytest.mark.parametrize("name", CASES)
def test_save_and_go_on(pool: WorkerPool, tmp_path: Path, name: str) -> None:
    words, folder = words_of(name, tmp_path), str(tmp_path / "source")

    def run(function: Any, layout: dict[str, int], *args: Any) -> list[Any]:
        world = world_of(layout)
        return pool.run(function, world, world, config_of(words, layout), *args, NUM, MORE, timeout_s=120)

    written = run(write_rank, SHARDED, folder)
    assert written[0][1] == ["", ""]
    curve, expected = written[0][0], digests(folder, NUM)
    assert len({loss for loss, _ in curve}) == MORE, "nothing moved, so nothing was compared"
    for rank in run(read_rank, SHARDED, [folder], str(tmp_path / "same")):
        ((ours, again, difference),) = rank
        assert ours == curve and difference == 0.0
        assert again in ({}, expected)
    exact = not any("precision" in word for word in words)
    for rank in run(read_rank, OTHER, [folder], str(tmp_path / "other")):
        ((ours, again, _),) = rank
        assert without_codes(again) in ({}, without_codes(expected))
        for got, wanted in zip(ours, curve, strict=True):
            assert got == pytest.approx(wanted, rel=1e-7 if exact else 5e-2)


def checkpoint_in(folder: str) -> Checkpoint:
    return Checkpoint.of(open_store(folder).child(folder_of(NUM)))


@pytest.mark.parametrize(("start", "expected"), [(4194304, (2097152.0, 2)), (1024, (2048.0, 1))])
def test_the_loss_scale_and_its_count_survive(
    pool: WorkerPool, tmp_path: Path, start: int, expected: tuple[float, int]
) -> None:
    """One overflow and two steps without; or three without, after two of which the scale is doubled."""
    every = 5 if expected[1] == 2 else 2
    words = (FP16, f"precision.loss_scale_start={start}", f"precision.loss_scale_every={every}")
    config, folder = config_of(words, {"dp": 1}), str(tmp_path)
    ((curve, _),) = pool.run(write_rank, 1, 1, config, folder, NUM, MORE)
    checkpoint = checkpoint_in(folder)
    scale, good = (checkpoint.read_key(f"state/loss_scale/{name}", (), ()).item() for name in ("scale", "good_steps"))
    assert (scale, good) == expected
    ((ours, again, _),) = pool.run(read_rank, 1, 1, config, [folder], str(tmp_path / "own"), NUM, MORE)[0]
    assert again == digests(folder, NUM)
    assert repr(ours) == repr(curve), "nan, where a step overflows, is nan"


def moment(checkpoint: Checkpoint, name: str, tp: int) -> dict[str, Tensor]:
    """What an 8-bit moment stands for, as global tensors."""
    codes = codebook(signed=name == "first", device=torch.device("cpu"))
    found = {}
    for spec in ModelSpec.of(checkpoint.model).params:
        whole = torch.full(spec.shape, torch.nan)
        for rank in range(tp):
            numel, key = spec.local_numel(rank, tp), f"{spec.name}@tp{rank}of{tp}"
            data = checkpoint.read_key(f"optim/{name}/{key}", (0,), (numel,))
            scale = checkpoint.read_key(f"optim/{name}.scale/{key}", (0,), (-(-numel // BLOCK),))
            local = decode(data, scale, codes, torch.float32).view(spec.local_shape(rank, tp))
            for piece in spec.pieces(rank, tp):
                part = local.narrow(spec.dim, piece.local, piece.size)
                whole.narrow(spec.dim, piece.start, piece.size).copy_(part)
        assert not whole.isnan().any(), spec.name
        found[spec.name] = whole
    return found


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_8_bit_moments_of_another_tp(pool: WorkerPool, tmp_path: Path, kv_heads: int) -> None:
    words = (*ALL["int8"], f"model.num_kv_heads={kv_heads}")
    folder, own = str(tmp_path / "source"), str(tmp_path / "own")
    pool.run(write_rank, 4, 4, config_of(words, SHARDED), folder, NUM, 0)
    pool.run(read_rank, 1, 1, config_of(words, {"dp": 1}), [folder], own, NUM, 0)
    for name in ("first", "second"):
        before, after = moment(checkpoint_in(folder), name, 2), moment(checkpoint_in(own), name, 1)
        for param, expected in before.items():
            error = (after[param] - expected).norm() / expected.norm().clamp(min=1e-30)
            assert error < 0.03, (name, param)


def test_blocks_have_one_size() -> None:
    assert BLOCK == updates.BLOCK
