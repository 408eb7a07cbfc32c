"""Fixtures that all rooms' tests share."""

from collections.abc import Iterator

import pytest

from tests.pool import WorkerPool


@pytest.fixture(scope="session")
def pool() -> Iterator[WorkerPool]:
    """Worker processes for distributed jobs: `pool.run(function, world_size, *args)` gives one result per rank."""
    workers = WorkerPool()
    yield workers
    workers.close()
