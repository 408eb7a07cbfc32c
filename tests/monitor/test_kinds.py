"""What a profile's events are taken for, by their names and by what they lie in."""

import pytest

from megacore.monitor import kinds
from megacore.monitor.kinds import Event, by_instruction, by_kind, merged, table


def leaf(name: str, own_us: float = 1000.0) -> Event:
    return Event(name, own_us)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("aten::mm", kinds.GEMM),
        ("aten::addmm", kinds.GEMM),
        ("mkldnn::_linear_pointwise", kinds.GEMM),
        ("aten::_scaled_mm", kinds.GEMM),
        ("aten::linear", kinds.GEMM),
        ("nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_TNT", kinds.GEMM),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", kinds.ATTENTION),
        ("aten::_scaled_dot_product_flash_attention_for_cpu_backward", kinds.ATTENTION),
        ("aten::copy_", kinds.COPIES),
        ("aten::_to_copy", kinds.COPIES),
        ("aten::cat", kinds.COPIES),
        ("aten::mul", kinds.ELEMENTWISE),
        ("megacore_cpu::rms_norm_", kinds.ELEMENTWISE),
        ("aten::_softmax", kinds.ELEMENTWISE),
        ("F0.3", kinds.OTHER),
        ("B0.3/2", kinds.OTHER),
        ("SA0.1>1 RG1.0<1", kinds.OTHER),
        ("step 3", kinds.OTHER),
        ("tp all_reduce", "collectives tp"),
        ("dp_cp all_reduce", "collectives dp"),
        ("dp_shard reduce_scatter", "collectives dp"),
        ("kv all_reduce", "collectives tp"),
        ("pp exchange", "collectives pp"),
    ],
)
def test_names(name: str, expected: str) -> None:
    found = by_kind([leaf(name)], 1000.0)
    assert found[expected] == 1.0
    assert sum(found.values()) == 1.0


@pytest.mark.parametrize(
    ("outer", "inner", "expected"),
    [
        ("_LinearCrossEntropy", "aten::mm", kinds.LOSS),
        ("_LinearCrossEntropyBackward", "aten::exp", kinds.LOSS),
        ("_LinearCrossEntropyBackward", "tp all_reduce", "collectives tp"),
        ("O", "aten::_fused_adamw_", kinds.OPTIMIZER),
        ("O", "dp_cp all_gather", "collectives dp"),
        ("tp all_gather", "aten::copy_", "collectives tp"),
        ("aten::scaled_dot_product_attention", "aten::mm", kinds.ATTENTION),
        ("F0.0", "aten::mm", kinds.GEMM),
        ("_ColumnParallelBackward", "aten::addmm", kinds.GEMM),
    ],
)
def test_what_lies_in_something(outer: str, inner: str, expected: str) -> None:
    found = by_kind([Event("step 1", 0.0, (Event(outer, 0.0, (leaf(inner),)),))], 1000.0)
    assert found[expected] == 1.0


def test_the_rest_is_idle_and_shares_are_of_all() -> None:
    events = [Event("F0.0", 100.0, (leaf("aten::mm", 600.0),)), leaf("aten::copy_", 200.0)]
    found = by_kind(events, 1000.0)
    assert found == pytest.approx({kinds.GEMM: 0.6, kinds.COPIES: 0.2, kinds.OTHER: 0.2})
    assert list(found) == [kinds.GEMM, kinds.COPIES, kinds.OTHER]
    assert by_kind(events, 500.0)[kinds.OTHER] == 0, "a device does several things at once"
    assert kinds.as_json(found, 2)[kinds.GEMM] == {"ms": 0.3, "share": 0.6}
    lines = table(found, 2)
    assert "0.30 ms" in lines[0] and lines[0].endswith("60.0%")


def test_instructions_have_all_that_lies_in_them() -> None:
    step = Event("step 1", 5.0, (Event("F0.0", 1000.0, (leaf("aten::mm"),)), leaf("F0.1"), leaf("B0.0/1"), leaf("O")))
    assert by_instruction([step]) == {"B": 1.0, "F": 3.0, "O": 1.0}


def test_ranks_that_lack_a_kind_count_too() -> None:
    assert merged([{kinds.GEMM: 2.0}, {kinds.GEMM: 4.0, kinds.LOSS: 1.0}]) == {kinds.GEMM: 3.0, kinds.LOSS: 0.5}
