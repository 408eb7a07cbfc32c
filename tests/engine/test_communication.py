"""The number, size and order of collectives in a step, per group, equal the formulas of the papers.

Per layer and microbatch tensor parallelism moves 8 t h (n-1)/n elements (t tokens, h hidden, n ranks), with sequence
parallelism as much (Korthikanti et al. 2022, section 4.2.2), regathering inputs a quarter more; data parallelism
moves 2 P (n-1)/n of P gradients per step.
"""

import pytest

from megacore.config.schema import RunConfig
from megacore.mesh.group import CommLog, CommRecord
from tests.engine.common import built_rank, run_config, step_of
from tests.pool import WorkerPool

Seen = list[tuple[str, int]]


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
    assert on_axis(records, "tp") == step
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
    assert on_axis(records, "tp") == (forward + loss + backward) * 4 + [("all_reduce", norms)]
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
    assert on_axis(records, "dp_cp") == [("all_reduce", num_gradients), ("all_reduce", 2)], "gradients; loss and count"
    assert len(records) == 2, "nothing else travels"
    assert records[0].wire_elements(size) == 2 * num_gradients * (size - 1) / size


def test_tensor_and_data_parallelism_together(pool: WorkerPool) -> None:
    """Each axis says what it says alone, on a half of the parameters or of the microbatches."""
    both, num_gradients, _ = logs(pool, 4, "parallel.tp=2")
    tensor, alone, _ = logs(pool, 2, "parallel.tp=2")
    assert num_gradients == alone
    assert on_axis(both, "tp") == on_axis(tensor, "tp")[: len(on_axis(tensor, "tp")) // 2]
    assert on_axis(both, "dp_cp") == [("all_reduce", num_gradients), ("all_reduce", 2)]


def test_one_process_is_silent(pool: WorkerPool) -> None:
    assert logs(pool, 1)[0] == []
