"""megatron-core's dataset modules, imported without the rest of it.

`import megatron.core` loads all of Megatron and needs Triton. Its dataset modules do not: an empty package in its
place lets them be imported alone.
"""

import importlib.util
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType


def open_package() -> bool:
    """Put `megatron.core` into sys.modules as a bare package, unless it is loaded; False: it is not installed."""
    if "megatron.core" in sys.modules:
        return True
    found = importlib.util.find_spec("megatron")
    folders = [Path(place) / "core" for place in (found.submodule_search_locations or ())] if found else []
    folder = next((folder for folder in folders if (folder / "datasets" / "gpt_dataset.py").is_file()), None)
    if folder is None:
        return False
    package = ModuleType("megatron.core")
    package.__path__ = [str(folder)]
    sys.modules["megatron.core"] = package
    import_module("megatron.core.parallel_state")  # first: its circle of imports closes only from this end
    return True
