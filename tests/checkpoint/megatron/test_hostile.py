"""What lies in a checkpoint of Megatron-LM is never run, and what does not fit is said."""

import argparse
import io
import pickle
import pickletools
import shutil
import struct
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from megacore.checkpoint.megatron.archive import read_archive
from megacore.checkpoint.megatron.arguments import REFUSED, model_of
from megacore.checkpoint.megatron.source import MegatronSource
from megacore.checkpoint.megatron.unpickle import Record, load
from megacore.checkpoint.store import LocalStore
from megacore.exits import run
from megacore.spec import ModelSpec

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

ARGS = {
    "num_layers": 2,
    "hidden_size": 8,
    "ffn_hidden_size": 12,
    "num_attention_heads": 2,
    "normalization": "RMSNorm",
    "swiglu": True,
    "add_bias_linear": False,
    "untie_embeddings_and_output_weights": True,
    "position_embedding_type": "rope",
    "max_position_embeddings": 16,
    "padded_vocab_size": 16,
    "tensor_model_parallel_size": 1,
    "pipeline_model_parallel_size": 1,
}
LAYER = {
    "input_layernorm.weight": (8,),
    "self_attention.query_key_value.weight": (24, 8),
    "self_attention.dense.weight": (8, 8),
    "post_attention_layernorm.weight": (8,),
    "mlp.dense_h_to_4h.weight": (24, 8),
    "mlp.dense_4h_to_h.weight": (8, 12),
}


def older_model() -> dict[str, Any]:
    """The nested names of Megatron-LM before Megatron-Core."""
    generator = torch.Generator().manual_seed(0)
    encoder = {
        f"layers.{layer}.{name}": torch.randn(shape, generator=generator)
        for layer in range(2)
        for name, shape in LAYER.items()
    }
    encoder["final_layernorm.weight"] = torch.randn(8, generator=generator)
    words = {"word_embeddings": {"weight": torch.randn(16, 8, generator=generator)}}
    head = {"weight": torch.randn(16, 8, generator=generator)}
    return {"language_model": {"embedding": words, "encoder": encoder, "output_layer": head}}


def write(folder: Path, args: dict[str, Any] | None = None, **more: Any) -> Path:
    """A legacy checkpoint of one rank; its file."""
    place = folder / "iter_0000003" / "mp_rank_00"
    place.mkdir(parents=True)
    (folder / "latest_checkpointed_iteration.txt").write_text("3\n")
    state = {"args": argparse.Namespace(**(ARGS | (args or {}))), "checkpoint_version": 3.0, "model": older_model()}
    torch.save(state | more, place / "model_optim_rng.pt")
    return place / "model_optim_rng.pt"


