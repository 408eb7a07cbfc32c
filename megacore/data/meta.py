"""`PREFIX.meta.json`: what a data set is made of and with, beyond what `.bin/.idx` can say.

The file is ours and optional: a data set from elsewhere has none, and what can be derived is derived.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from megacore.data.files import sampled_digest, write_atomic
from megacore.data.indexed import IndexedDataset, bin_path, meta_path


@dataclass(frozen=True)
class DataMeta:
    """Facts of one data set. None: not known (a foreign data set)."""

    num_documents: int
    num_sequences: int
    num_tokens: int
    fingerprint: str  # changes with the content; see `fingerprint`
    tokenizer: str | None = None  # as in data.tokenizer: bytes, FILE.model, ...
    tokenizer_hash: str | None = None
    vocab_size: int | None = None
    eod: int | None = None  # id of the end-of-document token

    @classmethod
    def derive(cls, dataset: IndexedDataset) -> "DataMeta":
        """What the two files alone say."""
        return cls(dataset.num_documents, dataset.num_sequences, dataset.num_tokens, fingerprint(dataset))

    @classmethod
    def load(cls, dataset: IndexedDataset) -> "DataMeta":
        """The facts of a data set: those of its `.meta.json` if there is one, else those that can be derived.

        Raises:
            ValueError: the `.meta.json` cannot be read, or belongs to other content than the two files have.
        """
        derived, path = cls.derive(dataset), meta_path(dataset.prefix)
        if not path.is_file():
            return derived
        try:
            known = json.loads(path.read_text("utf-8"))
            stored = cls(**{key: value for key, value in known.items() if key in {field.name for field in fields(cls)}})
        except (ValueError, TypeError, AttributeError) as reason:
            raise ValueError(f"{path} is damaged; delete it, or prepare the data set again") from reason
        if stored.fingerprint != derived.fingerprint:
            raise ValueError(
                f"{path} describes other content than {dataset.prefix}.bin/.idx have now "
                "(they were rewritten or changed); prepare the data set again, or delete the .meta.json"
            )
        return stored

    def save(self, prefix: str | Path) -> None:
        """Write `PREFIX.meta.json`, atomically."""
        write_atomic(meta_path(prefix), (json.dumps(asdict(self), indent=2) + "\n").encode())


def fingerprint(dataset: IndexedDataset) -> str:
    """A hash of a data set's content that is quick for any size: 16 bytes in hex.

    All of the `.idx`, and of the `.bin` its size and some blocks (see `sampled_digest`). A changed length, order or
    size always changes it; changed tokens do unless all lie between the blocks.
    """
    digest = hashlib.blake2b(digest_size=16)
    digest.update(f"{dataset.dtype.name} {dataset.num_sequences} {dataset.num_documents} {dataset.index_hash}".encode())
    digest.update(sampled_digest(bin_path(dataset.prefix)))
    return digest.hexdigest()


def merge_metas(sources: list[DataMeta], merged: IndexedDataset) -> DataMeta:
    """The facts of a merged data set: a fact about the tokenizer stays where all sources agree on it."""
    derived = DataMeta.derive(merged)
    shared = {
        name: getattr(sources[0], name)
        for name in ("tokenizer", "tokenizer_hash", "vocab_size", "eod")
        if len({getattr(source, name) for source in sources}) == 1
    }
    return replace(derived, **shared)
