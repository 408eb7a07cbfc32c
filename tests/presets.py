"""The presets that the engine trains: those of mixtures of experts and latent attention are there to be planned."""

from megacore.config.load import load
from megacore.config.presets import preset_names
from megacore.config.supported import unsupported


def trained() -> tuple[str, ...]:
    return tuple(name for name in preset_names() if not list(unsupported(load(None, [], name))))
