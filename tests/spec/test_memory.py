"""Bytes of state by arithmetic against those of real buffers."""

import pytest

from megacore.config.schema import OptimConfig
from megacore.monitor.console import human_bytes
from megacore.spec import ModelSpec
from megacore.spec.memory import state_bytes
from megacore.train.pipeline_overview import Pipeline
from tests.engine.common import built_rank, run_config
from tests.pool import WorkerPool


def held(rank: int, world_size: int, overrides: tuple[str, ...]) -> tuple[int, int, int]:
    """Elements of slots times their size: parameters, gradients, optimizer state."""
    built = built_rank(rank, world_size, run_config(world_size, *overrides))
    size = built.storage.params.element_size()
    bytes_of_slots = sum(slot.numel for slot in built.storage.layout.slots) * size
    state = vars(built.trainer.optimizer)
    buffers = [state[name] for name in ("first", "second", "velocity") if state.get(name) is not None]
    return bytes_of_slots, bytes_of_slots, bytes_of_slots * len(buffers)


@pytest.mark.parametrize("rule", [("optim.name=adamw",), ("optim.name=sgd",), ("optim.name=sgd", "optim.momentum=0.9")])
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_state_is_what_ranks_hold(pool: WorkerPool, tp: int, rule: tuple[str, ...]) -> None:
    overrides = (f"parallel.tp={tp}", *rule)
    config = run_config(tp, *overrides)
    spec = ModelSpec.of(config.model)
    for rank, expected in enumerate(pool.run(held, tp, tp, overrides)):
        state = state_bytes(spec.params, config.optim, config.precision.dtype, rank, tp)
        assert (state.params, state.grads, state.optimizer) == expected
        assert state.total == sum(expected)


@pytest.mark.parametrize("schedule", ["1f1b", "zb-v"])
@pytest.mark.parametrize("tied", [False, True])
def test_state_of_a_pipeline_is_what_its_ranks_hold(pool: WorkerPool, schedule: str, tied: bool) -> None:
    overrides = ("parallel.pp=2", f"parallel.schedule={schedule}", f"model.tie_embeddings={str(tied).lower()}")
    config = run_config(2, *overrides)
    of_ranks = Pipeline.of(config).params(ModelSpec.of(config.model))
    states = [state_bytes(params, config.optim, config.precision.dtype) for params in of_ranks]
    expected = pool.run(held, 2, 2, overrides)
    assert [(state.params, state.grads, state.optimizer) for state in states] == expected


def test_published_example_in_full_precision() -> None:
    """AdamW in fp32 keeps 16 bytes per parameter."""
    config = run_config(1)
    spec = ModelSpec.of(config.model)
    assert state_bytes(spec.params, OptimConfig(), "fp32").total == 16 * spec.num_params


@pytest.mark.parametrize(("number", "text"), [(950, "950 B"), (11_200, "11.2 kB"), (3.4e9, "3.40 GB"), (0, "0 B")])
def test_bytes_as_people_say_them(number: float, text: str) -> None:
    assert human_bytes(number) == text
