"""Checkpoints that Megatron-Core itself made, imported: our engine's logits are those of its GPTModel."""

import importlib.util
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from megacore.checkpoint.megatron.source import MegatronSource, import_megatron
from megacore.checkpoint.read import Checkpoint
from megacore.spec import ModelSpec
from megacore.verify.weights import compare_weights, engine_logits, largest
from tests.checkpoint.megatron.oracle import Case

LIMIT = 2e-5  # of logits of size 1 to 10 in float32
ROOT = Path(__file__).resolve().parents[3]

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("megatron") is None, reason="Megatron-Core is not installed; see tests/run.sh"
)

SIZES = {"num_layers": 4, "hidden_size": 24, "num_attention_heads": 4, "kv_channels": 8, "ffn_hidden_size": 40}
LLAMA = {
    "config": {
        **SIZES,
        "num_query_groups": 2,
        "gated_linear_unit": True,
        "add_bias_linear": False,
        "normalization": "RMSNorm",
        "layernorm_epsilon": 1e-6,
    },
    "model": {"share_embeddings_and_output_weights": False, "position_embedding_type": "rope", "rotary_base": 5000},
    "activation": "silu",
}
GPT = {
    "config": {**SIZES, "bias_activation_fusion": True},
    "model": {"share_embeddings_and_output_weights": True, "position_embedding_type": "learned_absolute"},
    "args": {"vocab_size": 61},
}
# one kv head for two ranks, norms of queries and keys, a bias of qkv alone, a quarter of each head turns
MQA = {
    "config": {
        **SIZES,
        "num_query_groups": 1,
        "normalization": "RMSNorm",
        "qk_layernorm": True,
        "add_bias_linear": False,
        "add_qkv_bias": True,
    },
    "model": {
        "share_embeddings_and_output_weights": False,
        "position_embedding_type": "rope",
        "rotary_percent": 0.25,
    },
    "activation": "relu2",
}
LLAMA3 = {**LLAMA, "model": {**LLAMA["model"], "rope_scaling": True, "rotary_base": 500000}}
EXACT_GELU = {**GPT, "config": {**SIZES, "bias_activation_fusion": False}}

TWO = (
    Case("llama-tp2", tp=2, **LLAMA),
    Case("gpt-tp2", tp=2, **GPT),
    Case("mqa-tp2", tp=2, **MQA),
    Case("gpt-pp2", pp=2, **GPT),
    Case("llama3-pp2-vp2", pp=2, vp=2, **LLAMA3),
    Case("llama-tp2-single", tp=2, metadata={"singleton_local_shards": True}, **LLAMA),
)
FOUR = (
    Case("llama-tp2-pp2", tp=2, pp=2, **LLAMA),
    Case("gpt-tp2-pp2-vp2", tp=2, pp=2, vp=2, **EXACT_GELU),
    Case("mqa-tp4", tp=4, **MQA),
    Case("mqa-tp2-pp2", tp=2, pp=2, **MQA),
    Case("llama3-tp4", tp=4, **{**LLAMA3, "config": {**LLAMA3["config"], "num_query_groups": 4}}),
    Case("llama-tp2-dp2", tp=2, metadata={"non_homogeneous_layers": True}, **LLAMA),
)


def make(folder: Path, world: int, cases: Sequence[Case]) -> Path:
    (folder / "cases.json").write_text(json.dumps([case.write() for case in cases]))
    command = [sys.executable, "-m", "tests.checkpoint.megatron.oracle"]
    ranks = [
        subprocess.Popen([*command, str(rank), str(world), str(folder)], cwd=ROOT, stderr=subprocess.PIPE, text=True)
        for rank in range(world)
    ]
    errors = [rank.communicate(timeout=240)[1] for rank in ranks]
    assert not any(rank.returncode for rank in ranks), "\n".join(errors)
    return folder


@pytest.fixture(scope="module")
def of_two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("two"), 2, TWO)


@pytest.fixture(scope="module")
def of_four(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("four"), 4, FOUR)


def check(folder: Path, kind: str) -> None:
    source = MegatronSource(str(folder / kind))
    assert source.format == {"legacy": "torch", "dist": "torch_dist"}[kind]
    right = torch.load(folder / "logits.pt")
    logits = engine_logits(source, right["tokens"])
    assert 0.5 < logits.std() < 50, "logits that say something"
    assert largest(logits, right["logits"]) <= LIMIT


@pytest.mark.parametrize("kind", ["legacy", "dist"])
@pytest.mark.parametrize("case", TWO, ids=lambda case: case.name)
def test_two_ranks(of_two, case, kind):
    check(of_two / case.name, kind)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["legacy", "dist"])
@pytest.mark.parametrize("case", FOUR, ids=lambda case: case.name)
def test_four_ranks(of_four, case, kind):
    check(of_four / case.name, kind)


def test_both_formats_are_one_checkpoint_of_ours(of_two, tmp_path):
    """Imported into our format by two processes, with the padding of the vocabulary cut off."""
    folder = of_two / "llama-tp2"
    opened, done = import_megatron(str(folder / "dist"), str(tmp_path / "ours"), vocab_size=61, num_workers=2)
    ours = Checkpoint.open(str(tmp_path / "ours"))
    assert done.num_params == ModelSpec.of(ours.model).num_params and ours.model == opened.model
    assert ours.model.vocab_size == 61
    found = compare_weights(ours, MegatronSource(str(folder / "legacy"), 61))
    assert found.is_exact
    right = torch.load(folder / "logits.pt")
    assert largest(engine_logits(ours, right["tokens"]), right["logits"]) <= LIMIT


def test_slices_are_those_of_the_whole(of_two):
    source = MegatronSource(str(of_two / "llama-tp2" / "dist"))
    for param in ModelSpec.of(source.model).params:
        whole = source.read(param.name, (0,) * len(param.shape), param.shape)
        for row in range(0, param.shape[0], 7):
            size = (min(7, param.shape[0] - row), *param.shape[1:])
            part = source.read(param.name, (row, *(0 for _ in size[1:])), size)
            assert torch.equal(part, whole[row : row + size[0]]), (param.name, row)


def test_what_is_not_known_of_the_vocabulary_is_said(of_two):
    llama = MegatronSource(str(of_two / "llama-tp2" / "legacy"))
    assert llama.model.vocab_size == 64 and "--vocab-size" in llama.notes[0]
    gpt = MegatronSource(str(of_two / "gpt-tp2" / "legacy"))
    assert gpt.model.vocab_size == 61 and not gpt.notes
    with pytest.raises(ValueError, match="--vocab-size 65 is out of range"):
        MegatronSource(str(of_two / "llama-tp2" / "dist"), 65)
