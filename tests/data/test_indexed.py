"""The .bin/.idx reader and writer: golden bytes, round trips, and clear errors for every kind of damage."""

import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megacore.data import indexed
from megacore.data.indexed import IndexedDataset, IndexedWriter, merge, token_dtype

GOLDEN_BIN = "0100 0200 0300 ffff 0500"
GOLDEN_IDX = (
    "4d4d494449445800 00"  # MMIDIDX\0\0
    "0100000000000000 08"  # version 1, uint16
    "0200000000000000 0400000000000000"  # 2 sequences, 3 documents + 1
    "03000000 02000000"  # lengths
    "0000000000000000 0600000000000000"  # byte offsets
    "0000000000000000 0100000000000000 0100000000000000 0200000000000000"  # bounds: the second document is empty
)


def files(prefix: str) -> tuple[bytes, bytes]:
    return Path(prefix + ".bin").read_bytes(), Path(prefix + ".idx").read_bytes()


def test_golden_bytes(make_data) -> None:
    prefix = make_data([[1, 2, 3], [], [65535, 5]])
    assert files(prefix) == (bytes.fromhex(GOLDEN_BIN), bytes.fromhex(GOLDEN_IDX))


def test_reads_golden_bytes(tmp_path: Path) -> None:
    (tmp_path / "g.bin").write_bytes(bytes.fromhex(GOLDEN_BIN))
    (tmp_path / "g.idx").write_bytes(bytes.fromhex(GOLDEN_IDX))
    data = IndexedDataset(tmp_path / "g")
    assert (len(data), data.num_documents, data.num_tokens, data.dtype) == (2, 3, 5, np.dtype("uint16"))
    assert [data.document(d).tolist() for d in range(3)] == [[1, 2, 3], [], [65535, 5]]
    assert [data.document_of(s) for s in range(2)] == [0, 2]
    assert data.sequence(0, 1).tolist() == [2, 3]


documents_strategy = st.lists(st.lists(st.integers(0, 2**15 - 1), max_size=6), max_size=12)


@settings(deadline=None, max_examples=50)
@given(documents_strategy, st.sampled_from(["uint16", "int32", "int64", "int16"]))
def test_round_trip(tmp_path_factory, documents: list[list[int]], dtype: str) -> None:
    prefix = str(tmp_path_factory.mktemp("data") / "d")
    with IndexedWriter(prefix, dtype) as writer:
        for document in documents:
            writer.add_document(np.array(document, np.int64))
    one_by_one = files(prefix)
    flat = [token for document in documents for token in document]
    with IndexedWriter(prefix, dtype) as writer:
        writer.add_documents(np.array(flat, dtype), [len(document) for document in documents])
    assert files(prefix) == one_by_one
    data = IndexedDataset(prefix)
    assert [data.document(d).tolist() for d in range(data.num_documents)] == documents
    assert data.tokens.dtype == np.dtype(dtype)


def test_slices_are_views(make_data) -> None:
    data = IndexedDataset(make_data([[1, 2, 3], [4, 5]]))
    for view in (data[0], data.sequence(1, 0, 1), data.document(1)):
        assert view.base is not None and not view.flags.owndata and not view.flags.writeable


def test_documents_of_many_sequences_and_modes(tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "m", "int32", with_modes=True) as writer:
        writer.add_sequence([1, 2], mode=1)
        writer.add_sequence([3])
        writer.end_document()
        writer.add_document([4])
    data = IndexedDataset(tmp_path / "m", with_modes=True)
    assert data.modes is not None
    assert (data.modes.tolist(), data.bounds.tolist()) == ([1, 0, 0], [0, 2, 3])
    assert data.document(0).tolist() == [1, 2, 3]
    assert IndexedDataset(tmp_path / "m").modes is None


def test_merge_is_writing_all_at_once(make_data, tmp_path: Path) -> None:
    parts = [[[1, 2], []], [], [[3], [], [4, 5, 6]]]
    prefixes = [make_data(part, f"part{i}") for i, part in enumerate(parts)]
    whole = make_data([document for part in parts for document in part], "whole")
    merge(prefixes, tmp_path / "merged")
    assert files(str(tmp_path / "merged")) == files(whole)


