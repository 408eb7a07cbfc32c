"""Fixtures that all rooms' tests share."""

from collections.abc import Iterator

import pytest
from hypothesis import settings

from tests.pool import WorkerPool

# A busy machine is not a fault: only the number of examples bounds a property's time.
settings.register_profile("megacore", deadline=None)
settings.load_profile("megacore")


@pytest.fixture(scope="session")
def pool() -> Iterator[WorkerPool]:
    """Worker processes for distributed jobs: `pool.run(function, world_size, *args)` gives one result per rank."""
    workers = WorkerPool()
    yield workers
    workers.close()
