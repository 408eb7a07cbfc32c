"""What a captured graph would read and write lies at the same addresses in every step.

A CUDA graph repeats kernels with the addresses that they were captured with. So parameters, gathered ones included,
gradients, the optimizer's state and the scalars that steer a step must stay where they are. (Graphs are not captured
yet: nothing here has run on a GPU.)
"""

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor

from megacore.config.schema import RunConfig
from megacore.parallel.wgrad import gradient_of
from megacore.sharding.lending import Buffers
from megacore.train.build import Built
from tests.engine.common import built_rank, run_config, step_of
from tests.pool import WorkerPool

Seen = list[tuple[str, int]]


class Watch:
    """Addresses of all parameters and gradients of a unit whenever it is about to compute."""

    def __init__(self, built: Built) -> None:
        self.built, self.seen = built, Seen()
        self.units = {
            (number, unit): params
            for number, stage in built.stages.items()
            for unit, params in enumerate(stage.unit_parameters())
        }
        storage, use = built.storage, built.storage.use

        def watched(unit: tuple[int, int], backward: bool) -> None:
            use(unit, backward)
            for (stage, number), params in self.units.items():
                if stage == unit[0] and unit[1] in (-1, number):
                    self.note(f"{'B' if backward else 'F'}{stage}/{number}", params.items(), backward)

        storage.use = watched  # type: ignore[method-assign]

    def note(self, where: str, params: Iterable[tuple[str, Tensor]], backward: bool) -> None:
        for name, param in params:
            self.seen.append((f"{where} {name}", param.data_ptr()))
            into = gradient_of(param) if backward else None
            if into is not None:
                self.seen.append((f"{where} gradient of {name}", into.data_ptr()))


def state_of(built: Built) -> Seen:
    """What stays between steps."""
    trainer, storage = built.trainer, built.storage
    named: dict[str, Any] = {"params": storage.params, "grads": storage.grads, "scale": trainer.loss_scale.scale}
    if storage.master is not None:
        named["master"] = storage.master
    for kind, tensors in trainer.rule.state().items():
        named |= {f"{kind} {number}": tensor for number, tensor in enumerate(tensors)}
    for number, tensor in enumerate((*storage.own_grads, *storage.weights, *storage.own_params)):
        named[f"run {number}"] = tensor
    if not storage.policy.params:
        named |= {f"parameter {name}": param for name, param in storage.parameters.items()}
    if not storage.policy.grads:
        named |= {f"gradient of {name}": gradient_of(param) for name, param in storage.parameters.items()}
    return [(name, tensor.data_ptr()) for name, tensor in named.items()]


def addresses_of_rank(rank: int, world_size: int, config: RunConfig, num_steps: int = 4) -> list[tuple[Seen, Seen]]:
    built = built_rank(rank, world_size, config)
    watch, steps = Watch(built), []
    for step in range(1, num_steps + 1):
        watch.seen.clear()
        step_of(built, step, config.optim.lr)
        steps.append((list(watch.seen), state_of(built)))
    return steps


LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "dp2": (2, ()),
    "dp2 zero1 bf16": (2, ("parallel.zero=1", "precision.dtype=bf16")),
    "dp2 zero2": (2, ("parallel.zero=2",)),
    "dp2 zero3": (2, ("parallel.zero=3",)),
    "dp2 zero3 bf16, recomputed": (2, ("parallel.zero=3", "precision.dtype=bf16", "parallel.recompute=full")),
    "pp2 dp2 zero3 zb-h1": (4, ("parallel.pp=2", "parallel.zero=3", "parallel.schedule=zb-h1")),
}


QUICK = ("dp2 zero1 bf16", "dp2 zero3")


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in LAYOUTS])
def test_addresses_stay(pool: WorkerPool, name: str) -> None:
    world_size, overrides = LAYOUTS[name]
    config = run_config(world_size, "model.num_layers=4", *overrides)
    for steps in pool.run(addresses_of_rank, world_size, world_size, config):
        (first, state), *others = steps
        assert len(state) >= 8 and bool(first) == (config.parallel.zero > 0)
        assert all(address for _, address in first), "whatever computes has memory"
        for number, (seen, kept) in enumerate(others, 2):
            assert kept == state, f"state has moved in step {number}"
            moved = [name for (name, now), (_, before) in zip(seen, first, strict=True) if now != before]
            assert not moved, f"step {number}: {moved[:5]} of {len(moved)}"


def test_whatever_moves_is_seen() -> None:
    built = built_rank(0, 1, run_config(1))
    before = state_of(built)
    assert state_of(built) == before
    name, param = next(iter(built.storage.parameters.items()))
    param.data = param.data.clone()
    moved = [after for after, known in zip(state_of(built), before, strict=True) if after != known]
    assert [each for each, _ in moved] == [f"parameter {name}"]


def test_buffers_that_come_back_in_another_order_are_taken_in_the_same() -> None:
    buffers = Buffers(torch.float32, torch.device("cpu"))
    first = [buffers.take(8) for _ in range(3)]
    for each in (first[1], first[2], first[0]):
        buffers.give(each)
    assert [buffers.take(8).data_ptr() for _ in range(3)] == [each.data_ptr() for each in first]
    assert buffers.take(8).data_ptr() not in {each.data_ptr() for each in first}
