"""Manifests that somebody made up on purpose, with right hashes: refused, and nothing outside the folder is touched."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megacore.checkpoint.find import folder_of
from megacore.checkpoint.manifest import MANIFEST, hash_of
from megacore.checkpoint.read import Checkpoint
from megacore.checkpoint.store import open_store
from tests.checkpoint.common import config_of, save, saver_of
from tests.engine.common import built_rank

ALONE = config_of(("model.vocab_size=67", "model.num_layers=2"), {"dp": 1})
MATRIX = "weights/layers.0.mlp.down.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    built = built_rank(0, 1, ALONE)
    assert save(built, saver_of(built, str(tmp_path)), 1).problem == ""
    (tmp_path / "secret").write_text("secret")
    return tmp_path / folder_of(1)


def canonical(content: Any) -> bytes:
    return json.dumps(content, sort_keys=True, separators=(",", ":")).encode()


def rewrite(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the manifest, and give it the hash that belongs to it now."""
    content = json.loads((folder / MANIFEST).read_bytes())
    del content["hash"]
    change(content)
    (folder / MANIFEST).write_bytes(canonical(content | {"hash": hash_of(canonical(content))}))


def refused(folder: Path, *texts: str) -> None:
    with pytest.raises(ValueError) as caught:
        Checkpoint.of(open_store(str(folder))).verify()
    message = str(caught.value)
    assert folder.name in message and all(text in message for text in texts), message
    assert len(message) < 2000


def slices(content: dict[str, Any]) -> list[Any]:
    """[file, offset, start, size, hash] of a matrix' one slice."""
    each: list[Any] = content["tensors"][MATRIX][2]
    return each


