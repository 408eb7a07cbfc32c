"""Data and whole runs that several files hold theirs against."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from megacore.launch.train import main
from tests.train.runs import FEATURES, words_of, write_corpus


@contextmanager
def alone() -> Iterator[None]:
    """Runs of one process compute here, and are far too small to be shared out."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    with alone():
        yield


@pytest.fixture(scope="session")
def letters(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_corpus(str(tmp_path_factory.mktemp("data") / "letters"), 1)


@pytest.fixture(scope="session")
def uninterrupted(letters: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folder of each feature's uninterrupted run in one process."""
    folders = {}
    for name, features in FEATURES.items():
        folders[name] = tmp_path_factory.mktemp(name) / "run"
        with alone():
            assert main(words_of(letters, folders[name], *features)) == 0
    return folders
