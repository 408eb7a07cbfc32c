"""Small data sets for the tests of data/."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from megacore.data.indexed import IndexedWriter

MakeData = Callable[..., str]


@pytest.fixture
def make_data(tmp_path: Path) -> MakeData:
    """make_data(documents, name="data", dtype="uint16") -> prefix of a data set with these documents."""

    def make(documents: Sequence[Sequence[int]], name: str = "data", dtype: str = "uint16") -> str:
        prefix = str(tmp_path / name)
        with IndexedWriter(prefix, dtype) as writer:
            for document in documents:
                writer.add_document(np.array(document, np.int64))
        return prefix

    return make
