"""Whether a run can write where it is to write, and finds what it is to begin with: asked before any process starts.

Nothing is left behind: folders that are not there yet are not made, and the file that is tried has no name.
"""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from megacore.config.errors import ConfigError
from megacore.config.parse import show
from megacore.config.schema import RunConfig

REMOTE = "://"
LONGEST_NAME = 255
"""Of a file, on every usual file system."""
BEGIN_ANYWHERE = ("auto", "never")


def check_folders(config: RunConfig) -> None:
    """Raises ConfigError with every folder of the run that cannot be used on this machine."""
    if problems := [*_unwritable(config), *_missing(config)]:
        raise ConfigError(problems)


def _unwritable(config: RunConfig) -> Iterator[str]:
    c, optim = config.checkpoint, config.optim
    wanted = {
        "out": config.out,
        "checkpoint.folder": c.folder if c.save_every else "",
        "optim.offload_folder": optim.offload_folder if optim.offload == "nvme" else "",
        "data.cache": config.data.cache,
    }
    for key, folder in wanted.items():
        if folder and REMOTE not in folder and (reason := obstacle(Path(folder))):
            yield f"{key}={show(folder)} cannot be written ({reason}); name a folder that can"


def _missing(config: RunConfig) -> Iterator[str]:
    c = config.checkpoint
    for key, path in (("resume", "" if c.resume in BEGIN_ANYWHERE else c.resume), ("init_from", c.init_from)):
        if not path or REMOTE in path:
            continue
        try:
            Path(path).stat()
        except OSError as error:
            fix = "name the folder of a checkpoint or a run"
            yield f"checkpoint.{key}={show(path)} cannot be read ({error.strerror}); {fix}"


def obstacle(folder: Path) -> str:
    """Why no file can be made in ``folder``, which may be still to be made; '' if one can."""
    path = folder.absolute()
    if any(len(os.fsencode(part)) > LONGEST_NAME for part in path.parts):
        return f"a name in it has more than {LONGEST_NAME} bytes"
    try:
        while True:
            try:
                path.lstat()
                break
            except FileNotFoundError:
                path = path.parent
        if not path.is_dir():
            return f"{show(str(path))} is no folder"
        with tempfile.TemporaryFile(dir=path):
            return ""
    except OSError as error:
        return error.strerror or str(error)
