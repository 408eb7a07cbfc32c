"""Megatron-Core itself on CPUs: makes checkpoints of random models in both formats, and their logits.

Run as a program by each rank, since it has to bend torch.cuda and to stand in for packages that only GPUs need:

    python -m tests.checkpoint.megatron.oracle RANK WORLD FOLDER     cases from FOLDER/cases.json

Of each case it writes FOLDER/NAME/legacy (as Megatron-LM's training/checkpointing.py does: one file per rank), /dist
(by megatron.core.dist_checkpointing) and logits.pt.
"""

import argparse
import contextlib
import hashlib
import importlib.abc
import importlib.machinery
import json
import logging
import os
import random
import sys
import types
import warnings
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ITERATION = 7
SAMPLE = 12


@dataclass(frozen=True)
class Case:
    """``config`` are fields of TransformerConfig beside the usual ones, ``model`` arguments of GPTModel, ``args`` the
    settings as Megatron-LM names them, ``metadata`` options of sharded_state_dict."""

    name: str
    tp: int = 1
    pp: int = 1
    vp: int | None = None
    config: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    args: dict[str, Any] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)
    activation: str = "gelu"
    vocab_rows: int = 64

    def write(self) -> dict[str, Any]:
        return asdict(self)


class Anything:
    """Of packages that are only imported, not used."""

    def __call__(self, *args: Any, **more: Any) -> Any:
        return args[0] if len(args) == 1 and callable(args[0]) and not more else Anything()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Anything()


class Pretended(types.ModuleType):
    __path__: list[str] = []
    __version__ = "3.9.0"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Anything()


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds triton, which Megatron-Core imports for kernels that a CPU never runs."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if name.split(".")[0] == "triton" else None

    def create_module(self, spec: Any) -> Any:
        return Pretended(spec.name)

    def exec_module(self, module: Any) -> None:
        pass