def in_two(content: dict[str, Any], second_start: int) -> None:
    """A matrix as two slices of half its rows."""
    dtype, shape, each = content["tensors"][MATRIX]
    half = [shape[0] // 2, shape[1]]
    content["tensors"][MATRIX] = [
        dtype,
        shape,
        [*each[:3], half, each[4]],
        [*each[:2], [second_start, 0], half, each[4]],
    ]


NAMES = ["../secret", "..", "/etc/passwd", "a/b", "a\\b", "", ".hidden", "a\0b", "%2e%2e/", 7, None, ["a"], MANIFEST]
CHANGES: dict[str, Callable[[dict[str, Any]], object]] = {
    "offset below 0": lambda m: slices(m).__setitem__(1, -8),
    "offset within the header": lambda m: slices(m).__setitem__(1, 8),
    "offset behind the end": lambda m: slices(m).__setitem__(1, m["files"][0][1] - 8),
    "offset far behind": lambda m: slices(m).__setitem__(1, 1 << 62),
    "offset of another kind": lambda m: slices(m).__setitem__(1, "0"),
    "start below 0": lambda m: slices(m).__setitem__(2, [-1, 0]),
    "size of nothing": lambda m: slices(m).__setitem__(3, [0, 36]),
    "size beyond the tensor": lambda m: slices(m).__setitem__(3, [1 << 40, 1 << 40]),
    "a fraction": lambda m: slices(m).__setitem__(3, [24.0, 36]),
    "true as a number": lambda m: slices(m).__setitem__(3, [True, 36]),
    "one dim too few": lambda m: slices(m).__setitem__(3, [24]),
    "no such file": lambda m: slices(m).__setitem__(0, 5),
    "file below 0": lambda m: slices(m).__setitem__(0, -1),
    "no hash": lambda m: slices(m).__setitem__(4, None),
    "wrong hash": lambda m: slices(m).__setitem__(4, "0" * 32),
    "huge shape": lambda m: m["tensors"][MATRIX].__setitem__(1, [1 << 59, 1 << 59]),
    "endless shape": lambda m: m["tensors"][MATRIX].__setitem__(1, [10**400, 1]),
    "shape below 0": lambda m: m["tensors"][MATRIX].__setitem__(1, [-24, -36]),
    "unknown format": lambda m: m["tensors"][MATRIX].__setitem__(0, "F65"),
    "a list as format": lambda m: m["tensors"][MATRIX].__setitem__(0, ["F64"]),
    "other format": lambda m: m["tensors"][MATRIX].__setitem__(0, "F32"),
    "no slice": lambda m: m["tensors"][MATRIX].pop(),
    "a slice twice": lambda m: m["tensors"][MATRIX].append(m["tensors"][MATRIX][2]),
    "halves that meet": lambda m: in_two(m, 6),
    "the same half twice": lambda m: in_two(m, 0),
    "a slice that is none": lambda m: m["tensors"][MATRIX].append([]),
    "tensors as a list": lambda m: m.__setitem__("tensors", []),
    "a tensor as a number": lambda m: m["tensors"].__setitem__(MATRIX, 1),
    "files as a table": lambda m: m.__setitem__("files", {"a": 1}),
    "no files": lambda m: m.__setitem__("files", []),
    "files missing": lambda m: m.pop("files"),
    "a file twice": lambda m: m["files"].append(m["files"][0]),
    "size below 0": lambda m: m["files"][0].__setitem__(1, -1),
    "huge header": lambda m: m["files"][0].__setitem__(2, 1 << 59),
    "huge file": lambda m: m["files"][0].__setitem__(1, 1 << 59),
    "attachments as a list": lambda m: m.__setitem__("attachments", [1]),
    "an attachment twice": lambda m: m["attachments"].__setitem__("b", m["attachments"]["tokenizer/a.json"]),
    "attachment over a file": lambda m: m["attachments"]["tokenizer/a.json"].__setitem__(0, m["files"][0][0]),
    "layout as a list": lambda m: m.__setitem__("layout", [2]),
    "tp as a text": lambda m: m["layout"].__setitem__("tp", "2"),
    "state as a text": lambda m: m.__setitem__("state", "a"),
    "step as a text": lambda m: m.__setitem__("step", "1"),
    "step below 0": lambda m: m.__setitem__("step", -1),
    "kind missing": lambda m: m.pop("kind"),
    "later version": lambda m: m.__setitem__("version", 2),
    "no version": lambda m: m.pop("version"),
    "format of another": lambda m: m.__setitem__("format", "torch"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_manifest_that_lies(folder: Path, name: str) -> None:
    rewrite(folder, CHANGES[name])
    refused(folder)


@pytest.mark.parametrize(
    "config",
    [
        {"model": 5},
        {"model": {"hidden_size": "many"}},
        {"model": {"hidden_size": [1]}},
        {"parallel": []},
        {"of old": 1},
        {"model": {"rope_scaling": 3}},
        {"optim": {"groups": {"a": 1}}},
    ],
)
def test_a_run_that_is_none(folder: Path, config: dict[str, Any]) -> None:
    rewrite(folder, lambda m: m["config"].update(config))
    checkpoint = Checkpoint.of(open_store(str(folder)))
    with pytest.raises(ValueError, match=folder.name):
        _ = checkpoint.config


@pytest.mark.parametrize("name", NAMES)
def test_names_that_lead_elsewhere(folder: Path, name: Any) -> None:
    for change in (
        lambda m: m["files"][0].__setitem__(0, name),
        lambda m: m["attachments"]["tokenizer/a.json"].__setitem__(0, name),
    ):
        before = (folder / MANIFEST).read_bytes()
        rewrite(folder, change)
        refused(folder)
        (folder / MANIFEST).write_bytes(before)
    Checkpoint.of(open_store(str(folder))).verify()


def test_two_whole_halves_are_taken(folder: Path) -> None:
    """What the changes above start from: it is their lie that is refused."""
    file = next(folder.glob("rank-*"))
    data = file.read_bytes()

    def honest(m: dict[str, Any]) -> None:
        in_two(m, 12)
        half = 12 * 36 * 8
        first, second = m["tensors"][MATRIX][2:]
        second[1] = first[1] + half
        for each in (first, second):
            each[4] = hash_of(data[each[1] : each[1] + half])

    rewrite(folder, honest)
    checkpoint = Checkpoint.of(open_store(str(folder)))
    checkpoint.verify()
    assert len(checkpoint.entry(MATRIX).slices) == 2


CONTENTS = {
    "nothing": b"",
    "no JSON": b"manifest",
    "a number": b"1",
    "a list": b"[]",
    "a table": b"{}",
    "not UTF-8": b'{"\xff": 1}',
    "deep": b"[" * 100_000 + b"]" * 100_000,
    "deep inside": b'{"hash":"0","format":"megacore checkpoint","version":1,"x":' + b"[" * 5000 + b"]" * 5000 + b"}",
    "not a number": b'{"format":"megacore checkpoint","hash":"0","version":1,"x":NaN}',
    "infinite": b'{"format":"megacore checkpoint","hash":"0","version":1,"x":1e999}',
    "many digits": b'{"format":"megacore checkpoint","hash":"0","version":' + b"9" * 5000 + b"}",
    "a pickle": pickle.dumps({"hash": 0}),
}


@pytest.mark.parametrize("name", CONTENTS)
def test_a_file_that_is_no_manifest(folder: Path, name: str) -> None:
    (folder / MANIFEST).write_bytes(CONTENTS[name])
    refused(folder, MANIFEST)


class Bomb:
    """Says so when it is unpickled."""

    def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
        return exec, ("raise SystemExit('a pickle was loaded')",)


def test_a_pickle_is_not_loaded(folder: Path) -> None:
    file = next(folder.glob("rank-*"))
    bomb = pickle.dumps(Bomb())
    size = file.stat().st_size
    file.write_bytes(bomb + bytes(size - len(bomb)))
    refused(folder, file.name)
    rewrite(folder, lambda m: m["files"][0].__setitem__(3, hash_of((bomb + bytes(size))[: m["files"][0][2]])))
    refused(folder, file.name)


@pytest.mark.parametrize("which", ["rank-00000.safetensors", "attachment-0", MANIFEST])
def test_links_are_not_read(folder: Path, which: str) -> None:
    moved = folder.parent / "moved"
    (folder / which).rename(moved)
    (folder / which).symlink_to(moved)
    refused(folder, which)


def test_a_link_of_the_right_size_is_not_read(folder: Path) -> None:
    """The size of a link is the length of its target."""
    target = folder.parent / "data"
    (folder / "attachment-0").unlink()
    (folder / "attachment-0").symlink_to("aa")
    (folder / "aa").write_bytes(b"{}")
    assert not target.exists()
    refused(folder, "attachment-0", "symbolic link")
