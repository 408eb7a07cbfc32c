"""The one file that reads pickles, because Megatron-LM's checkpoints are pickles: nothing that they name is ever run.

A pickle is a program: it names functions and classes and calls them. Here every name is looked up in the closed list
below, and what stands there is inert: numbers' formats, plain containers, a note of where a tensor's numbers lie, and
`Record`, a stand-in that keeps what an object of a class was made of and does nothing. No module is imported for a
pickle, no class of Megatron-LM or PyTorch is instantiated, and a name that is not on the list (os.system,
builtins.eval, ...) is an error that says so. torch.load is not used: its own reader of `weights_only` files does more.

| name in the file                                                        | becomes                                  |
|-------------------------------------------------------------------------|------------------------------------------|
| torch.float32, ... (formats that safetensors knows)                     | that format                              |
| torch.FloatStorage, ..., torch.storage.UntypedStorage                   | the format of a storage's numbers        |
| torch._utils._rebuild_tensor_v2, _rebuild_tensor, _rebuild_parameter    | `TensorNote`: storage, offset and shape  |
| collections.OrderedDict; set, frozenset, torch.Size                     | themselves; a tuple                      |
| the exact names in `INERT`, and all of the packages in `INERT_PACKAGES` | a `Record`                               |
"""

import pickle
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import IO, Any

import torch

from megacore.checkpoint.formats import NAMES

MAX_PICKLE_BYTES = 1 << 29
"""Of the pickle alone, without the tensors' numbers: that of a rank's optimizer state has some megabytes."""

DTYPES: Mapping[str, torch.dtype] = MappingProxyType({str(dtype).removeprefix("torch."): dtype for dtype in NAMES})
STORAGES: Mapping[str, torch.dtype] = MappingProxyType(
    {
        "DoubleStorage": torch.float64,
        "FloatStorage": torch.float32,
        "HalfStorage": torch.float16,
        "BFloat16Storage": torch.bfloat16,
        "LongStorage": torch.int64,
        "IntStorage": torch.int32,
        "ShortStorage": torch.int16,
        "CharStorage": torch.int8,
        "ByteStorage": torch.uint8,
        "BoolStorage": torch.bool,
        "UntypedStorage": torch.uint8,
    }
)
CONTAINERS: Mapping[str, Callable[..., Any]] = MappingProxyType(
    {
        "collections.OrderedDict": OrderedDict,
        "builtins.set": set,
        "__builtin__.set": set,
        "builtins.frozenset": frozenset,
        "__builtin__.frozenset": frozenset,
        "torch.Size": tuple,
    }
)
INERT = frozenset(
    {
        "argparse.Namespace",
        "types.SimpleNamespace",
        "collections.defaultdict",
        "collections.deque",
        "builtins.bytearray",
        "__builtin__.bytearray",
        "builtins.complex",
        "__builtin__.complex",
        "builtins.slice",
        "__builtin__.slice",
        "builtins.range",
        "builtins.dict",
        "builtins.list",
        "_codecs.encode",
        "_io.BytesIO",
        "datetime.timedelta",
        "pathlib.Path",
        "pathlib.PosixPath",
        "pathlib._local.Path",
        "pathlib._local.PosixPath",
        "signal.Signals",
        "numpy.dtype",
        "numpy.ndarray",
        "numpy.core.multiarray._reconstruct",
        "numpy.core.multiarray.scalar",
        "numpy._core.multiarray._reconstruct",
        "numpy._core.multiarray.scalar",
        "numpy._core.numeric._frombuffer",
        "numpy.dtypes.UInt32DType",
        "numpy.random._pickle.__randomstate_ctor",
        "torch.device",
        "torch.Generator",
        "torch._C.Generator",
        "torch.serialization._get_layout",
        "torch._utils._rebuild_device_tensor_from_numpy",
        "torch._tensor._rebuild_from_type_v2",
    }
)
"""Classes and functions of which a stand-in is made: they occur in settings, random states and metadata."""

