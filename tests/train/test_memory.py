"""Memory that fails: a bit of what ranks hold copies of is found and blamed; what has no copy is not, as is shown."""

from pathlib import Path

import pytest
import torch

from megacore.checkpoint.find import folder_of
from megacore.checkpoint.manifest import MANIFEST
from megacore.config.optimizers import optimizer_names
from megacore.launch.train import main
from megacore.train.failpoints import Failpoints, parse
from megacore.train.guards import MOST_TOLD
from megacore.train.replicas import Difference, differences, moments_of
from megacore.train.spoiling import arm
from tests.engine.common import built_rank, run_config, step_of
from tests.pool import WorkerPool
from tests.train.runs import events, figures, killed, last_state, words_of

WORLD = 3
COPIES = {
    "zero0": (),
    "zero3": ("parallel.zero=3", "parallel.dp_shard=1"),
}
Found = tuple[Difference, ...]


def found_of_rank(rank: int, words: tuple[str, ...], fault: str, lr: float) -> tuple[Found, Found, bool]:
    """What differs after a good step and after the one in which something is spoilt; whether that was skipped here."""
    built = built_rank(rank, WORLD, run_config(WORLD, "train.global_batch_size=6", *words))
    asked = parse(fault)
    points = Failpoints((asked,) if asked.rank == rank else ())
    arm(points, built.trainer)
    found = []
    for step in (1, 2):
        points.begin(step)
        step_of(built, step, lr)
        found.append(differences(built.trainer))
    return found[0], found[1], built.trainer.result.skipped.item() > 0


@pytest.mark.parametrize("copies", COPIES)
@pytest.mark.parametrize(
    ("fault", "words", "lr", "named"),
    [
        ("weight#2:1:2:bitflip", (), 1e-3, "layers.0.attention"),
        ("gradient#2:1:2:bitflip", (), 1e-3, "layers.0.attention"),
        ("gradient#2:1:2:nan", (), 1e-3, ""),
        ("moment#2:1:2:bitflip", (), 0.0, "the optimizer's first of layers.0.attention"),
        ("number#1:1:2:bitflip", (), 0.0, "the optimizer's clock"),
        ("number#2:1:2:bitflip", ("precision.dtype=fp16",), 0.0, "the loss scale's scale"),
    ],
)
def test_who_holds_it_is_blamed(
    pool: WorkerPool, copies: str, fault: str, words: tuple[str, ...], lr: float, named: str
) -> None:
    """Of three copies one is spoilt, which two others outvote: on all ranks alike."""
    told = pool.run(found_of_rank, WORLD, (*words, *COPIES[copies]), fault, lr)
    assert all(before == () and after == told[0][1] for before, after, _ in told)
    assert told[0][1] and all(each.ranks == (1,) and each.certain for each in told[0][1])
    assert any(named in each.name for each in told[0][1])
    if fault.endswith("nan"):  # the copies took the step, and it did not
        assert [skipped for *_, skipped in told] == [False, True, False]


def test_what_one_rank_alone_owns_is_not_seen(pool: WorkerPool) -> None:
    """Under ZeRO over all ranks a shard has one owner: what it makes of a bad gradient all others take over."""
    for fault in ("gradient#1:1:2:bitflip", "moment#1:1:2:bitflip"):
        for before, after, skipped in pool.run(found_of_rank, WORLD, ("parallel.zero=1",), fault, 1e-3):
            assert before == after == () and not skipped


def bad_sum_of_rank(rank: int) -> tuple[Found, float]:
    """What differs after a step in which one rank adds a wrong number to the sum over copies; a weight."""
    built = built_rank(rank, WORLD, run_config(WORLD, "train.global_batch_size=6", "parallel.zero=0"))
    storage, begin = built.storage, built.storage.begin
    if rank == 1:

        def spoil() -> None:
            begin()
            storage.own_grads[1].view(-1)[0] = 1.0

        storage.begin = spoil  # type: ignore[method-assign]
    step_of(built, 1, 1e-3)
    return differences(built.trainer), storage.weights[1].view(-1)[0].item()


def test_before_the_sum_it_is_in_all_copies_alike(pool: WorkerPool) -> None:
    found, weights = zip(*pool.run(bad_sum_of_rank, WORLD))
    assert found == ((), (), ()) and len(set(weights)) == 1


def frozen_of_rank(rank: int) -> Found:
    words = ("train.global_batch_size=6", 'optim.freeze=["embedding.*"]')
    built = built_rank(rank, WORLD, run_config(WORLD, *words))
    (frozen,) = [param for param in built.stages[0].parameters() if not param.requires_grad]
    if rank == 2:
        frozen.data.view(-1).view(torch.int64)[5] ^= 1
    return differences(built.trainer)


def test_what_is_frozen_is_compared_too(pool: WorkerPool) -> None:
    for (found,) in pool.run(frozen_of_rank, WORLD):
        assert found == Difference("embedding.tokens.weight", (2,), True)


@pytest.mark.parametrize("name", optimizer_names())
def test_all_that_an_optimizer_remembers_is_compared(name: str) -> None:
    words = ("optim.momentum=0.9",) if name == "sgd" else ()
    built = built_rank(0, 1, run_config(1, f"optim.name={name}", *words))
    kept = [tensor.data_ptr() for tensors in built.trainer.rule.state().values() for tensor in tensors]
    compared = [tensor.data_ptr() for tensor in moments_of(built.trainer).values()]
    assert kept and compared == kept, "none has the name of another"
    assert differences(built.trainer) == ()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("weight#5:1:4:bitflip", ("parallel.zero=0",)),
        ("weight#5:1:4:bitflip", ("parallel.zero=3", "parallel.dp_shard=1")),
        ("gradient#5:1:4:bitflip", ()),
        ("moment#5:1:4:bitflip", ()),
        ("number#1:1:4:bitflip", ()),
    ],
)
def test_a_run_ends_before_anything_spoilt_is_saved(
    fault: str, words: tuple[str, ...], letters: str, tmp_path: Path
) -> None:
    """The rank is named, and the same command goes on as if nothing had been."""
    more = ("train.global_batch_size=6", "guard.replicas_every=1", "parallel.dp=3", *words, "--nproc", "3")
    command = words_of(letters, tmp_path / "run", *more)
    assert "CopiesDiffer" in killed(fault, command)
    corrupt = events(tmp_path / "run", "corruption")
    assert 0 < len(corrupt) <= MOST_TOLD and all(each["ranks"] == [1] and each["step"] == 4 for each in corrupt)
    kept = [manifest.parent.name for manifest in (tmp_path / "run" / "checkpoints").glob(f"*/{MANIFEST}")]
    assert kept == [folder_of(2)], "what is spoilt after step 4 is not saved, what was begun before is"
    assert main(command) == 0
    assert main(words_of(letters, tmp_path / "whole", *more)) == 0
    assert figures(tmp_path / "run") == figures(tmp_path / "whole")
    assert last_state(tmp_path / "run") == last_state(tmp_path / "whole")
