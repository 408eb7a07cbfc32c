"""What a folder of unknown origin may hold: everything is refused by name, nothing is run, nothing is believed."""

import json
import os
import pickle
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megacore.checkpoint.hf.folder import HfFolder
from megacore.checkpoint.hf.tensor_files import read_header
from megacore.checkpoint.store import LocalStore

CONFIG = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 11,
    "rope_theta": 10000.0,
}


def tensors() -> dict[str, torch.Tensor]:
    shapes = {"model.embed_tokens": (11, 16), "model.norm": (16,), "lm_head": (11, 16)}
    for layer in range(2):
        block = f"model.layers.{layer}"
        shapes |= {f"{block}.input_layernorm": (16,), f"{block}.post_attention_layernorm": (16,)}
        shapes |= {f"{block}.self_attn.{name}_proj": (16, 16) for name in "qo"}
        shapes |= {f"{block}.self_attn.{name}_proj": (8, 16) for name in "kv"}
        shapes |= {f"{block}.mlp.{name}_proj": (24, 16) for name in ("gate", "up")}
        shapes[f"{block}.mlp.down_proj"] = (16, 24)
    return {f"{name}.weight": torch.randn(shape) for name, shape in shapes.items()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A good one."""
    home = tmp_path / "model"
    home.mkdir()
    (home / "config.json").write_text(json.dumps(CONFIG))
    save_file(tensors(), home / "model.safetensors")
    HfFolder(str(home))
    return home


def refused(folder: Path, *words: str) -> None:
    with pytest.raises(ValueError) as caught:
        HfFolder(str(folder))
    for word in words:
        assert word in str(caught.value)


def sharded(folder: Path, **changed: str) -> None:
    """The same in one file with an index."""
    names = load_file(folder / "model.safetensors").keys()
    os.rename(folder / "model.safetensors", folder / "a.safetensors")
    index = {"weight_map": dict.fromkeys(names, "a.safetensors") | changed}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"model_type": "mamba"}, ["config.json", 'model_type="mamba"', "supported are", "gemma2"]),
        ({"model_type": "evil", "auto_map": {"AutoModel": "evil.Model"}}, ["auto_map", "code to run", "never"]),
        ({"model_type": None}, ["does not say model_type"]),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, ['type="dynamic"', "supported are", "yarn"]),
        ({"rope_scaling": {"full_attention": {"rope_type": "linear"}}}, ["full_attention", "one kind of layers"]),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, ["partial_rotary_factor=0.5"]),
        ({"quantization_config": {"quant_method": "gptq"}}, ["quantization_config", "not quantised"]),
        ({"hidden_act": "my_own"}, ['hidden_act="my_own"', "silu"]),
        ({"num_local_experts": 8}, ["num_local_experts=8", "mixtures of experts"]),
        ({"layer_types": ["full_attention", "linear_attention"]}, ["layer_types", "only full_attention"]),
        ({"hidden_size": "16"}, ['hidden_size="16"', "whole number"]),
        ({"hidden_size": -16}, ["hidden_size=-16", "out of range"]),
        ({"hidden_size": True}, ["hidden_size=true", "whole number"]),
        ({"num_hidden_layers": 10**9}, ["num_layers=1000000000 is out of range"]),
        ({"num_hidden_layers": 16000}, ["16000 layers", "21 tensors"]),
        ({"num_attention_heads": 10**9, "head_dim": 2}, ["1000000000 heads"]),
        ({"num_attention_heads": 0}, ["no num_heads"]),
        ({"num_attention_heads": 5}, ["5 heads do not divide"]),
        ({"num_key_value_heads": 3}, ["num_kv_heads=3"]),
        ({"rms_norm_eps": "tiny"}, ["rms_norm_eps", "number"]),
        ({"vocab_size": 12}, ["model.embed_tokens.weight", "[11, 16]", "[12, 16]"]),
        ({"num_hidden_layers": 3}, ["lacks model.layers.2."]),
        ({"num_hidden_layers": 1}, ["has model.layers.1.", "has not"]),
        ({"attention_bias": True}, ["lacks model.layers.0.self_attn.q_proj.bias"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_configs(folder, keys, words):
    (folder / "config.json").write_text(json.dumps(CONFIG | keys))
    refused(folder, *words)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"model_type": "llama", "model_type": "gpt2"}', ["'model_type' stands twice"]),
        ('{"rms_norm_eps": NaN}', ["NaN is not a finite number"]),
        ('{"rms_norm_eps": 1e999}', ["1e999 is not a finite number"]),
        ("[" * 100_000, ["config.json", "nested too deeply"]),
        ("[1]", ["a list", "object"]),
        ('{"model_type"', ["config.json is not the JSON"]),
        ("\udcff", ["config.json is not the JSON"]),
    ],
)
def test_json(folder, text, words):
    (folder / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    refused(folder, *words)


def test_pickles_are_never_opened(folder, tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'ran'}",)

    (folder / "model.safetensors").unlink()
    for name in ("pytorch_model.bin", "pytorch_model.bin.index.json"):
        (folder / name).write_bytes(pickle.dumps(Bomb()))
    refused(folder, "pytorch_model.bin, a pickle", "not read", "save_pretrained")
    sharded_by = {"weight_map": {"model.norm.weight": "pytorch_model.bin"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(sharded_by))
    refused(folder, "'pytorch_model.bin'", "pickles are never opened")
    assert not (tmp_path / "ran").exists()


def test_remote_code_is_ignored_where_the_model_is_built_in(folder, tmp_path):
    (folder / "config.json").write_text(json.dumps(CONFIG | {"auto_map": {"AutoModelForCausalLM": "modeling.Own"}}))
    (folder / "modeling.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    source = HfFolder(str(folder))
    assert "auto_map is ignored" in source.notes[0]
    source.read("final_norm.weight", (0,), (16,))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "name", ["../secret.safetensors", "/etc/secret.safetensors", "sub/a.safetensors", ".safetensors"]
)
def test_index_leads_out_of_the_folder(folder, name):
    save_file(tensors(), folder.parent / "secret.safetensors")
    sharded(folder, **{"model.norm.weight": name})
    refused(folder, repr(name), "refused")


def test_index_and_files_must_agree(folder):
    sharded(folder, extra="a.safetensors")
    refused(folder, "'extra'", "not there")
    sharded_again = json.loads((folder / "model.safetensors.index.json").read_text())
    del sharded_again["weight_map"]["extra"], sharded_again["weight_map"]["model.norm.weight"]
    (folder / "model.safetensors.index.json").write_text(json.dumps(sharded_again))
    refused(folder, "'model.norm.weight'", "nowhere")
    (folder / "a.safetensors").unlink()
    refused(folder, "no a.safetensors")


def test_links_out_of_the_folder(folder):
    secret = folder.parent / "secret.safetensors"
    os.rename(folder / "model.safetensors", secret)
    (folder / "model.safetensors").symlink_to(secret)
    refused(folder, "is a link to", "out of the folder")


def test_links_of_the_hub_cache_are_followed(folder, tmp_path):
    blobs, snapshot = tmp_path / "models--x" / "blobs", tmp_path / "models--x" / "snapshots" / "rev"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, name in enumerate(("config.json", "model.safetensors")):
        os.rename(folder / name, blobs / str(number))
        (snapshot / name).symlink_to(f"../../blobs/{number}")
    source = HfFolder(str(snapshot))
    assert source.read("final_norm.weight", (3,), (2,)).shape == (2,)
    os.rename(blobs / "1", tmp_path / "elsewhere")
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to("../../../elsewhere")
    refused(snapshot, "out of the folder")


def header_of(file: Path) -> tuple[dict, bytes]:
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def write(file: Path, header: object, body: bytes) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + body)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"data_offsets": [0, 10**9]}, ["claims bytes 0 to 1000000000"]),
        ({"data_offsets": [-64, 0]}, ["no lists of sizes"]),
        ({"data_offsets": [64, 0]}, ["claims bytes 64 to 0"]),
        ({"data_offsets": [0]}, ["no lists of sizes"]),
        ({"data_offsets": [0, 64.0]}, ["no lists of sizes"]),
        ({"shape": [17]}, ["[17]"]),
        ({"shape": [2**40, 2**40]}, ["claims bytes"]),
        ({"shape": "16"}, ["no lists of sizes"]),
        ({"dtype": "Q4"}, ["'Q4'", "not supported"]),
        ({"dtype": ["F32"]}, ["not supported"]),
        ({"dtype": "I32"}, ["int32", "fp64, fp32, bf16 and fp16"]),
        ({"dtype": "F16", "shape": [2, 16]}, ["[2, 16]", "[16]"]),
    ],
)
def test_entries_of_headers(folder, change, words):
    header, body = header_of(folder / "model.safetensors")
    header["model.norm.weight"] |= change
    write(folder / "model.safetensors", header, body)
    refused(folder, "model.norm.weight", *words)


def test_headers(folder):
    file = folder / "model.safetensors"
    header, body = header_of(file)
    write(file, header, body[:-1])
    refused(folder, "cut short")
    write(file, header, body + b"x")
    refused(folder, "1 bytes behind its last tensor")
    names = list(header)
    overlapping = {**header, names[1]: header[names[0]]}
    write(file, overlapping, body)
    refused(folder, "belong to two tensors or to none")
    entry = json.dumps(header[names[0]])
    write(file, f'{{"{names[0]}": {entry}, "{names[0]}": {entry}}}'.encode(), body)
    refused(folder, f"{names[0]!r} stands twice")
    write(file, {names[0]: 5}, body)
    refused(folder, "has no dtype, shape and data_offsets")
    file.write_bytes(struct.pack("<Q", 2**63) + b"{}")
    refused(folder, f"header of {2**63} bytes")
    file.write_bytes(b"abc")
    refused(folder, "3 bytes")


def test_any_damaged_header_is_refused_or_means_the_same(folder):
    """Byte after byte of the header is changed: there is a ValueError, or the same tensors lie at the same places."""
    file = folder / "model.safetensors"
    data = bytearray(file.read_bytes())
    (length,) = struct.unpack("<Q", data[:8])
    good = {
        name: (each.offset, each.shape, each.dtype) for name, each in read_header(LocalStore(folder), file.name).items()
    }
    generator = torch.Generator().manual_seed(3)
    refusals = 0
    for place in [*range(8), *torch.randint(8, 8 + length, (400,), generator=generator).tolist()]:
        bad = bytearray(data)
        bad[place] ^= 1 << int(torch.randint(8, (), generator=generator))
        file.write_bytes(bad)
        try:
            found = HfFolder(str(folder)).tensors
        except ValueError:
            refusals += 1
        else:
            assert {name: (each.offset, each.shape, each.dtype) for name, each in found.items()} == good
    assert refusals > 300


def test_a_file_that_shrinks_is_noticed(folder):
    source = HfFolder(str(folder))
    file = folder / "model.safetensors"
    with file.open("r+b") as handle:
        handle.truncate(file.stat().st_size - 4)
    with pytest.raises(ValueError, match="truncated"):
        for name in source.placements.of:
            param = source.placements.of[name].param
            source.read(name, [0] * len(param.shape), param.shape)