class Calls:
    """Pickles as a call of a function."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> Any:
        return self.call


def hostile_pickles(canary: Path) -> dict[str, bytes]:
    import builtins
    import importlib
    import os
    import subprocess

    touch = f"touch {canary}"
    code = f"open({str(canary)!r}, 'w')"
    made = {
        f"{name}-{protocol}": pickle.dumps([1, Calls(*call)], protocol)
        for protocol in (0, 2, 4)
        for name, call in {
            "system": (os.system, touch),
            "eval": (builtins.eval, code),
            "exec": (builtins.exec, code),
            "open": (open, str(canary), "w"),
            "getattr": (getattr, 1, "real"),
            "import": (importlib.import_module, "antigravity"),
            "popen": (subprocess.Popen, ["touch", str(canary)]),
            "jit": (torch.jit.load, str(canary)),
            "load": (torch.load, str(canary)),
        }.items()
    }
    text = touch.encode()
    made["old builtin"] = b"c__builtin__\neval\n(S'" + code.replace("'", '"').encode() + b"'\ntR."
    made["inst"] = b"(S'" + text + b"'\nios\nsystem\n."
    made["obj"] = b"(cos\nsystem\nS'" + text + b"'\no."
    made["posix"] = b"cposix\nsystem\n(S'" + text + b"'\ntR."
    # attributes of what is allowed lead nowhere: names with dots are whole names here
    for path in ("OrderedDict.__init__.__globals__", "OrderedDict.__class__", "_sys.modules"):
        made[path] = b"\x80\x04" + short(b"collections") + short(path.encode()) + b"\x93."
    made["dtype's module"] = b"\x80\x04" + short(b"torch") + short(b"os.system") + b"\x93."
    made["extension"] = b"\x80\x02\x82\x01."
    # a stand-in is to be given another behaviour
    made["setstate"] = b"cargparse\nNamespace\n}S'__setstate__'\ncos\nsystem\nsbS'" + text + b"'\nb."
    return made


def short(text: bytes) -> bytes:
    return b"\x8c" + bytes([len(text)]) + text


def test_nothing_in_a_pickle_runs(tmp_path):
    canary = tmp_path / "canary"
    pickles = hostile_pickles(canary)
    for name, data in pickles.items():
        with pytest.raises(ValueError, match="refused|no whole pickle"):
            load(io.BytesIO(data), len(data), f"the file {name}")
        assert not canary.exists(), name
    # the canary is one: Python's own unpickler does what the file says
    pickle.loads(pickles["posix"])
    assert canary.exists()


def test_refusals_name_what_was_asked_for(tmp_path):
    data = hostile_pickles(tmp_path / "canary")["posix"]
    with pytest.raises(ValueError, match=r"FILE is refused: its pickle names posix\.system, .*never"):
        load(io.BytesIO(data), len(data), "FILE")


def test_stand_ins_are_made_anew_for_each_file():
    """What a file does to a class that it names, it does to its own copy."""
    data = b"cargparse\nNamespace\nN}S'append'\nK\x07s\x86b."
    with pytest.raises(ValueError, match="no whole pickle"):
        load(io.BytesIO(data), len(data), "FILE")
    assert callable(Record.append)
    clean = pickle.dumps(argparse.Namespace(a=1), 2)
    again = load(io.BytesIO(clean), len(clean), "FILE")
    assert again.fields == {"a": 1} and callable(again.append)


@pytest.mark.parametrize("where", ["legacy", "common.pt", ".metadata", "chunk"])
def test_hostile_files_of_all_kinds(tmp_path, where, capsys):
    canary = tmp_path / "canary"
    import os

    evil = Calls(os.system, f"touch {canary}")
    folder = tmp_path / "checkpoint"
    if where == "legacy":
        write(folder, optimizer=evil)
    else:
        dist(folder, evil if where == ".metadata" else None, evil if where == "common.pt" else None)
    if where == "chunk":
        folder = dist(tmp_path / "other", chunk=evil)
    assert run("megacore.tools.convert", ["from-megatron", str(folder), str(tmp_path / "ours")]) == 2
    assert "posix.system" in capsys.readouterr().err
    assert not canary.exists()


def dist(folder: Path, metadata: Any = None, common: Any = None, chunk: Any = None) -> Path:
    """A torch_dist checkpoint by torch.distributed.checkpoint, one name per layer, settings in common.pt."""
    from torch.distributed.checkpoint import FileSystemWriter, save

    state = {
        "embedding.word_embeddings.weight": torch.randn(16, 8),
        "output_layer.weight": torch.randn(16, 8),
        "decoder.final_layernorm.weight": torch.randn(8),
    }
    for layer in range(2):
        at = f"decoder.layers.{layer}"
        state[f"{at}.self_attention.linear_qkv.layer_norm_weight"] = torch.randn(8)
        state[f"{at}.self_attention.linear_qkv.weight"] = torch.randn(24, 8)
        state[f"{at}.self_attention.linear_proj.weight"] = torch.randn(8, 8)
        state[f"{at}.mlp.linear_fc1.layer_norm_weight"] = torch.randn(8)
        state[f"{at}.mlp.linear_fc1.weight"] = torch.randn(24, 8)
        state[f"{at}.mlp.linear_fc2.weight"] = torch.randn(8, 12)
    folder.mkdir()
    save(state, storage_writer=FileSystemWriter(folder, single_file_per_rank=False), no_dist=True)
    (folder / "metadata.json").write_text('{"sharded_backend": "torch_dist", "sharded_backend_version": 1}')
    settings = common if common is not None else {"args": argparse.Namespace(**ARGS), "iteration": 3}
    torch.save(settings, folder / "common.pt")
    if metadata is not None:
        (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    if chunk is not None:
        for file in folder.glob("*.distcp"):
            data = io.BytesIO()
            torch.save(chunk, data)
            size = file.stat().st_size
            buffer = data.getvalue()
            assert len(buffer) <= size
            file.write_bytes(padded(buffer, size))
    return folder


def padded(data: bytes, size: int) -> bytes:
    """The same zip with a comment that makes it so long."""
    at = data.rindex(b"PK\x05\x06")
    comment = b" " * (size - len(data))
    return data[: at + 20] + struct.pack("<H", len(comment)) + comment


def test_plain_torch_checkpoints_of_the_same_names_are_read(tmp_path):
    source = MegatronSource(str(dist(tmp_path / "dist")))
    assert source.model.activation == "swiglu" and len(source.tensors) == 15


def test_older_names(tmp_path):
    file = write(tmp_path)
    source = MegatronSource(str(tmp_path))
    model = torch.load(file, weights_only=False)["model"]["language_model"]["encoder"]
    h, d = 8, 4
    heads = model["layers.1.self_attention.query_key_value.weight"].view(2, 3, d, h)
    qkv = source.read("layers.1.attention.qkv.weight", (0, 0), (24, 8))
    assert torch.equal(qkv, torch.cat([heads[:, part].reshape(-1, h) for part in range(3)]))
    gate_up = source.read("layers.0.mlp.gate_up.weight", (0, 0), (24, 8))
    assert torch.equal(gate_up, model["layers.0.mlp.dense_h_to_4h.weight"])
    assert len(ModelSpec.of(source.model).params) == len(source.tensors)


def test_links_are_not_followed(tmp_path):
    file = write(tmp_path / "one")
    real = tmp_path / "elsewhere.pt"
    file.rename(real)
    file.symlink_to(real)
    with pytest.raises(ValueError, match="symbolic link"):
        MegatronSource(str(tmp_path / "one"))
    write(tmp_path / "two")
    rank = tmp_path / "two" / "iter_0000003" / "mp_rank_00"
    rank.rename(tmp_path / "outside")
    rank.symlink_to(tmp_path / "outside")
    with pytest.raises(ValueError, match="symbolic link"):
        MegatronSource(str(tmp_path / "two"))


def test_index_names_stay_in_the_folder(tmp_path):
    folder = dist(tmp_path / "dist")
    index = (folder / ".metadata").read_bytes()
    names = {arg for op, arg, _ in pickletools.genops(index) if isinstance(arg, str) and arg.endswith(".distcp")}
    name = sorted(names)[0]
    for evil in ("../" + name[3:], "/" + name[1:]):
        assert len(evil) == len(name)
        (folder / ".metadata").write_bytes(index.replace(name.encode(), evil.encode()))
        with pytest.raises(ValueError, match="not the name of a file in this folder"):
            MegatronSource(str(folder))


@pytest.mark.parametrize("key", sorted(REFUSED))
def test_what_we_do_not_have_is_named(key):
    args = Record()
    args.state = ARGS | {key: 4}
    with pytest.raises(ValueError, match=f"{key}=4 is not supported"):
        model_of(args, "FILE")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"position_embedding_type": "yarn"}, "position_embedding_type"),
        ({"normalization": "LayerNorm", "apply_layernorm_1p": True}, "apply_layernorm_1p"),
        ({"normalization": "LayerNorm", "qk_layernorm": True}, "qk_layernorm"),
        ({"window_size": (3, 5)}, "window_size"),
        ({"hidden_size": "8"}, "hidden_size"),
        ({"num_attention_heads": 0}, "num_attention_heads"),
        ({"tensor_model_parallel_size": 2}, "tensor_model_parallel_size=2"),
        ({"num_layers": 3}, "lacks decoder.layers.2"),
        ({"num_layers": 1}, "has decoder.layers.1"),
        ({"hidden_size": 16}, "has shape"),
    ],
)
def test_settings_that_do_not_fit(tmp_path, change, message):
    write(tmp_path, change)
    with pytest.raises(ValueError, match=message):
        MegatronSource(str(tmp_path))


def test_what_settings_mean():
    args = Record()
    args.state = ARGS | {
        "window_size": (3, 0),
        "window_attn_skip_freq": 2,
        "vocab_size": 11,
        "apply_layernorm_1p": True,
    }
    model, notes = model_of(args, "FILE")
    assert (model.sliding_window, model.full_attention_every, model.vocab_size) == (4, 2, 11)
    assert model.norm_unit_offset and not notes


def test_other_things_are_said(tmp_path):
    with pytest.raises(ValueError, match="no checkpoint of Megatron-LM"):
        MegatronSource(str(tmp_path))
    write(tmp_path / "old", checkpoint_version=1.0)
    with pytest.raises(ValueError, match="checkpoint_version=1.0"):
        MegatronSource(str(tmp_path / "old"))
    experts = older_model()
    experts["language_model"]["encoder"]["layers.0.mlp.experts.0.weight"] = torch.zeros(2)
    write(tmp_path / "moe", model=experts)
    with pytest.raises(ValueError, match="mixtures of experts are not supported"):
        MegatronSource(str(tmp_path / "moe"))
    zarr = dist(tmp_path / "zarr")
    (zarr / "metadata.json").write_text('{"sharded_backend": "zarr"}')
    with pytest.raises(ValueError, match="format 'zarr'"):
        MegatronSource(str(zarr))
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "latest_checkpointed_iteration.txt").write_text("../../etc")
    with pytest.raises(ValueError, match="neither release nor an iteration"):
        MegatronSource(str(tmp_path / "bad"))


def test_damage_is_named(tmp_path):
    """Files that were cut short, taken away, or are no zips of torch.save."""
    file = write(tmp_path / "legacy")
    data = file.read_bytes()
    for end in (0, 10, len(data) // 2, len(data) - 1):
        file.write_bytes(data[:end])
        with pytest.raises(ValueError, match="model_optim_rng.pt"):
            MegatronSource(str(tmp_path / "legacy"))
    torch.save({"model": 1}, file, _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match="PyTorch 1.6"):
        MegatronSource(str(tmp_path / "legacy"))
    folder = dist(tmp_path / "dist")
    first = sorted(folder.glob("*.distcp"))[0]
    first.unlink()
    with pytest.raises(ValueError, match=f"has no {first.name}"):
        MegatronSource(str(folder))


def test_compressed_and_foreign_zips_are_refused(tmp_path):
    file = write(tmp_path / "one")
    with zipfile.ZipFile(file) as old:
        entries = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as new:
        for name, data in entries.items():
            new.writestr(name, data)
    with pytest.raises(ValueError, match="is compressed"):
        read_archive(LocalStore(file.parent), file.name)
    with zipfile.ZipFile(file, "w") as new:
        new.writestr("a.txt", "a")
    with pytest.raises(ValueError, match="not one that torch.save wrote"):
        read_archive(LocalStore(file.parent), file.name)


def test_the_command(tmp_path, capsys):
    write(tmp_path / "theirs")
    ours = tmp_path / "ours"
    line = ["from-megatron", str(tmp_path / "theirs"), str(ours), "--vocab-size", "13", "--dtype", "bf16"]
    assert run("megacore.tools.convert", line) == 0
    assert "llama" in capsys.readouterr().out
    assert run("megacore.tools.convert", ["to-hf", str(ours), str(tmp_path / "hf")]) == 0
    assert (tmp_path / "hf" / "config.json").exists()
    shutil.rmtree(ours)
    assert run("megacore.tools.convert", [*line[:3], "--vocab-size", "99"]) == 2
    assert "--vocab-size 99 is out of range" in capsys.readouterr().err
