"""`megacore convert` from the command line: what it writes and says, and that it is right about what is wrong."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megacore.checkpoint.hf.destination import Destination
from megacore.checkpoint.hf.export import export
from megacore.checkpoint.hf.family import family_for
from megacore.checkpoint.hf.folder import HfFolder
from megacore.checkpoint.read import Checkpoint
from megacore.config.resolve import resolve_model
from megacore.config.schema import ModelConfig, RopeScaling
from megacore.exits import run
from megacore.verify import transformers_oracle
from tests.checkpoint.hf.tiny import save

BASE = ModelConfig(num_layers=2, hidden_size=24, num_heads=4, num_kv_heads=2, head_dim=6, vocab_size=38)


@pytest.fixture
def convert(capsys):
    """convert(*words) -> exit code, stdout, stderr."""

    def call(*words: object) -> tuple[int, str, str]:
        code = run("megacore.tools.convert", list(map(str, words)))
        return code, *capsys.readouterr()

    return call


def test_there_and_back(convert, tmp_path):
    save("llama", tmp_path / "hf")
    code, out, err = convert("from-hf", tmp_path / "hf", tmp_path / "ours", "--json", "--workers", 2)
    assert code == 0
    assert "100%" in err
    told = json.loads(out)
    assert (told["family"], told["files"]) == ("llama", 3)
    assert told["parameters"] == sum(t.numel() for t in load_file(tmp_path / "hf" / "model.safetensors").values())
    code, out, _ = convert("to-hf", tmp_path / "ours", tmp_path / "back", "--shard-size", "100KB")
    assert code == 0
    assert "no tokenizer" in out
    code, out, _ = convert("verify", tmp_path / "hf", tmp_path / "back", "--tokens", 32)
    assert (code, out.splitlines()[-1]) == (0, "they agree")
    assert out.startswith("weights   21 of 21 equal bit for bit; max |difference| 0")
    assert "engine and transformers: max |difference|" in out


@pytest.mark.parametrize("without", [False, True], ids=["oracle", "alone"])
def test_verify_finds_a_wrong_weight(convert, tmp_path, monkeypatch, without):
    if without:
        monkeypatch.setattr(transformers_oracle, "is_installed", lambda: False)
    save("gpt2", tmp_path / "hf")
    convert("from-hf", tmp_path / "hf", tmp_path / "ours")
    code, out, _ = convert("verify", tmp_path / "ours", tmp_path / "hf", "--json")
    assert code == 0
    told = json.loads(out)
    assert told["agree"] and told["logits"][0]["max_difference"] <= 1e-5
    assert bool(told["notes"]) == without
    file = tmp_path / "hf" / "model.safetensors"
    tensors = load_file(file)
    tensors["transformer.h.1.mlp.c_fc.weight"][3, 4] += 1e-6
    save_file(tensors, file, {"format": "pt"})
    code, out, _ = convert("verify", tmp_path / "ours", tmp_path / "hf", "--json")
    assert code == 1
    told = json.loads(out)
    assert told["weights"]["different"] == ["layers.1.mlp.up.weight"]
    assert 0 < told["weights"]["max_difference"] < 2e-6


def test_verify_finds_a_config_that_means_another_model(convert, tmp_path):
    save("llama", tmp_path / "hf")
    convert("from-hf", tmp_path / "hf", tmp_path / "ours")
    path = tmp_path / "hf" / "config.json"
    config = json.loads(path.read_text())
    config["rope_parameters"]["rope_theta"] = 500.0
    path.write_text(json.dumps(config))
    code, out, _ = convert("verify", tmp_path / "ours", tmp_path / "hf")
    assert code == 1
    assert "model.rope_theta is 10000.0 in the first and 500.0 in the second" in out
    assert out.splitlines()[-1] == "they DIFFER"


def test_shorter_formats_are_the_nearest(convert, tmp_path):
    save("qwen2", tmp_path / "hf")
    assert convert("to-hf", tmp_path / "hf", tmp_path / "bf16", "--dtype", "bf16")[0] == 0
    code, out, _ = convert("verify", tmp_path / "hf", tmp_path / "bf16", "--json")
    told = json.loads(out)
    assert (code, told["weights"]["equal"], told["weights"]["rounded"]) == (0, 0, told["weights"]["number"])
    file = tmp_path / "bf16" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"].view(torch.int16)[5] += 1
    save_file(tensors, file, {"format": "pt"})
    code, out, _ = convert("verify", tmp_path / "hf", tmp_path / "bf16", "--json")
    assert (code, json.loads(out)["weights"]["different"]) == (1, ["final_norm.weight"])


def test_numbers_too_large_for_fp16(convert, tmp_path):
    save("qwen2", tmp_path / "hf")
    file = tmp_path / "hf" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"][5] = 1e5
    save_file(tensors, file, {"format": "pt"})
    code, _, err = convert("to-hf", tmp_path / "hf", tmp_path / "fp16", "--dtype", "fp16")
    assert code == 2
    assert "model.norm.weight holds 100000, more than fp16 can; use --dtype bf16" in err
    assert not (tmp_path / "fp16").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["from-hf", "{t}/nowhere", "{t}/x"], "nowhere is not an HF folder: there is no such folder, or it is empty"),
        (["from-hf", "{t}/full", "{t}/x"], "full is not an HF folder: it has no config.json"),
        (["from-hf", "{t}/hf", "{t}/full"], "full is not empty (mine.txt, ...); name another folder, or use --force"),
        (["to-hf", "{t}/hf", "{t}/full"], "full is not empty (mine.txt, ...); name another folder, or use --force"),
        (["to-hf", "{t}/hf", "{t}/full/mine.txt"], "mine.txt is a file; name a folder"),
        (["to-hf", "{t}/full", "{t}/x"], "full holds no whole checkpoint"),
        (["from-hf", "{t}/hf", "{t}/x", "--vocab-size", "2000"], "--vocab-size 2000 is out of range"),
        (["from-hf", "{t}/hf", "{t}/x", "--workers", "-1"], "--workers -1 must be at least 1"),
        (["to-hf", "{t}/hf", "{t}/x", "--pad-vocab-multiple", "0"], "--pad-vocab-multiple 0"),
        (["verify", "{t}/hf", "{t}/hf", "--tokens", "1"], "--tokens 1 must be at least 2"),
    ],
)
def test_wrong_input(convert, tmp_path, words, message):
    save("mistral", tmp_path / "hf")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    code, _, err = convert(*(word.format(t=tmp_path) for word in words))
    assert code == 2
    assert message in err
    assert (tmp_path / "full" / "mine.txt").read_text() == "mine"
    assert not (tmp_path / "x").exists()


def test_force_replaces_what_is_its_own(convert, tmp_path):
    save("llama", tmp_path / "hf")
    save("gpt2", tmp_path / "other")
    assert convert("to-hf", tmp_path / "other", tmp_path / "x", "--shard-size", "50KB")[0] == 0
    (tmp_path / "x" / "mine.txt").write_text("mine")
    assert convert("to-hf", tmp_path / "hf", tmp_path / "x", "--force")[0] == 0
    assert HfFolder(str(tmp_path / "x")).family.ours == "llama"
    names = {"config.json", "generation_config.json", "model.safetensors", "mine.txt"}
    assert set(os.listdir(tmp_path / "x")) == names
    assert not [name for name in os.listdir(tmp_path) if "writing" in name]

    assert convert("from-hf", tmp_path / "other", tmp_path / "y", "--workers", 1)[0] == 0
    assert convert("from-hf", tmp_path / "hf", tmp_path / "y", "--force")[0] == 0
    Checkpoint.open(str(tmp_path / "y")).verify()


def test_an_export_that_fails_leaves_nothing(tmp_path, monkeypatch):
    """Neither a folder nor half of one; the next goes through."""
    save("llama", tmp_path / "hf")

    class Broken(HfFolder):
        def read(self, name, start, size):
            if name == "layers.2.mlp.down.weight":
                raise OSError("the disk is gone")
            return super().read(name, start, size)

    with pytest.raises(OSError, match="gone"):
        export(Broken(str(tmp_path / "hf")), str(tmp_path / "back"), shard_bytes=100_000)
    assert not (tmp_path / "back").exists()
    export(HfFolder(str(tmp_path / "hf")), str(tmp_path / "back"))
    assert HfFolder(str(tmp_path / "back")).model == HfFolder(str(tmp_path / "hf")).model
    assert sorted(os.listdir(tmp_path)) == ["back", "hf"]


def test_object_stores_see_config_json_last(tmp_path):
    """Until then there is no HF folder."""
    fsspec = pytest.importorskip("fsspec")
    url = f"memory://{tmp_path.name}"
    destination = Destination(url, force=False)
    assert destination.work == url
    order: list[str] = []
    destination.store.notice = lambda operation: order.append(operation)
    system = fsspec.filesystem("memory")
    destination.finish([], {"model.safetensors.index.json": b"{}", "config.json": b"{}"})
    written = sorted(system.ls(f"/{tmp_path.name}", detail=True), key=lambda each: each["created"])
    assert Path(written[-1]["name"]).name == "config.json"


@pytest.mark.parametrize(
    ("features", "family"),
    [
        ({}, "llama"),
        ({"qkv_bias": True}, "qwen2"),
        ({"qk_norm": True}, "qwen3"),
        ({"sliding_window": 5}, "mistral"),
        ({"family": "gpt2", "qkv_bias": True}, "qwen2"),
        ({"rope_scaling": RopeScaling(type="ntk", factor=2.0)}, "llama"),
        ({"dropout": 0.1, "init_std": 0.5}, "llama"),
    ],
)
def test_a_model_of_ones_own_goes_to_the_family_that_can_say_it(features, family):
    model = resolve_model(ModelConfig(**{**BASE.__dict__, **features}), 16)
    found, said = family_for(model)
    assert found.ours == said.family == family


@pytest.mark.parametrize(
    ("features", "message"),
    [
        ({"activation": "relu2"}, "model.activation=relu2 cannot be said in HF's model_type llama, where it is swiglu"),
        ({"position": "alibi"}, "model.position=alibi"),
        ({"norm": "layernorm"}, "model.norm=layernorm"),
        ({"attention_out_bias": True}, "model.attention_out_bias=True"),
        ({"logit_softcap": 30.0}, "model.logit_softcap=30.0"),
    ],
)
def test_what_no_family_can_say_is_refused(features, message):
    with pytest.raises(ValueError, match="no other family of HF") as caught:
        family_for(resolve_model(ModelConfig(**{**BASE.__dict__, **features}), 16))
    assert message in str(caught.value)
