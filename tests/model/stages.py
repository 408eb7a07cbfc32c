"""What the tests of the model share: small stages and microbatches, and how much memory something takes."""

import os
from collections.abc import Callable
from itertools import accumulate
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from megacore.config.resolve import resolve_model
from megacore.config.schema import ModelConfig
from megacore.kernels.table import resolve
from megacore.model.inputs import Inputs
from megacore.model.stage import Objective, Stage
from megacore.parallel.parameters import ParameterMaker
from megacore.parallel.tensor import TensorParallel
from megacore.spec import ModelSpec

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler writes two lines of its own per use otherwise

CPU = torch.device("cpu")
LENGTH = 16
TINY = ModelConfig(num_layers=3, hidden_size=24, num_heads=4, num_kv_heads=2, head_dim=6, vocab_size=38)


def stage_of(
    model: ModelConfig,
    dtype: torch.dtype,
    tp: TensorParallel | None = None,
    recompute: str = "none",
    first: bool = True,
    last: bool = True,
) -> Stage:
    """All of a model's layers, with gradients that begin at zero where backward adds to them."""
    model, tp = resolve_model(model, LENGTH), tp or TensorParallel.single()
    kernels, _ = resolve(CPU, dtype)
    make = ParameterMaker(ModelSpec.of(model, tp.sequence).by_name, tp.group, CPU, dtype, seed=3)
    layers = range(model.num_layers)
    stage = Stage(model, make, tp, kernels, Objective(), layers, first, last, recompute=recompute)
    for param in stage.parameters():
        param.grad = torch.zeros_like(param)
    return stage


def microbatch(model: ModelConfig, number: int, size: int = 2, documents: bool = False) -> Inputs:
    """Microbatch ``number`` of a run, some of its tokens without targets."""
    generator = torch.Generator().manual_seed(number)
    token_bs = torch.randint(model.vocab_size, (size, LENGTH), generator=generator)
    label_bs = token_bs.roll(-1, 1).masked_fill(torch.rand(token_bs.shape, generator=generator) < 0.2, -100)
    document_bs = torch.rand(token_bs.shape, generator=generator).lt(0.2).cumsum(1) if documents else None
    return Inputs(token_bs, label_bs, torch.arange(size) + size * number, document_bs=document_bs)


def allocated(run: Callable[[], Any]) -> tuple[int, int]:
    """Bytes that ``run`` leaves behind, its result included, and the most that it had at once."""
    run()  # what is made once, such as memory for logits, is there already
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = run()
    assert profiler.profiler is not None
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    del result
    return sum(sizes), max(accumulate(sizes, initial=0))
