"""The memory that processes take follows the arithmetic of `spec/memory.py`."""

import resource

import pytest

from megacore.config.schema import RunConfig
from megacore.spec import ModelSpec
from megacore.spec.memory import state_bytes
from tests.engine.common import built_rank, run_config, step_of
from tests.pool import WorkerPool

# What a stage saves is far more than a few units, which are under way at once.
WIDE = (
    "model.hidden_size=384",
    "model.ffn_hidden_size=1536",
    "model.head_dim=96",
    "model.num_layers=24",
    "model.vocab_size=300",
    "train.micro_batch_size=1",
    "train.global_batch_size=2",
    "precision.dtype=fp32",
)


def peak_growth_of_rank(rank: int, world_size: int, config: RunConfig) -> int:
    """Bytes by which the most memory ever taken exceeds that of a tiny run, which brings all libraries."""
    step_of(built_rank(rank, world_size, run_config(world_size, f"parallel.zero={config.parallel.zero}")), 1, 1e-3)
    before = peak()
    built = built_rank(rank, world_size, config)
    step_of(built, 1, 1e-3)
    step_of(built, 2, 1e-3)
    return peak() - before


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # kibibytes on Linux


@pytest.mark.slow
def test_processes_take_what_is_foretold() -> None:
    """Besides state there are activations, and the units, buckets and messages that are under way: less than 200 MB."""
    grown = {}
    for zero in (0, 1, 2, 3):
        config = run_config(2, *WIDE, f"parallel.zero={zero}")
        params = ModelSpec.of(config.model).params
        foretold = state_bytes(params, config.optim, "fp32", zero=zero, shards=2).total
        workers = WorkerPool()  # fresh ones: a process' peak is never forgotten
        try:
            grown[zero] = max(workers.run(peak_growth_of_rank, 2, 2, config))
        finally:
            workers.close()
        print(f"zero={zero}: foretold {foretold / 1e6:.0f} MB, grown by {grown[zero] / 1e6:.0f} MB")
        assert 0.95 * foretold <= grown[zero] <= 1.05 * foretold + 200e6
    assert grown[3] < grown[2] < grown[0]
