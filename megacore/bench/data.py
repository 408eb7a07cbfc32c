"""Which benchmarks of the data side there are, and which can run on this machine."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec

from megacore.bench import data_index, data_tokenize
from megacore.bench.baselines.megatron_core import open_package
from megacore.bench.harness import Comparison


@dataclass(frozen=True)
class Benchmark:
    """A comparison that can be asked for by name; ``package`` is what it compares with."""

    name: str
    package: str
    measure: Callable[[int], Comparison]  # of the number of rounds

    @property
    def runnable(self) -> bool:
        """Whether the package is there."""
        return open_package() if self.package == data_index.BASELINE else find_spec(self.package) is not None


def benchmarks(wanted: str = "") -> list[Benchmark]:
    """Those whose name contains ``wanted``. Raises ValueError if there is none."""
    everything = list(_all())
    chosen = [one for one in everything if wanted in one.name]
    if not chosen:
        raise ValueError(f"no benchmark's name contains {wanted!r}; there are {'; '.join(o.name for o in everything)}")
    return chosen


def _all() -> Iterator[Benchmark]:
    for index in data_index.CASES:
        yield Benchmark(f"indices: {index.name}", data_index.BASELINE, partial(data_index.measure, index))
    for text in data_tokenize.CASES:
        yield Benchmark(f"tokenise: {text.name}", text.library, partial(data_tokenize.measure, text))
