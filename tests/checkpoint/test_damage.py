"""No damaged byte is believed, nothing that is missing goes unnoticed, and whatever is whole is found."""

import random
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megacore.checkpoint.find import LATEST, folder_of, newest
from megacore.checkpoint.manifest import MANIFEST
from megacore.checkpoint.read import Checkpoint
from megacore.checkpoint.store import open_store
from tests.checkpoint.common import config_of, saver_of, steps
from tests.checkpoint.common import save as save_with
from tests.engine.common import built_rank
from tests.pool import WorkerPool

TWO = config_of(("model.vocab_size=67", "model.num_layers=2"), {"dp": 2, "zero": 1})
STEPS = (1, 2)


def write_rank(rank: int, folder: str) -> None:
    built = built_rank(rank, 2, TWO)
    saver = saver_of(built, folder)
    for step in STEPS:
        steps(built, step, step)
        assert save_with(built, saver, step).problem == ""


@pytest.fixture(scope="module")
def written(pool: WorkerPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("written")
    pool.run(write_rank, 2, str(folder))
    return folder


@pytest.fixture
def folder(written: Path, tmp_path: Path) -> Path:
    """Checkpoints of two ranks and two steps, to be spoilt."""
    shutil.copytree(written, tmp_path / "checkpoints")
    return tmp_path / "checkpoints"


def look_at_all(folder: Path) -> None:
    Checkpoint.of(open_store(str(folder))).verify()


def spoil(data: bytes, chance: random.Random) -> bytes:
    """The content of a file after an accident: a bit, a byte or a stretch is another, its end is missing, or more is
    there."""
    kind, at = chance.randrange(5), chance.randrange(len(data))
    if kind == 0:
        return data[:at] + bytes([data[at] ^ 1 << chance.randrange(8)]) + data[at + 1 :]
    if kind == 1:
        return data[:at] + bytes([(data[at] + chance.randrange(1, 256)) % 256]) + data[at + 1 :]
    if kind == 2:
        stretch = bytes(255 - byte for byte in data[at : at + 64])
        return data[:at] + stretch + data[at + len(stretch) :]
    return data[:at] if kind == 3 else data + chance.randbytes(1 + at % 100)


@pytest.mark.parametrize("num", [500, pytest.param(10_000, marks=[pytest.mark.slow, pytest.mark.timeout(1200)])])
def test_every_accident_is_noticed(folder: Path, num: int) -> None:
    step = folder / folder_of(2)
    look_at_all(step)
    files = sorted(step.iterdir())
    assert len(files) == 4, "two ranks, an attachment and the manifest"
    chance = random.Random(num)
    for number in range(num):
        file = files[number % len(files)]
        data = file.read_bytes()
        file.write_bytes(spoil(data, chance))
        with pytest.raises(ValueError, match=file.name.replace(".", r"\.")):
            look_at_all(step)
        file.write_bytes(data)
    look_at_all(step)


def test_loading_notices_what_it_reads(folder: Path) -> None:
    """A load looks at the same hashes: every tensor that has a damaged byte is refused, and no other."""
    step = folder / folder_of(2)
    checkpoint = Checkpoint.of(open_store(str(step)))
    for key, entry in checkpoint.manifest.tensors.items():
        for each in entry.slices:
            file = step / checkpoint.manifest.files[each.file].name
            data = file.read_bytes()
            file.write_bytes(data[: each.offset] + bytes([data[each.offset] ^ 255]) + data[each.offset + 1 :])
            with pytest.raises(ValueError, match=f"{file.name} was damaged: {key} at bytes"):
                checkpoint.read_key(key, each.start, each.size)
            file.write_bytes(data)
        checkpoint.read_key(key, (0,) * len(entry.shape), entry.shape)


def test_a_missing_file_is_named(folder: Path) -> None:
    for name in ("rank-00001.safetensors", "attachment-0"):
        moved = folder / "moved"
        (folder / folder_of(2) / name).rename(moved)
        with pytest.raises(ValueError, match=f"{name} is missing; the checkpoint is not whole"):
            look_at_all(folder / folder_of(2))
        assert newest(open_store(str(folder))).describe() == str(folder / folder_of(1))
        moved.rename(folder / folder_of(2) / name)
    assert newest(open_store(str(folder))).describe() == str(folder / folder_of(2))


def test_swapped_files_are_noticed(folder: Path) -> None:
    one, other = (folder / folder_of(2) / f"rank-0000{rank}.safetensors" for rank in (0, 1))
    first, second = one.read_bytes(), other.read_bytes()
    one.write_bytes(second)
    other.write_bytes(first)
    with pytest.raises(ValueError, match=r"rank-0000[01]\.safetensors"):
        look_at_all(folder / folder_of(2))


def test_files_of_two_steps_are_not_mixed(folder: Path) -> None:
    """They have the same size and header: only what is in them differs."""
    name = "rank-00001.safetensors"
    sizes = {(folder / folder_of(step) / name).stat().st_size for step in STEPS}
    assert len(sizes) == 1
    shutil.copy(folder / folder_of(1) / name, folder / folder_of(2) / name)
    with pytest.raises(ValueError, match=f"{name} was damaged"):
        look_at_all(folder / folder_of(2))


def test_an_older_manifest_does_not_fit(folder: Path) -> None:
    shutil.copy(folder / folder_of(1) / MANIFEST, folder / folder_of(2) / MANIFEST)
    with pytest.raises(ValueError, match=r"rank-0000[01]\.safetensors"):
        look_at_all(folder / folder_of(2))


@pytest.mark.parametrize("latest", [None, b"", b"step-00000001\n", b"\xff\x00garbage", b"../../elsewhere\n"])
def test_latest_is_but_a_hint(folder: Path, latest: bytes | None) -> None:
    (folder / LATEST).unlink()
    if latest is not None:
        (folder / LATEST).write_bytes(latest)
    assert Checkpoint.open(str(folder)).manifest.step == 2
    assert Checkpoint.open(str(folder.parent)).manifest.step == 2


def test_every_reason_is_given(folder: Path) -> None:
    (folder / folder_of(1) / MANIFEST).unlink()
    with (folder / folder_of(2) / MANIFEST).open("ab") as file:
        file.write(b" ")
    (folder / "step-7").mkdir()  # not a name that a run gives
    with pytest.raises(ValueError, match="holds no whole checkpoint") as caught:
        Checkpoint.open(str(folder))
    lines = str(caught.value).splitlines()[1:]
    assert len(lines) == 2
    assert f"{folder_of(2)}/{MANIFEST} was damaged" in lines[0]
    assert f"{folder_of(1)} was never finished" in lines[1]


@given(st.data())
def test_any_slice_is_what_was_written(written: Path, data: st.DataObject) -> None:
    """A read across slices of several ranks is that part of the whole."""
    checkpoint = Checkpoint.of(open_store(str(written / folder_of(2))))
    key = data.draw(st.sampled_from(sorted(checkpoint.manifest.tensors)))
    shape = checkpoint.entry(key).shape
    start = tuple(data.draw(st.integers(0, length - 1)) for length in shape)
    size = tuple(data.draw(st.integers(1, length - first)) for first, length in zip(start, shape))
    whole = checkpoint.read_key(key, (0,) * len(shape), shape)
    place = tuple(slice(first, first + count) for first, count in zip(start, size))
    assert checkpoint.read_key(key, start, size).equal(whole[place])