INERT_PACKAGES = ("megatron.", "transformer_engine.", "nvidia_resiliency_ext.", "torch.distributed.checkpoint.")
"""Likewise all that these define, such as enums among the settings. None of them is imported."""


@dataclass(frozen=True)
class StorageNote:
    """A storage of a file: record ``key``, whose numbers are of format ``dtype``."""

    key: str
    dtype: torch.dtype
    size: int


@dataclass(frozen=True)
class TensorNote:
    """A tensor in a storage: where it begins and how it steps, in numbers."""

    storage: StorageNote
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def dtype(self) -> torch.dtype:
        """Of its numbers."""
        return self.storage.dtype


class Record:
    """What an object of a class that is not here was made of: ``args`` of its constructor and ``state`` set later."""

    origin = ""
    args: tuple[Any, ...]
    state: Any

    def __new__(cls, *args: Any, **more: Any) -> "Record":
        made = super().__new__(cls)
        made.args, made.state = args, None
        return made

    def __init__(self, *args: Any, **more: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        """Items of what would be a dict are of no use to us."""

    def append(self, value: Any) -> None:
        """Nor are those of a list."""

    def extend(self, values: Any) -> None:
        """As `append`."""

    @property
    def fields(self) -> Mapping[str, Any]:
        """The attributes of a plain object; empty for others."""
        state = self.state[0] if isinstance(self.state, tuple) and len(self.state) == 2 else self.state
        return state if isinstance(state, dict) else {}


def load(file: IO[bytes], size: int, what: str) -> Any:
    """The value of a pickle, of the classes named above only.

    Raises ValueError that names ``what`` for a name that is not on the list, and for what is not a whole pickle.
    """
    if size > MAX_PICKLE_BYTES:
        raise ValueError(f"{what} is a pickle of {size} bytes; more than {MAX_PICKLE_BYTES} are not read")
    reader = _Reader(file)
    try:
        return reader.load()
    except Exception as reason:  # what a broken or hostile pickle raises can be anything
        if reader.refused:
            raise ValueError(
                f"{what} is refused: its pickle names {reader.refused}, which no checkpoint needs and which is never "
                "run; only files with settings and tensors are read"
            ) from None
        raise ValueError(f"{what} is no whole pickle of settings and tensors, or was damaged: {reason}") from reason


class _Reader(pickle.Unpickler):
    """Looks up every name in the list, and makes stand-ins that live no longer than it does."""

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__(file)
        self.refused = ""
        self.records: dict[str, type[Record]] = {}

    def find_class(self, module: str, name: str) -> Any:
        whole = f"{module}.{name}"
        if whole in CONTAINERS:
            return CONTAINERS[whole]
        if module == "torch" and name in DTYPES:
            return DTYPES[name]
        if module in ("torch", "torch.storage") and name in STORAGES:
            return _Kind(STORAGES[name])
        if whole in ("torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor"):
            return lambda storage, offset, shape, stride, *rest: _tensor(storage, offset, shape, stride)
        if whole in ("torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state"):
            return lambda data, *rest: data
        if whole in INERT or whole.startswith(INERT_PACKAGES):
            return self.records.setdefault(whole, type("Record", (Record,), {"origin": whole}))
        self.refused = self.refused or whole
        raise pickle.UnpicklingError(f"{whole} is not allowed")

    def persistent_load(self, pid: Any) -> StorageNote:
        word, kind, key, _, size = pid
        if word != "storage" or not isinstance(kind, _Kind) or type(key) is not str or type(size) is not int:
            raise pickle.UnpicklingError(f"{pid} is no storage")
        return StorageNote(key, kind.dtype, size)


@dataclass(frozen=True)
class _Kind:
    """The class of a storage."""

    dtype: torch.dtype


def _tensor(storage: Any, offset: Any, shape: Any, stride: Any) -> TensorNote:
    numbers = [offset, *shape, *stride]
    if not isinstance(storage, StorageNote) or not all(type(each) is int and 0 <= each < 1 << 48 for each in numbers):
        raise pickle.UnpicklingError("a tensor has an impossible shape")
    return TensorNote(storage, offset, tuple(shape), tuple(stride))
