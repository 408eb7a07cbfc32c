"""The number, size and order of collectives in a step, per group, equal the formulas of the papers.

Per layer and microbatch tensor parallelism moves 8 t h (n-1)/n elements (t tokens, h hidden, n ranks), with sequence
parallelism as much (Korthikanti et al. 2022, section 4.2.2), regathering inputs a quarter more; data parallelism
moves 2 P (n-1)/n of P gradients per step.
"""

from collections import Counter
from typing import NamedTuple

import pytest

from megacore.config.schema import RunConfig
from megacore.layout.buffer import ALIGNMENT
from megacore.mesh.group import CommLog, CommRecord
from tests.engine.common import built_rank, run_config, step_of
from tests.pool import WorkerPool

Seen = list[tuple[str, int]]
WISHES = ("all_reduce", 3)
"""To stop, save, profile: a tensor-parallel group has equal sums of losses, but each rank has wishes of its own."""
TOTALS = ("all_reduce", 5)
"""Loss and count, and the wishes with them."""


def log_of_rank(rank: int, world_size: int, config: RunConfig) -> tuple[list[CommRecord], int]:
    log = CommLog()
    built = built_rank(rank, world_size, config, log)
    log.clear()
    step_of(built, step=1)
    return list(log), built.storage.layout.size


def logs(pool: WorkerPool, world_size: int, *overrides: str) -> tuple[list[CommRecord], int, RunConfig]:
    """What one rank said (all say the same), the size of its gradient buffer, and the run."""
    config = run_config(world_size, "model.vocab_size=1004", *overrides)  # so that all ranks hold equal parts
    results = pool.run(log_of_rank, world_size, world_size, config)
    assert all(result == results[0] for result in results), "ranks must do the same in the same order"
    return *results[0], config


def on_axis(records: list[CommRecord], axis: str) -> Seen:
    return [(record.operation, record.num_elements) for record in records if record.axis == axis]


def layer_elements(records: list[CommRecord], size: int, activation: int) -> float:
    """Elements that a rank sends in collectives over whole activations."""
    return sum(
        record.wire_elements(size) for record in records if record.axis == "tp" and record.num_elements == activation
    )


@pytest.mark.parametrize("size", [2, 4])
def test_tensor_parallelism(pool: WorkerPool, size: int) -> None:
    records, _, config = logs(pool, size, f"parallel.tp={size}")
    t, layers = 2 * config.train.seq_len, config.model.num_layers
    activation = t * config.model.hidden_size
    whole = ("all_reduce", activation)
    forward = [whole] + [whole, whole] * layers  # the embedding; attention and MLP of each layer
    loss = [("all_reduce", t), ("all_reduce", 2 * t)]  # largest logits; sums of exp and the targets' logits
    backward = [whole] + [whole, whole] * layers  # the head; MLP and attention of each layer
    step = (forward + loss + backward) * 4
    kv_copies = [record for record in records if record.axis == "kv"]
    assert on_axis(records, "tp") == [*step, WISHES]
    assert len(kv_copies) == (1 if size == 4 else 0), "2 kv heads on 4 ranks: their copies' gradients are summed once"
    assert on_axis(records, "model") == [("all_reduce", len(config_params(config)))], "the global norm"
    beside_the_layers = 2  # the embedding forward and the head backward
    per_layer = 8 * activation * (size - 1) / size
    expected = 4 * (layers * per_layer + beside_the_layers * 2 * activation * (size - 1) / size)
    assert layer_elements(records, size, activation) == expected


def config_params(config: RunConfig) -> list[str]:
    from megacore.spec import ModelSpec

    return [spec.name for spec in ModelSpec.of(config.model).params]


@pytest.mark.parametrize("regather", [False, True])
def test_sequence_parallelism(pool: WorkerPool, regather: bool) -> None:
    size = 2
    sequence = ("parallel.sequence_parallel=true", f"parallel.regather_inputs={str(regather).lower()}")
    records, _, config = logs(pool, size, f"parallel.tp={size}", *sequence)
    t, layers = 2 * config.train.seq_len, config.model.num_layers
    activation = t * config.model.hidden_size
    gather, scatter = ("all_gather", activation), ("reduce_scatter", activation)
    again = [gather] if regather else []
    forward = [scatter] + [gather, scatter] * 2 * layers + [gather]
    loss = [("all_reduce", t), ("all_reduce", 2 * t)]
    column, row = [*again, scatter], [gather]
    backward = column + (row + column) * 2 * layers + row
    norms = (2 * layers + 1) * config.model.hidden_size  # their gradients come from shards of the sequence
    assert on_axis(records, "tp") == (forward + loss + backward) * 4 + [("all_reduce", norms), WISHES]
    per_layer = (8 + 2 * regather) * activation * (size - 1) / size
    beside_the_layers = (4 + regather) * activation * (size - 1) / size
    assert layer_elements(records, size, activation) == 4 * (layers * per_layer + beside_the_layers)


@pytest.mark.parametrize("sequence", [False, True])
def test_recomputation(pool: WorkerPool, sequence: bool) -> None:
    """A block made again repeats its forward's collectives but the last sum; the core of attention has none."""
    layout = ("parallel.tp=2", f"parallel.sequence_parallel={str(sequence).lower()}")
    none, _, config = logs(pool, 2, *layout)
    assert logs(pool, 2, *layout, "parallel.recompute=selective")[0] == none
    full = logs(pool, 2, *layout, "parallel.recompute=full")[0]
    activation = 2 * config.train.seq_len * config.model.hidden_size
    forwards = 4 * config.model.num_layers
    per_layer = layer_elements(full, 2, activation) - layer_elements(none, 2, activation)
    # sums cost 2 (n-1)/n, gathers and scatters (n-1)/n: of a forward's 4, one sum or scatter is left out
    assert per_layer == forwards * activation * (3 if sequence else 2) / 2
    assert len(full) - len(none) == forwards * (3 if sequence else 1)


