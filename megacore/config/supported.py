"""What can be written in a run file but is not built yet: refused by name, never ignored.

One table. When a feature lands, its line goes or its list of values grows.
"""

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

from megacore.config.parse import show
from megacore.config.schema import RunConfig
from megacore.config.write import flatten

# The values that work today, of each key of which not all values do.
WORKS: Mapping[str, tuple[Any, ...]] = MappingProxyType(
    {
        "model.num_experts": (0,),
        "model.top_k": (0,),
        "model.kv_lora_rank": (0,),
        "parallel.cp": (1,),
        "parallel.ep": (1,),
    }
)


def unsupported(config: RunConfig) -> Iterator[str]:
    """A line for every key whose value the engine cannot honour yet, resolved or not."""
    flat = flatten(config)
    for key, values in WORKS.items():
        if flat[key] not in values:
            yield f"{key}={show(flat[key])} is not supported yet; what works today: {' or '.join(map(show, values))}"
    parallel = config.parallel
    if parallel.etp not in (0, parallel.tp):
        yield f"parallel.etp={parallel.etp} is not supported yet; leave it out"
