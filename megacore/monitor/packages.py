"""Packages that some keys of a run need: looked for, not imported, before anything starts."""

from collections.abc import Iterator
from importlib.util import find_spec

from megacore.config.schema import RunConfig

NEEDS = (
    ("log.tensorboard", "tensorboard", "monitor"),
    ("log.wandb", "wandb", "wandb"),
    ("log.mlflow", "mlflow", "mlflow"),
)
"""Key, package, and the extra of ours that brings it."""


def missing_packages(config: RunConfig) -> Iterator[str]:
    """A line for each key whose package is not installed here."""
    for key, package, extra in NEEDS:
        if getattr(config.log, key.partition(".")[2]) and find_spec(package) is None:
            fix = f'run: pip install "megacore[{extra}]", or set {key}=false'
            yield f"{key}=true needs the {package} package, which is not installed; {fix}"


def check_packages(config: RunConfig) -> None:
    """Raises ValueError with all that is missing."""
    if lines := list(missing_packages(config)):
        raise ValueError("\n".join(lines))
