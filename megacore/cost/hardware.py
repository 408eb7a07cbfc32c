"""What an accelerator can do at best: the peaks that MFU is measured against.

All figures are the vendor's data-sheet values for dense matrices (data sheets like to print the 2:4 sparse figure,
which is twice as large), in TFLOP/s, GB and GB/s with 1 G = 1e9. Source: NVIDIA data sheets of A100 (2021), H100
(2023), H200 (2024), HGX B200 and B300, GB200 and GB300 NVL72 (2025, per GPU).
"""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Accelerator:
    """One device: dense matrix peaks by number format, its memory and how fast that memory is.

    `fp32` is full single precision (torch's default for matrix products); `tf32` is what the tensor cores do with
    fp32 inputs when torch is allowed to round them. A peak of None: the device has no units for that format.
    """

    name: str
    device_name: str  # pattern that torch.cuda.get_device_name() matches
    fp64: float
    fp32: float
    tf32: float
    bf16: float
    fp16: float
    fp8: float | None
    memory_gb: float
    memory_gb_per_s: float

    def peak_tflops(self, dtype: str) -> float | None:
        """The dense peak in TFLOP/s for "fp64", "fp32", "tf32", "bf16", "fp16" or "fp8"; None without such units."""
        if dtype not in FORMATS:
            raise ValueError(
                f"dtype={dtype!r} is not a number format with a known peak; use one of {', '.join(FORMATS)}"
            )
        peak: float | None = getattr(self, dtype)
        return peak


FORMATS = ("fp64", "fp32", "tf32", "bf16", "fp16", "fp8")

# The first pattern that matches wins, so the special forms of a chip stand before the plain one. \b keeps the
# "H200" of a Grace-Hopper "GH200" (another memory, another clock) from passing for an H200.
ACCELERATORS = (
    #           name         torch's device name     fp64  fp32  tf32   bf16   fp16   fp8   GB   GB/s
    Accelerator("a100-40gb", r"\bA100\b.*\b40GB\b", 19.5, 19.5, 156.0, 312.0, 312.0, None, 40, 1555),
    Accelerator("a100-80gb-pcie", r"\bA100 80GB PCIe", 19.5, 19.5, 156.0, 312.0, 312.0, None, 80, 1935),
    Accelerator("a100-80gb", r"\bA100\b.*\b80GB\b", 19.5, 19.5, 156.0, 312.0, 312.0, None, 80, 2039),
    Accelerator("h100-pcie", r"\bH100 PCIe", 51.2, 51.2, 378.0, 756.0, 756.0, 1513.0, 80, 2000),
    Accelerator("h100-nvl", r"\bH100 NVL", 60.0, 60.0, 417.5, 835.5, 835.5, 1671.0, 94, 3900),
    Accelerator("h100-96gb", r"\bH100\b.*\b(94|96)GB\b", 66.9, 66.9, 494.7, 989.4, 989.4, 1978.9, 96, 2400),
    Accelerator("h100-sxm", r"\bH100\b.*\b80GB\b", 66.9, 66.9, 494.7, 989.4, 989.4, 1978.9, 80, 3350),
    Accelerator("h200-nvl", r"\bH200 NVL", 60.0, 60.0, 417.5, 835.5, 835.5, 1671.0, 141, 4800),
    Accelerator("h200", r"\bH200\b", 66.9, 66.9, 494.7, 989.4, 989.4, 1978.9, 141, 4800),
    Accelerator("gb200", r"\bGB200\b", 40.0, 80.0, 1250.0, 2500.0, 2500.0, 5000.0, 186, 8000),
    Accelerator("gb300", r"\bGB300\b", 1.3, 77.0, 1250.0, 2500.0, 2500.0, 5000.0, 279, 8000),
    Accelerator("b200", r"\bB200\b", 37.0, 75.0, 1100.0, 2250.0, 2250.0, 4500.0, 180, 7700),
    Accelerator("b300", r"\bB300\b", 1.2, 75.0, 1100.0, 2250.0, 2250.0, 4500.0, 270, 7700),
)


def find_accelerator(device_name: str) -> Accelerator | None:
    """The accelerator behind the name that torch gives a device, such as "NVIDIA H100 80GB HBM3".

    None where the peak is unknown: a CPU, a chip not listed, or a slice of one (MIG), whose share we cannot know.
    """
    if re.search(r"\bMIG\b", device_name):
        return None
    return next((found for found in ACCELERATORS if re.search(found.device_name, device_name)), None)


def model_flops_utilization(tflops_per_device: float, device_name: str, dtype: str) -> float | None:
    """MFU: the share (0 to 1) of the device's dense peak that the model's own FLOPs reach; None if it is unknown."""
    accelerator = find_accelerator(device_name)
    peak = accelerator.peak_tflops(dtype) if accelerator else None
    return tflops_per_device / peak if peak else None
