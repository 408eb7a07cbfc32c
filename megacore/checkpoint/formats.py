"""Formats of numbers as safetensors files name them."""

from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor

DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {
        "F64": torch.float64,
        "F32": torch.float32,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
        "F8_E4M3": torch.float8_e4m3fn,
        "F8_E5M2": torch.float8_e5m2,
        "I64": torch.int64,
        "I32": torch.int32,
        "I16": torch.int16,
        "I8": torch.int8,
        "U8": torch.uint8,
        "BOOL": torch.bool,
    }
)
NAMES: Mapping[torch.dtype, str] = MappingProxyType({dtype: name for name, dtype in DTYPES.items()})


def dtype_of(name: str) -> torch.dtype:
    """Raises ValueError for a format that torch does not have."""
    if name not in DTYPES:
        raise ValueError(f"numbers of format {name} cannot be read; known are {', '.join(DTYPES)}")
    return DTYPES[name]


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    assert tensor.is_contiguous() and tensor.device.type == "cpu", (tensor.shape, tensor.stride(), tensor.device)
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().data
