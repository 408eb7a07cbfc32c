"""The global norm counts each element once, whatever ranks hold copies or runs of its parameter."""

import pytest
import torch

from megacore.layout import Layout
from megacore.layout.partition import Segment
from megacore.layout.shards import Run
from megacore.mesh.group import Group
from megacore.mesh.mesh import ParallelMesh
from megacore.optim.counted import LONGEST, Counted
from megacore.optim.norm import GlobalNorm
from megacore.spec import ParamSpec
from megacore.spec.params import columns
from tests.optim.cutting import LAYOUTS, SPECS, alone, cut, whole_tensor
from tests.pool import WorkerPool


def norms_of_rank(rank: int, layout: Layout) -> tuple[float, list[float]]:
    own = cut(rank, layout)
    grads = own.of(whole_tensor)
    norm, squares = own.norm(grads), own.norm.squares(grads)
    assert norm.dtype == squares.dtype == torch.float64
    assert norm.shape == ()
    return norm.item(), squares.tolist()


@pytest.mark.parametrize("layout", [Layout(), *LAYOUTS], ids=Layout.describe)
def test_norms_are_those_of_whole_gradients_on_every_rank(pool: WorkerPool, layout: Layout) -> None:
    wholes = [whole_tensor(place, spec).reshape(-1) for place, spec in enumerate(SPECS)]
    results = pool.run(norms_of_rank, layout.world, layout)
    for norm, squares in results:
        assert norm == pytest.approx(torch.cat(wholes).norm().item(), rel=1e-14)
        assert squares == pytest.approx([whole.square().sum().item() for whole in wholes], rel=1e-14)
    assert len({norm for norm, _ in results}) == 1  # to the bit: ranks must agree on clipping


def norm_of_pieces_on_rank(rank: int, layout: Layout) -> tuple[float, float]:
    """The norm of whole tensors as runs, and as a sum of the norms of pieces."""
    own = cut(rank, layout)
    tp = own.mesh.tp
    squares = torch.zeros(len(SPECS), dtype=torch.float64)
    for place, spec in enumerate(SPECS):
        local = own.local(spec, whole_tensor(place, spec)).to(torch.float32)
        for piece in spec.pieces(tp.rank, tp.size):
            if piece.copy == 0:
                squares[place] += local.narrow(spec.dim, piece.local, piece.size).norm().to(torch.float64).square()
    if tp.size > 1:
        torch.distributed.all_reduce(squares, group=tp.handle)
    return own.norm(own.of(whole_tensor, torch.float32)).item(), squares.sum().sqrt().item()


@pytest.mark.parametrize("layout", [Layout(), Layout(tp=2)], ids=Layout.describe)
def test_whole_tensors_give_the_bits_of_their_pieces(pool: WorkerPool, layout: Layout) -> None:
    for norms in pool.run(norm_of_pieces_on_rank, layout.world, layout):
        assert len(set(norms)) == 1


@pytest.mark.parametrize("poison", [torch.inf, torch.nan])
def test_one_bad_number_shows(poison: float) -> None:
    own = alone()
    grads = [torch.zeros(run.numel, dtype=torch.float32) for run in own.runs]
    assert own.norm(grads).item() == 0.0
    grads[-2][-1] = poison
    assert not own.norm(grads).isfinite()


def test_squares_of_16_bit_gradients_do_not_overflow() -> None:
    own = alone()
    grads = [torch.full((run.numel,), 6e4, dtype=torch.float16) for run in own.runs]
    whole = torch.cat([grad.to(torch.float64) for grad in grads]).norm().item()
    assert own.norm(grads).item() == pytest.approx(whole, rel=1e-6)


def test_what_has_no_run_has_no_part_in_the_norm() -> None:
    run = Run("final_norm.weight", 2, 5, 0)
    mesh = ParallelMesh.single()
    squares = GlobalNorm([run], SPECS, mesh, mesh.dp_shard).squares([torch.ones(3, dtype=torch.float64)])
    assert squares.sum().item() == pytest.approx(3.0)
    assert [SPECS[place].name for place in squares.nonzero()] == [run.name]


def test_a_rank_without_runs_has_nothing_to_count() -> None:
    mesh = ParallelMesh.single()
    assert GlobalNorm([], SPECS, mesh, mesh.dp_shard)([]).item() == 0.0


def test_a_long_gradient_has_as_exact_a_norm_as_a_short_one() -> None:
    number = 1 << 23
    mesh = ParallelMesh.single()
    norm = GlobalNorm([Run("w", 0, number, 0)], [ParamSpec("w", (number,))], mesh, mesh.dp_shard)
    grad = torch.randn(number, generator=torch.Generator().manual_seed(0))
    assert norm([grad]).item() == pytest.approx(grad.double().norm().item(), rel=1e-5)
    assert len(norm.counted.parts) == number // LONGEST


@pytest.mark.parametrize("rank", range(4))
def test_copies_inside_rows_are_left_out(rank: int) -> None:
    """No parameter of ours has copied columns; a rank counts those that it owns, row by row."""
    spec = ParamSpec("w", (3, 8), columns(Segment(4), Segment(4, 2, replicate=True)))
    tp = Group("tp", tuple(range(4)), rank, object(), "gloo")  # type: ignore[arg-type]
    counted = Counted([Run("w", 0, 4, 0), Run("w", 4, 9, 4)], [spec], tp)
    held = torch.arange(9.0).view(3, 3)  # its own column, then the two of the copied unit
    own = held[:, :1] if rank % 2 else held
    parts = torch.cat(counted.of([held.reshape(-1)[:4], held.reshape(-1)[4:]]))
    assert sorted(parts.tolist()) == own.reshape(-1).tolist()
    assert counted.numel == own.numel()
