"""The blocks' linear layers where they are transformer-engine's: chosen, or refused with the reason."""

import torch

from megacore.config.fp8 import TRANSFORMER_ENGINE
from megacore.config.modules import uses_modules
from megacore.config.schema import RunConfig
from megacore.kernels import transformer_engine
from megacore.kernels.choice import Choice, first_willing
from megacore.layout.policy import ShardingPolicy
from megacore.mesh.mesh import ParallelMesh
from megacore.parallel.transformer_engine import TransformerEngine, no_fp8, recipe_of
from megacore.schedule.instruction import Op
from megacore.schedule.schedule import Schedule
from megacore.spec import ModelSpec
from megacore.spec.fp8 import fp8_layers


def make_modules(
    config: RunConfig, spec: ModelSpec, mesh: ParallelMesh, schedule: Schedule, dtype: torch.dtype, device: torch.device
) -> tuple[TransformerEngine | None, tuple[Choice, ...]]:
    """transformer-engine's layers, if the run asks for them by name. Raises ValueError where they cannot serve. All
    ranks must call it."""
    if not uses_modules(config):
        return None, ()
    if mesh.device.type == "meta":
        raise ValueError(
            f"kernels.use=linear={TRANSFORMER_ENGINE}: its modules compute on a GPU alone, not in a dry run; leave it "
            "out there, since ours hold the same"
        )
    kernel, choice = first_willing((transformer_engine.MODULES,), device, dtype, TRANSFORMER_ENGINE)
    splits = any(each.op is Op.WEIGHT_GRAD for instructions in schedule.ranks for each in instructions)
    policy = ShardingPolicy.of(config.parallel.zero)
    if splits and policy.by_unit:
        raise ValueError(
            f"parallel.schedule={config.parallel.schedule} puts weight gradients off, which {TRANSFORMER_ENGINE} then "
            f"makes in its own order, and parallel.zero={config.parallel.zero} has memory for them in another; use "
            "zero=1, another schedule, or another linear"
        )
    precision = config.precision
    if precision.fp8 == "off":
        return TransformerEngine(kernel.loaded, splits=splits), (choice,)
    if reason := no_fp8(precision.fp8):
        raise ValueError(f"precision.fp8={precision.fp8}: {TRANSFORMER_ENGINE} has none of it here: {reason}; use off")
    amax = mesh.same_stages() if precision.fp8 == "delayed" else None
    recipe = recipe_of(precision.fp8, precision.fp8_history, precision.fp8_margin, amax is not None and amax.size > 1)
    layers = fp8_layers(spec, precision)
    modules = TransformerEngine(kernel.loaded, layers, recipe, amax, keeps=not policy.params, splits=splits)
    return modules, (Choice(choice.operation, f"{choice.backend}, fp8 {precision.fp8}", choice.rejected),)
