"""Accelerators are told apart by the names that torch gives them."""

import pytest

from megacore.cost.hardware import ACCELERATORS, find_accelerator, model_flops_utilization


@pytest.mark.parametrize(
    ("device_name", "name"),
    [
        ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
        ("NVIDIA A100-PCIE-40GB", "a100-40gb"),
        ("NVIDIA A100-SXM4-80GB", "a100-80gb"),
        ("NVIDIA A100 80GB PCIe", "a100-80gb-pcie"),
        ("NVIDIA H100 80GB HBM3", "h100-sxm"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA H100 NVL", "h100-nvl"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA H200 NVL", "h200-nvl"),
        ("NVIDIA B200", "b200"),
    ],
)
def test_device_names_of_torch(device_name, name):
    assert find_accelerator(device_name).name == name


@pytest.mark.parametrize(
    "device_name", ["cpu", "", "NVIDIA GH200 480GB", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "Tesla T4"]
)
def test_unknown_devices_have_no_peak(device_name):
    assert find_accelerator(device_name) is None
    assert model_flops_utilization(100.0, device_name, "bf16") is None


def test_mfu_is_the_share_of_the_dense_peak():
    assert model_flops_utilization(494.7, "NVIDIA H100 80GB HBM3", "bf16") == pytest.approx(0.5)
    assert model_flops_utilization(156.0, "NVIDIA A100-SXM4-80GB", "tf32") == pytest.approx(1.0)
    assert model_flops_utilization(1.0, "NVIDIA A100-SXM4-80GB", "fp8") is None


def test_an_unknown_format_is_refused():
    with pytest.raises(ValueError, match=r"dtype='int3'.*use one of"):
        model_flops_utilization(1.0, "NVIDIA H200", "int3")


@pytest.mark.parametrize("accelerator", ACCELERATORS, ids=lambda accelerator: accelerator.name)
def test_tensor_core_formats_double_from_tf32_to_fp8(accelerator):
    assert accelerator.bf16 == accelerator.fp16 == pytest.approx(2 * accelerator.tf32, rel=0.03)
    if accelerator.fp8 is not None:
        assert accelerator.fp8 == pytest.approx(2 * accelerator.bf16, rel=0.01)
