"""Which files an HF folder consists of: plain names in it, or blobs of HF's cache, and nothing else."""

from pathlib import Path

from megacore.checkpoint.hf.strict_json import read_object
from megacore.checkpoint.hf.tensor_files import StoredTensor, read_header
from megacore.checkpoint.store import LocalStore, Store

CONFIG, GENERATION = "config.json", "generation_config.json"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "spiece.model",
    "sentencepiece.bpe.model",
)
"""What a tokenizer may consist of."""

LARGEST_FILE = 256 << 20
"""Of the small files of a folder."""

UNSAFE = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


class FolderFiles:
    """The files of a folder by their names. Links are followed within the folder and to the blobs beside `snapshots`
    in HF's own cache; any other is refused."""

    def __init__(self, store: Store) -> None:
        self.store, self.where = store, store.describe()
        self.names = frozenset(store.names())
        if CONFIG not in self.names:
            why = f"it has no {CONFIG}" if self.names else "there is no such folder, or it is empty"
            raise ValueError(f"{self.where} is not an HF folder: {why}")

    def place(self, name: str) -> tuple[Store, str]:
        """The store and the name by which a file can be read.

        Raises ValueError for a name that is none, leads out of the folder, or is not there.
        """
        if not name or name.startswith(".") or "/" in name or "\\" in name or "\0" in name or Path(name).is_absolute():
            raise ValueError(f"{self.where}: {name!r} is not the name of a file in this folder; such are refused")
        if name not in self.names:
            raise ValueError(f"{self.where} has no {name}; the folder is not whole, get it again")
        if not isinstance(self.store, LocalStore):
            return self.store, name
        path = self.store.folder / name
        if not path.is_symlink():
            return self.store, name
        target, home = path.resolve(), self.store.folder.resolve()
        blobs = home.parent.parent / "blobs" if home.parent.name == "snapshots" else None
        if target.parent != home and target.parent != blobs:
            raise ValueError(f"{path} is a link to {target}, out of the folder; put the file itself there")
        return LocalStore(target.parent, self.store.notice), target.name

    def read(self, name: str) -> bytes:
        """A small file, whole."""
        store, real = self.place(name)
        if store.size(real) > LARGEST_FILE:
            raise ValueError(f"{self.where}/{name} has {store.size(real)} bytes, more than such a file may have")
        return store.read(real)

    def tensors(self) -> dict[str, StoredTensor]:
        """All tensors of the folder by name, whatever files they lie in.

        Raises ValueError for pickles, and for an index that does not fit the files.
        """
        if WEIGHTS in self.names:
            return self._header(WEIGHTS)
        if INDEX not in self.names:
            raise ValueError(self._without_weights())
        where = f"{self.where}/{INDEX}"
        index = read_object(self.read(INDEX), where).get("weight_map")
        if not isinstance(index, dict) or not all(isinstance(file, str) for file in index.values()):
            raise ValueError(f"{where} has no weight_map from tensors to files")
        found: dict[str, StoredTensor] = {}
        files = sorted(set(index.values()))
        for file in files:
            if not file.endswith(".safetensors"):
                raise ValueError(f"{where} names {file!r}, which is not a .safetensors file; pickles are never opened")
            self.place(file)
        for file in files:
            for name, tensor in self._header(file).items():
                if index.get(name) != file:
                    other = f"in {index[name]}" if name in index else "nowhere"
                    raise ValueError(f"{self.where}/{file} holds tensor {name!r}, which {INDEX} has {other}")
                found[name] = tensor
        if missing := sorted(index.keys() - found.keys()):
            raise ValueError(f"{where} has tensor {missing[0]!r} in {index[missing[0]]}, but it is not there")
        return found

    def _header(self, file: str) -> dict[str, StoredTensor]:
        store, name = self.place(file)
        return read_header(store, name)

    def _without_weights(self) -> str:
        unsafe = sorted(name for name in self.names if name.endswith(UNSAFE))
        if unsafe:
            return (
                f"{self.where} has its weights as {unsafe[0]}, a pickle, which can run any code when it is opened: it "
                "is not read. Get the safetensors files of this model, or make them where that does no harm: "
                "AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW)"
            )
        return f"{self.where} has neither {WEIGHTS} nor {INDEX}; an HF folder's weights are in such files"
