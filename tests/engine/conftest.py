"""Engine tests in this process use one thread, as the pool's workers do: tiny matrices only lose by sharing."""

import pytest
import torch


@pytest.fixture(autouse=True, scope="package")
def one_thread() -> None:
    torch.set_num_threads(1)
