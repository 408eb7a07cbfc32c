"""Opens weights, whatever lies at a path."""

from megacore.checkpoint.hf.folder import HfFolder, is_hf_folder
from megacore.checkpoint.read import Checkpoint
from megacore.checkpoint.source import WeightSource


def open_weights(path: str, vocab_size: int = 0) -> WeightSource:
    """The weights in an HF folder, in a checkpoint's folder, or in the newest whole checkpoint of a run.

    ``vocab_size``: of an HF folder whose vocabulary was padded, the rows that count (0: all). Raises ValueError where
    there are none, or not whole ones.
    """
    if is_hf_folder(path):
        return HfFolder(path, vocab_size)
    if vocab_size:
        raise ValueError(f"--vocab-size {vocab_size} is for HF folders, but {path} is none: it has no config.json")
    return Checkpoint.open(path)
