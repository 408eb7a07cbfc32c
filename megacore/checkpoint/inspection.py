"""What `megacore inspect` tells of a checkpoint, a run or a Hugging Face folder. Reads manifests, not tensors."""

from collections.abc import Mapping
from math import prod
from types import MappingProxyType
from typing import Any

from megacore.checkpoint.find import CHECKPOINTS, LATEST, folder_of, steps_in
from megacore.checkpoint.manifest import MANIFEST, Manifest, read_manifest
from megacore.checkpoint.store import Store, open_store
from megacore.config.load import from_tree
from megacore.config.write import config_hash

ITEM_BITS: Mapping[str, int] = MappingProxyType({"BOOL": 8})
"""Formats whose name does not end in their bits."""


def inspect(path: str) -> dict[str, Any]:
    """All that can be said of what lies at ``path``, as JSON holds it; ``what`` is checkpoint, run or hf.

    Raises ValueError where it is none of these, or where a checkpoint is not whole.
    """
    store = open_store(path)
    names = store.names()
    if MANIFEST in names:
        return checkpoint_facts(store)
    if "config.json" in names:
        return hf_facts(path)
    if CHECKPOINTS in store.folders() or LATEST in names or any(True for _ in steps_in(store)):
        return run_facts(store)
    raise ValueError(
        f"{store.describe()} is neither a checkpoint (it has no {MANIFEST}), nor a run with {CHECKPOINTS}, nor a "
        "Hugging Face folder (no config.json); name one of these"
    )


def checkpoint_facts(store: Store) -> dict[str, Any]:
    """Of one checkpoint."""
    manifest = read_manifest(store)
    config = from_tree(manifest.config, store.describe())
    groups: dict[str, dict[str, Any]] = {}
    for key, entry in manifest.tensors.items():
        group = groups.setdefault(group_of(key), {"tensors": 0, "elements": 0, "bytes": 0, "slices": 0, "dtypes": []})
        numel = prod(entry.shape)
        group["tensors"] += 1
        group["elements"] += numel
        group["bytes"] += numel * bits_of(entry.dtype) // 8
        group["slices"] += len(entry.slices)
        group["dtypes"] = sorted({*group["dtypes"], entry.dtype})
    return {
        "what": "checkpoint",
        "path": store.describe(),
        "kind": manifest.kind,
        "step": manifest.step,
        "made": dict(manifest.made),
        "layout": dict(manifest.layout),
        "state": dict(manifest.state),
        "model": dict(manifest.config["model"]),
        "config_hash": config_hash(config),
        "bytes": manifest.num_bytes,
        "groups": groups,
        "files": [{"name": each.name, "bytes": each.size, "header_hash": each.header_hash} for each in manifest.files],
        "attachments": {name: each.size for name, each in manifest.attachments.items()},
        "tensors": tensor_facts(manifest),
    }


def tensor_facts(manifest: Manifest) -> dict[str, dict[str, Any]]:
    """Shape, format, slices and their hashes, by key."""
    return {
        key: {
            "dtype": entry.dtype,
            "shape": list(entry.shape),
            "slices": [
                {
                    "file": manifest.files[each.file].name,
                    "offset": each.offset,
                    "start": list(each.start),
                    "size": list(each.size),
                    "hash": each.hash,
                }
                for each in entry.slices
            ],
        }
        for key, entry in manifest.tensors.items()
    }


def run_facts(store: Store) -> dict[str, Any]:
    """Of a run's folder, or of its checkpoints."""
    where = store.child(CHECKPOINTS) if CHECKPOINTS in store.folders() else store
    found = []
    for step, folder, is_finished in steps_in(where):
        facts: dict[str, Any] = {"step": step, "path": folder.describe(), "whole": False}
        try:
            manifest = read_manifest(folder)
            facts |= {"whole": True, "bytes": manifest.num_bytes, "layout": dict(manifest.layout)}
            facts |= {"made": manifest.made.get("time"), "state": dict(manifest.state)}
        except ValueError as problem:
            facts["problem"] = str(problem) if is_finished else "it was never finished"
        found.append(facts)
    newest = next((where.child(folder_of(each["step"])) for each in found if each["whole"]), None)
    facts = {"what": "run", "path": store.describe(), "checkpoints": found}
    return facts if newest is None else facts | {"newest": checkpoint_facts(newest)}


def hf_facts(path: str) -> dict[str, Any]:
    """Of a Hugging Face folder."""
    from dataclasses import asdict

    from megacore.checkpoint.hf.folder import HfFolder
    from megacore.spec import ModelSpec

    source = HfFolder.open(path)
    spec = ModelSpec.of(source.model)
    return {
        "what": "hf",
        "path": path,
        "model": asdict(source.model),
        "parameters": spec.num_params,
        "dtypes": sorted({str(source.dtype(param.name)).removeprefix("torch.") for param in spec.params}),
        "attachments": {name: len(data) for name, data in source.attachments.items()},
    }


def group_of(key: str) -> str:
    """The group that a tensor is told with: weights, optim/first, state, ..."""
    parts = key.split("/")
    return "/".join(parts[:2]) if parts[0] == "optim" and len(parts) > 2 else parts[0]


def bits_of(dtype: str) -> int:
    """Of a number in a format of safetensors."""
    if dtype in ITEM_BITS:
        return ITEM_BITS[dtype]
    return 8 if dtype.startswith("F8") else int("".join(char for char in dtype if char.isdigit()))