def prepare() -> None:
    """Let Megatron-Core run where there is no GPU."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    import torch._dynamo.testing
    import torch._inductor.utils
    import torch.utils.flop_counter

    sys.meta_path.insert(0, Finder())
    torch.cuda.current_device = lambda: torch.device("cpu")
    torch.cuda.synchronize = lambda *args: None
    torch.Tensor.cuda = lambda tensor, *args, **more: tensor
    import megatron.core.dist_checkpointing.strategies.filesystem_async as writer
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    CudaRNGStatesTracker.fork = lambda *args, **more: contextlib.nullcontext()
    writer._process_memory = lambda: 0


def main(rank: int, world: int, folder: Path) -> None:
    prepare()
    import torch
    from megatron.core import parallel_state

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    for values in json.loads((folder / "cases.json").read_text()):
        case = Case(**values)
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=case.tp,
            pipeline_model_parallel_size=case.pp,
            virtual_pipeline_model_parallel_size=case.vp,
        )
        of_case(case, folder / case.name)
        torch.distributed.barrier()
        parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()


def of_case(case: Case, folder: Path) -> None:
    import torch
    from megatron.core import dist_checkpointing, parallel_state

    chunks = build(case)
    rank, tp, pp = (
        torch.distributed.get_rank(),
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_pipeline_model_parallel_rank(),
    )
    generator = torch.Generator().manual_seed(3)
    token_bs = torch.randint(case.vocab_rows - 3, (2, SAMPLE), generator=generator)
    logits = forward(chunks, token_bs, case, pp)
    if logits is not None and tp == 0:
        folder.mkdir(parents=True, exist_ok=True)
        torch.save({"tokens": token_bs, "logits": logits}, folder / "logits.pt")
    args = arguments(case)
    state: dict[str, Any] = {"args": args, "checkpoint_version": 3.0, "iteration": ITERATION}
    names = ["model"] if len(chunks) == 1 else [f"model{number}" for number in range(len(chunks))]
    save_legacy(
        state | {name: each.state_dict_for_save_checkpoint() for name, each in zip(names, chunks)}, folder, case
    )
    dist = folder / "dist" / f"iter_{ITERATION:07d}"
    dist.mkdir(parents=True, exist_ok=True)
    torch.distributed.barrier()
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    metadata = {"dp_cp_group": group, **case.metadata}
    dist_checkpointing.save(
        state | {name: each.sharded_state_dict(metadata=metadata) for name, each in zip(names, chunks)}, str(dist)
    )
    if rank == 0:
        for kind in ("legacy", "dist"):
            (folder / kind / "latest_checkpointed_iteration.txt").write_text(str(ITERATION))


def build(case: Case) -> list[Any]:
    import torch
    from megatron.core import parallel_state
    from megatron.core.activations import squared_relu
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer.transformer_config import TransformerConfig

    functional = torch.nn.functional
    activation = {"gelu": functional.gelu, "silu": functional.silu, "relu2": squared_relu}[case.activation]
    usual = {
        "use_cpu_initialization": True,
        "activation_func": activation,
        "tensor_model_parallel_size": case.tp,
        "pipeline_model_parallel_size": case.pp,
        "virtual_pipeline_model_parallel_size": case.vp,
        "pipeline_dtype": torch.float32,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "bias_dropout_fusion": False,
        "masked_softmax_fusion": False,
        "bias_activation_fusion": False,
    }
    config = TransformerConfig(**(usual | case.config))
    spec = get_gpt_layer_local_spec(
        normalization=config.normalization, qk_layernorm=case.config.get("qk_layernorm", False)
    )
    chunks = []
    for number in range(case.vp or 1):
        more = {} if case.vp is None else {"vp_stage": number}
        model = GPTModel(
            config,
            spec,
            vocab_size=case.vocab_rows,
            max_sequence_length=32,
            pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, **more),
            post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, **more),
            parallel_output=False,
            **more,
            **case.model,
        )
        fill(model, case)
        chunks.append(model.eval())
    return chunks


def fill(model: Any, case: Case) -> None:
    """Random numbers that are equal where ranks share a parameter and differ everywhere else."""
    import torch
    from megatron.core import parallel_state

    stage = parallel_state.get_pipeline_model_parallel_rank(), model.vp_stage
    for name, parameter in model.named_parameters():
        key = name, stage
        tied = name == "output_layer.weight" and case.model["share_embeddings_and_output_weights"]
        if "word_embeddings" in name or tied:
            key = "embedding", ()
        split = getattr(parameter, "tensor_model_parallel", False)
        tp = parallel_state.get_tensor_model_parallel_rank() if split else 0
        seed = int.from_bytes(hashlib.sha256(repr((key, tp)).encode()).digest()[:6], "little")
        noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            parameter.copy_(1 + 0.2 * noise if "norm.weight" in name or "norm_weight" in name else 0.2 * noise)


def forward(chunks: list[Any], token_bs: Any, case: Case, pp: int) -> Any:
    """Logits on the last stage: activations walk from stage to stage by plain messages."""
    import torch
    from megatron.core import parallel_state

    position_bs = torch.arange(SAMPLE).expand_as(token_bs)
    mask = torch.triu(torch.ones(SAMPLE, SAMPLE, dtype=torch.bool), 1)[None, None]
    group = parallel_state.get_pipeline_model_parallel_group()
    shape = (SAMPLE, len(token_bs), case.config["hidden_size"])
    order = [(number, stage) for number in range(len(chunks)) for stage in range(case.pp)]
    out, x = None, torch.empty(shape)
    with torch.no_grad():
        for place, (number, stage) in enumerate(order):
            if stage == pp:
                chunks[number].set_input_tensor(None if place == 0 else x)
                out = chunks[number](token_bs, position_bs, mask)
            if place + 1 < len(order) and case.pp > 1:
                if stage == pp:
                    torch.distributed.send(out.contiguous(), group_dst=order[place + 1][1], group=group)
                elif order[place + 1][1] == pp:
                    torch.distributed.recv(x, group_src=stage, group=group)
    return out if pp == case.pp - 1 else None


def arguments(case: Case) -> argparse.Namespace:
    """Settings under the names of Megatron-LM's command line, with the kinds of values that occur there."""
    import torch
    from megatron.core.enums import ModelType
    from megatron.core.transformer.enums import AttnBackend

    config, model = case.config, case.model
    values = {
        "tensor_model_parallel_size": case.tp,
        "pipeline_model_parallel_size": case.pp,
        "virtual_pipeline_model_parallel_size": case.vp,
        "params_dtype": torch.float32,
        "attention_backend": AttnBackend.auto,
        "model_type": ModelType.encoder_or_decoder,
        "num_layers": config["num_layers"],
        "hidden_size": config["hidden_size"],
        "ffn_hidden_size": config["ffn_hidden_size"],
        "num_attention_heads": config["num_attention_heads"],
        "kv_channels": config["kv_channels"],
        "group_query_attention": "num_query_groups" in config,
        "num_query_groups": config.get("num_query_groups", 1),
        "normalization": config.get("normalization", "LayerNorm"),
        "norm_epsilon": config.get("layernorm_epsilon", 1e-5),
        "add_bias_linear": config.get("add_bias_linear", True),
        "add_qkv_bias": config.get("add_qkv_bias", False),
        "swiglu": case.activation == "silu",
        "squared_relu": case.activation == "relu2",
        "bias_gelu_fusion": config.get("bias_activation_fusion", False),
        "qk_layernorm": config.get("qk_layernorm", False),
        "untie_embeddings_and_output_weights": not model["share_embeddings_and_output_weights"],
        "position_embedding_type": model["position_embedding_type"],
        "rotary_base": model.get("rotary_base", 10000),
        "rotary_percent": model.get("rotary_percent", 1.0),
        "use_rope_scaling": model.get("rope_scaling", False),
        "max_position_embeddings": 32,
        "seq_length": 32,
        "padded_vocab_size": case.vocab_rows,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "init_method_std": 0.02,
        "num_experts": None,
        "multi_latent_attention": False,
        "cp_comm_type": ["p2p"],
        "data_path": None,
    }
    return argparse.Namespace(**(values | case.args))


def save_legacy(state: dict[str, Any], folder: Path, case: Case) -> None:
    """One file of each model-parallel rank, of the first of its replicas, with what else Megatron-LM puts there."""
    import numpy as np
    import torch
    from megatron.core import parallel_state

    if parallel_state.get_data_parallel_rank(with_context_parallel=True):
        return
    tp, pp = parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_pipeline_model_parallel_rank()
    name = f"mp_rank_{tp:02d}" + (f"_{pp:03d}" if case.pp > 1 else "")
    place = folder / "legacy" / f"iter_{ITERATION:07d}" / name
    place.mkdir(parents=True, exist_ok=True)
    state["optimizer"] = {"optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 1e-3}]}}
    state["opt_param_scheduler"] = {"max_lr": 1e-3, "num_steps": 12}
    state["rng_state"] = [
        {
            "random_rng_state": random.getstate(),
            "np_rng_state": np.random.RandomState(1).get_state(),
            "torch_rng_state": torch.get_rng_state(),
        }
    ]
    torch.save(state, place / "model_optim_rng.pt")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