def test_merge_refuses(make_data, tmp_path: Path) -> None:
    one, other = make_data([[1]], "one"), make_data([[1]], "other", dtype="int32")
    with pytest.raises(ValueError, match="one dtype"):
        merge([one, other], tmp_path / "merged")
    with pytest.raises(ValueError, match="into itself"):
        merge([one], one)
    assert not (tmp_path / "merged.idx").exists()


@pytest.mark.parametrize("vocab_size, dtype", [(256, "uint16"), (65499, "uint16"), (65500, "int32")])
def test_token_dtype(vocab_size: int, dtype: str) -> None:
    assert token_dtype(vocab_size) == np.dtype(dtype)


def test_writer_leaves_old_files_when_it_fails(make_data, tmp_path: Path) -> None:
    prefix = make_data([[1, 2]])
    before = files(prefix)
    with pytest.raises(ValueError, match="token id 65536 does not fit uint16"):
        with IndexedWriter(prefix, "uint16") as writer:
            writer.add_document([3, 65536])
    assert files(prefix) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.bin", "data.idx"]


def test_writer_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="folder .*missing"), IndexedWriter(tmp_path / "missing" / "d", "uint16"):
        pass
    with pytest.raises(ValueError, match="uint32"):
        IndexedWriter(tmp_path / "d", "uint32")
    with pytest.raises(ValueError, match="pass integers"), IndexedWriter(tmp_path / "d", "uint16") as writer:
        writer.add_document([0.5])
    monkeypatch.setattr(indexed, "MAX_LENGTH", 3)
    with pytest.raises(ValueError, match="cut the document"), IndexedWriter(tmp_path / "d", "uint16") as writer:
        writer.add_document([1, 2, 3, 4])


def patch(path: Path, offset: int, content: bytes) -> None:
    raw = bytearray(path.read_bytes())
    raw[offset : offset + len(content)] = content
    path.write_bytes(raw)


DAMAGE = {
    "does not start with MMIDIDX": (0, b"X"),
    "version 7": (9, struct.pack("<Q", 7)),
    "dtype code 99": (17, b"\x63"),
    "truncated": (18, struct.pack("<Q", 1000)),
    "damaged: 90 bytes": (26, struct.pack("<Q", 1)),
    "sequence 1 has length -1": (38, struct.pack("<i", -1)),
    "sequence 0 does not start": (42, struct.pack("<q", 2)),
    "sequence 1 does not start": (50, struct.pack("<q", 4)),
    "document bounds": (66, struct.pack("<q", 3)),
}


@pytest.mark.parametrize("message", DAMAGE)
def test_damaged_index(make_data, message: str) -> None:
    prefix = make_data([[1, 2, 3], [], [4, 5]])
    patch(Path(prefix + ".idx"), *DAMAGE[message])
    with pytest.raises(ValueError, match=message) as error:
        IndexedDataset(prefix)
    assert prefix + ".idx" in str(error.value) and "again" in str(error.value)


def test_truncated_everywhere(make_data) -> None:
    prefix = make_data([[1, 2, 3], [], [4, 5]])
    for path in (Path(prefix + ".idx"), Path(prefix + ".bin")):
        whole = path.read_bytes()
        for size in range(len(whole)):
            path.write_bytes(whole[:size])
            with pytest.raises(ValueError, match="again"):
                IndexedDataset(prefix)
        path.write_bytes(whole + b"12345")
        with pytest.raises(ValueError, match="again"):
            IndexedDataset(prefix)
        path.write_bytes(whole)
    assert IndexedDataset(prefix).num_tokens == 5


def test_missing_files(make_data, tmp_path: Path) -> None:
    prefix = make_data([[1]])
    with pytest.raises(ValueError, match="without its ending"):
        IndexedDataset(prefix + ".bin")
    with pytest.raises(ValueError, match="megacore data prepare"):
        IndexedDataset(tmp_path / "nothing")
    Path(prefix + ".bin").unlink()
    with pytest.raises(ValueError, match="data.idx alone"):
        IndexedDataset(prefix)


def test_out_of_range(make_data) -> None:
    data = IndexedDataset(make_data([[1, 2, 3]]))
    for call in (lambda: data[1], lambda: data.sequence(0, 2, 4), lambda: data.document(-1)):
        with pytest.raises(IndexError, match="data"):
            call()
