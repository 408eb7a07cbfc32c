"""That weights go on, and go out, with the tokenizer that they were trained with: another one of the same size would
give their ids another meaning, and nothing else would show it."""

from collections.abc import Mapping
from pathlib import PurePosixPath

from megacore.checkpoint.hf.folder import TOKENIZER
from megacore.checkpoint.hf.tokenizer import tokenizer_files
from megacore.checkpoint.read import Checkpoint
from megacore.checkpoint.source import WeightSource
from megacore.data.tokenizers.base import FORMATS, file_hash

HASH = "tokenizer"
"""Key of a checkpoint's state: the hash of its run's tokenizer."""


def vocabularies_of(files: Mapping[str, bytes]) -> dict[str, bytes]:
    """Those of a tokenizer's files that say which text an id stands for."""
    found = {name: data for name, data in files.items() if PurePosixPath(name).suffix in FORMATS}
    return {name: data for name, data in found.items() if not name.endswith(("_config.json", "_map.json"))}


def is_same(inherited: Mapping[str, bytes], own: Mapping[str, bytes], spec: str) -> bool:
    """Whether a run's tokenizer (its files, as attachments, and ``data.tokenizer``) is the one that came with weights,
    as it is or as an export has it."""
    theirs = {key: data for key, data in inherited.items() if key.startswith(TOKENIZER)}
    ours = {**vocabularies_of(own), **vocabularies_of(tokenizer_files(own, spec).files)}
    return bool(set(ours.values()) & set(vocabularies_of(theirs).values()))


def joined(inherited: Mapping[str, bytes], own: Mapping[str, bytes], spec: str) -> dict[str, bytes]:
    """What goes with a run's weights: what came with them, and its own tokenizer in place of any other."""
    if not spec:  # the data do not say; what came with the weights is the best guess
        return {**inherited, **own}
    kept = dict(inherited)
    if not is_same(inherited, own, spec):
        kept = {key: data for key, data in kept.items() if not key.startswith(TOKENIZER)}
    return {**{key: data for key, data in kept.items() if data not in own.values()}, **own}


def other_tokenizer(state_hash: object, attachments: Mapping[str, bytes]) -> bool:
    """Whether the tokenizer among attachments is not the one with this hash, as far as both are known."""
    files = vocabularies_of({key: data for key, data in attachments.items() if key.startswith(TOKENIZER)})
    hashes = {file_hash(PurePosixPath(name).suffix, data) for name, data in files.items()}
    return bool(state_hash and hashes and state_hash not in hashes)


def check_export(source: WeightSource) -> None:
    """Raise ValueError where a checkpoint has another tokenizer beside it than it was trained with."""
    if not isinstance(source, Checkpoint):
        return
    trained = source.manifest.state.get(HASH)
    if other_tokenizer(trained, source.attachments):
        raise ValueError(
            f"{source.what} was trained with the tokenizer of content hash {str(trained)[:12]}, which is not the one "
            "that lies beside its weights: what is exported would write other text; go on from it with data.tokenizer "
            "set to the tokenizer of its data, and export that"
        )
