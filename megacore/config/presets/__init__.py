"""Known models as run files. Each is pure data, with its source in the first line."""

from pathlib import Path

from megacore.config.errors import ConfigError, did_you_mean

_FOLDER = Path(__file__).parent


def preset_names() -> tuple[str, ...]:
    """Names that `--preset` takes, in alphabetical order."""
    return tuple(sorted(path.stem for path in _FOLDER.glob("*.toml")))


def preset_path(name: str) -> Path:
    """The run file of a preset. Raises ConfigError if there is none of this name."""
    names = preset_names()
    if name not in names:
        raise ConfigError([f"there is no preset {name}; {did_you_mean(name, names)}"])
    return _FOLDER / f"{name}.toml"