@pytest.mark.parametrize("size", [2, 4])
def test_data_parallelism(pool: WorkerPool, size: int) -> None:
    records, num_gradients, _ = logs(pool, size)
    assert on_axis(records, "dp_cp") == [("all_reduce", num_gradients), TOTALS], "gradients; loss and count"
    assert len(records) == 2, "nothing else travels"
    assert records[0].wire_elements(size) == 2 * num_gradients * (size - 1) / size


def test_tensor_and_data_parallelism_together(pool: WorkerPool) -> None:
    """Each axis says what it says alone, on a half of the parameters or of the microbatches."""
    both, num_gradients, _ = logs(pool, 4, "parallel.tp=2")
    tensor, alone, _ = logs(pool, 2, "parallel.tp=2")
    assert num_gradients == alone
    whole = on_axis(tensor, "tp")[:-1]
    assert on_axis(both, "tp") == [*whole[: len(whole) // 2], WISHES]
    assert on_axis(both, "dp_cp") == [("all_reduce", num_gradients), TOTALS]


def test_one_process_is_silent(pool: WorkerPool) -> None:
    assert logs(pool, 1)[0] == []


class Sharded(NamedTuple):
    """What a rank said of parameters and gradients in one step, and the elements that it has of them."""

    records: list[CommRecord]
    buckets: list[int]
    of_units: list[int]
    """Elements of each unit's buckets, from the embedding to the head."""


def state_traffic_of_rank(rank: int, world_size: int, config: RunConfig) -> Sharded:
    log = CommLog()
    built = built_rank(rank, world_size, config, log)
    log.clear()
    step_of(built, step=1)
    storage = built.storage
    sizes = [end - start for start, end in storage.layout.buckets]
    axes = ("dp_cp", "dp_shard", "dp_replicate")
    # but for loss and count, and the norms of parameters
    records = [each for each in log if each.axis in axes and each.num_elements >= ALIGNMENT]
    return Sharded(records, sizes, [sum(sizes[bucket] for bucket in own) for own in storage.buckets.values()])


def state_traffic(
    pool: WorkerPool, ranks: int, num_microbatches: int, zero: int, *overrides: str
) -> tuple[Sharded, float]:
    """What each rank sends in a step for parameters and gradients, in elements; on all the same."""
    batch = ("train.micro_batch_size=1", f"train.global_batch_size={ranks * num_microbatches}")
    config = run_config(ranks, "optim.name=sgd", f"parallel.zero={zero}", *batch, *overrides)
    results = pool.run(state_traffic_of_rank, ranks, ranks, config)
    assert all(result == results[0] for result in results), "ranks must do the same in the same order"
    size_of = {"dp_cp": ranks, "dp_shard": config.parallel.dp_shard, "dp_replicate": ranks // config.parallel.dp_shard}
    return results[0], sum(record.wire_elements(size_of[record.axis]) for record in results[0].records)


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("zero", [0, 1, 2])
def test_stages_0_to_2_move_two_psi(pool: WorkerPool, zero: int, ranks: int) -> None:
    """M0023 to M0025: with one microbatch, 2 Psi (n - 1) / n (Rajbhandari et al. 2020, section 7)."""
    seen, sent = state_traffic(pool, ranks, 1, zero)
    psi = sum(seen.buckets)
    assert sent == 2 * psi * (ranks - 1) / ranks
    operations = Counter(record.operation for record in seen.records)
    num = len(seen.buckets)
    assert operations == ({"reduce_scatter": num, "all_gather": num} if zero else {"all_reduce": num})


@pytest.mark.parametrize("ranks", [2, 4])
def test_stage_3_moves_three_psi(pool: WorkerPool, ranks: int) -> None:
    """M0026: 3 Psi (n - 1) / n, but for the head, which stays between its forward and its backward."""
    seen, sent = state_traffic(pool, ranks, 1, 3)
    psi, head = sum(seen.of_units), seen.of_units[-1]
    assert sent == (3 * psi - head) * (ranks - 1) / ranks


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_microbatches_multiply_the_traffic_of_stages_2_and_3(pool: WorkerPool, zero: int) -> None:
    num_microbatches, ranks = 4, 2
    seen, sent = state_traffic(pool, ranks, num_microbatches, zero)
    psi, embedding, head = sum(seen.of_units), seen.of_units[0], seen.of_units[-1]
    if zero < 2:
        expected = 2 * sum(seen.buckets)
    elif zero == 2:
        expected = (num_microbatches + 1) * psi
    else:  # where the next use is of the same unit, it stays: the head in each, the embedding between two
        expected = 3 * num_microbatches * psi - num_microbatches * head - (num_microbatches - 1) * embedding
    assert sent == expected * (ranks - 1) / ranks


def test_hybrid_sharding_sums_a_share_over_the_copies(pool: WorkerPool) -> None:
    """Scatter and gather within pairs; each rank's half is then summed with the other pair's."""
    seen, sent = state_traffic(pool, 4, 1, 2, "parallel.dp_shard=2")
    psi = sum(seen.buckets)
    within, across = 2 * psi / 2, 2 * (psi / 2) / 2
    assert sent == within + across
    assert sum(each.num_elements for each in seen.records if each.axis == "dp_replicate") == psi / 2
