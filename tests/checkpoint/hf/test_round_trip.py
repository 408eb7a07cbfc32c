"""HF -> ours -> HF gives back every bit and the same logits; the engine computes what transformers computes."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megacore.checkpoint.hf.export import export
from megacore.checkpoint.hf.folder import HfFolder
from megacore.checkpoint.importing import write_checkpoint
from megacore.checkpoint.opening import open_weights
from megacore.spec import ModelSpec
from megacore.verify.weights import engine_logits
from tests.checkpoint.hf.tiny import MODELS, save, transformers

TOKENS = torch.randint(1003, (2, 40), generator=torch.Generator().manual_seed(7))


def tensors_in(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def assert_same_tensors(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].dtype == other[name].dtype, name
        assert torch.equal(one[name].view(torch.uint8), other[name].view(torch.uint8)), name


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_there_and_back(name, tmp_path):
    model = save(name, tmp_path / "hf")
    source = open_weights(str(tmp_path / "hf"))
    write_checkpoint(source, str(tmp_path / "ours"), reopen=lambda: source)
    done = export(open_weights(str(tmp_path / "ours")), str(tmp_path / "back"))

    assert_same_tensors(tensors_in(tmp_path / "hf"), tensors_in(tmp_path / "back"))
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back", attn_implementation="eager").eval()
    expected = model(TOKENS).logits
    assert type(again) is type(model)
    assert torch.equal(again(TOKENS).logits, expected)
    assert done.model_type == model.config.model_type

    ours = engine_logits(open_weights(str(tmp_path / "ours")), TOKENS)
    assert expected.std() > 0.3, "logits that are nearly equal prove nothing"
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_config_keeps_its_meaning_and_metadata(name, tmp_path):
    save(name, tmp_path / "hf")
    path = tmp_path / "hf" / "config.json"
    config = json.loads(path.read_text()) | {"eos_token_id": [3, 17], "bos_token_id": None, "my_own": {"a": [1]}}
    path.write_text(json.dumps(config))
    export(HfFolder(str(tmp_path / "hf")), str(tmp_path / "back"))
    found = json.loads((tmp_path / "back" / "config.json").read_text())
    rope = {"rope_parameters", "rope_scaling", "rope_theta", "rotary_pct", "rotary_emb_base", "partial_rotary_factor"}
    rope |= {"original_max_position_embeddings"}
    left_behind = {"transformers_version"}
    assert {key: found.get(key) for key in config.keys() - rope - left_behind} == {
        key: config[key] for key in config.keys() - rope - left_behind
    }
    assert found["torch_dtype"] == found["dtype"] == "float32"
    one, other = (transformers.AutoConfig.from_pretrained(tmp_path / each) for each in ("hf", "back"))
    for key in ("max_position_embeddings", "layer_types", "sliding_window"):
        assert getattr(one, key, None) == getattr(other, key, None), key
    if rope := getattr(one, "rope_parameters", None):
        assert {key: other.rope_parameters.get(key) for key in rope} == rope
    generation = "generation_config.json"
    assert (tmp_path / "hf" / generation).read_text().split() == (tmp_path / "back" / generation).read_text().split()


OLD_STYLE = {
    "llama-tied-bias": {
        "rope_theta": 5000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "original_max_position_embeddings": 32,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
        },
    },
    "llama-linear": {"rope_theta": 5000.0, "rope_scaling": {"type": "linear", "factor": 4.0}},
    "gpt-neox-serial": {"rotary_emb_base": 10000, "rotary_pct": 0.5},
}


@pytest.mark.parametrize("name", OLD_STYLE)
def test_configs_of_transformers_4(name, tmp_path):
    """Its keys mean the same, and are written beside the new ones."""
    save(name, tmp_path / "hf")
    new = HfFolder(str(tmp_path / "hf")).model
    path = tmp_path / "hf" / "config.json"
    config = json.loads(path.read_text())
    del config["rope_parameters"]
    path.write_text(json.dumps(config | OLD_STYLE[name]))
    source = HfFolder(str(tmp_path / "hf"))
    assert source.model == new
    export(source, str(tmp_path / "back"))
    found = json.loads((tmp_path / "back" / "config.json").read_text())
    for key, value in OLD_STYLE[name].items():
        if isinstance(value, dict):
            assert found[key].items() >= value.items()
        else:
            assert found[key] == value


@pytest.mark.parametrize("name", ["qwen2-window", "gpt2", "gpt-neox", "olmo2", "phi3", "gemma2"])
@pytest.mark.parametrize("tp", [2])
def test_ranks_read_their_own_slices(name, tp, tmp_path):
    """Each rank of tp=2 reads its pieces of every parameter alone: together they are the whole."""
    save(name, tmp_path, max_shard_size="150KB")
    source = HfFolder(str(tmp_path))
    for param in ModelSpec.of(source.model).params:
        start = [0] * len(param.shape)
        whole = source.read(param.name, start, param.shape)
        found = torch.full_like(whole, torch.nan)
        for rank in range(tp):
            for piece in param.pieces(rank, tp):
                begin, size = list(start), list(param.shape)
                begin[param.dim], size[param.dim] = piece.start, piece.size
                found.narrow(param.dim, piece.start, piece.size).copy_(source.read(param.name, begin, size))
        assert torch.equal(found, whole), param.name


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt-neox"])
def test_any_region_is_that_of_the_whole(name, tmp_path):
    save(name, tmp_path)
    source = HfFolder(str(tmp_path))
    generator = torch.Generator().manual_seed(1)

    def draw(high: int) -> int:
        return int(torch.randint(high, (), generator=generator))

    for param in ModelSpec.of(source.model).params:
        whole = source.read(param.name, [0] * len(param.shape), param.shape)
        for _ in range(4):
            start = [draw(n) for n in param.shape]
            size = [1 + draw(n - at) for n, at in zip(param.shape, start)]
            part = source.read(param.name, start, size)
            assert part.is_contiguous()
            assert torch.equal(part, whole[tuple(slice(a, a + n) for a, n in zip(start, size))]), param.name


def test_padded_vocabulary_is_stripped_and_put_back(tmp_path):
    save("llama", tmp_path / "hf")
    stripped = HfFolder(str(tmp_path / "hf"), vocab_size=1000)
    write_checkpoint(stripped, str(tmp_path / "ours"), reopen=lambda: stripped)
    source = open_weights(str(tmp_path / "ours"))
    assert source.model.vocab_size == 1000
    export(source, str(tmp_path / "back"), pad_vocab_multiple=64)
    before, after = tensors_in(tmp_path / "hf"), tensors_in(tmp_path / "back")
    assert json.loads((tmp_path / "back" / "config.json").read_text())["vocab_size"] == 1024
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert after[name].shape == (1024, 48)
        assert torch.equal(after[name][:1000], before[name][:1000])
        assert not after[name][1000:].any()
    with pytest.raises(ValueError, match="vocab_size=1003"):
        HfFolder(str(tmp_path / "hf"), vocab_size=1004)


def test_shards_and_formats(tmp_path):
    """Several workers write several files with an index that transformers reads; bf16 is fp32 to the nearest."""
    model = save("qwen3", tmp_path / "hf")
    reopen = partial(open_weights, str(tmp_path / "hf"))
    done = export(reopen(), str(tmp_path / "bf16"), "bf16", shard_bytes=100_000, reopen=reopen, num_workers=2)
    index = json.loads((tmp_path / "bf16" / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) == done.files > 2
    assert files[0] == f"model-00001-of-{done.files:05d}.safetensors"
    assert index["metadata"] == {
        "total_parameters": sum(parameter.numel() for parameter in model.parameters()),
        "total_size": 2 * sum(parameter.numel() for parameter in model.parameters()),
    }
    assert_same_tensors(
        tensors_in(tmp_path / "bf16"), {k: v.to(torch.bfloat16) for k, v in tensors_in(tmp_path / "hf").items()}
    )
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "bf16", dtype="auto")
    assert again.dtype is torch.bfloat16


def test_a_tied_output_matrix_is_read_or_refused(tmp_path):
    """Some folders hold it twice: that is so only as long as both are the same."""
    from safetensors.torch import save_file

    save("qwen2", tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, file, {"format": "pt"})
    assert HfFolder(str(tmp_path)).model.tie_embeddings
    tensors["lm_head.weight"][1002, 47] += 1
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ValueError, match="lm_head.weight is not the embedding"):
        HfFolder(str(tmp_path))


def test_bare_models_and_buffers_of_old_files(tmp_path):
    """GPT-2's first file has no prefix, and masks among its tensors."""
    from safetensors.torch import save_file

    save("gpt2", tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    expected = HfFolder(str(tmp_path)).read("layers.1.attention.qkv.weight", (3, 5), (100, 40))
    bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    bare |= {f"h.{layer}.attn.bias": torch.ones(1, 1, 64, 64) for layer in range(3)}
    save_file(bare, file, {"format": "pt"})
    source = HfFolder(str(tmp_path))
    assert torch.equal(source.read("layers.1.attention.qkv.weight", (3, 5), (100, 40)), expected)


def test_object_stores(tmp_path):
    """Both ways through a URL."""
    pytest.importorskip("fsspec")
    save("mistral", tmp_path / "hf")
    source = open_weights(str(tmp_path / "hf"))
    url = f"memory://{tmp_path.name}"
    write_checkpoint(source, f"{url}/ours", reopen=lambda: source)
    export(open_weights(f"{url}/ours"), f"{url}/hf")
    export(open_weights(f"{url}/hf"), str(tmp_path / "back"))
    assert_same_tensors(tensors_in(tmp_path / "hf"), tensors_in(tmp_path / "back"))
