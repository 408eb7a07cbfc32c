"""One process alone: groups of size 1 never touch torch.distributed."""

from types import FunctionType
from typing import Any

import pytest
import torch
from torch import distributed

from megacore.mesh import autograd, collectives
from megacore.mesh.group import CommLog, Group
from megacore.mesh.mesh import ParallelMesh


@pytest.fixture
def no_distributed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every function of torch.distributed raises."""

    def forbidden(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("torch.distributed was touched")

    for name in [name for name, value in vars(distributed).items() if type(value) is FunctionType]:
        monkeypatch.setattr(distributed, name, forbidden)
    with pytest.raises(AssertionError, match="touched"):
        distributed.is_initialized()


@pytest.mark.usefixtures("no_distributed")
def test_every_collective_gives_back_its_input() -> None:
    log = CommLog()
    group = Group("tp", log=log)
    x = torch.randn(4, 3, requires_grad=True)
    assert all(
        result is x
        for result in (
            collectives.all_reduce(x, group),
            collectives.all_gather(x, group, 1),
            collectives.reduce_scatter(x, group),
            collectives.all_to_all(x, group),
            collectives.broadcast(x, group),
            collectives.all_reduce_start(x, group, "max").wait(),
            collectives.all_gather_start(x, group).wait(),
            collectives.reduce_scatter_start(x, group).wait(),
            autograd.copy_to(x, group),
            autograd.reduce_from(x, group),
            autograd.gather_from(x, group, 1),
            autograd.scatter_to(x, group),
            autograd.all_gather_summed(x, group),
            autograd.reduce_scatter_to(x, group),
        )
    )
    collectives.barrier(group)
    assert collectives.gather_objects("x", group) == ["x"]
    collectives.agree(None, group)
    with pytest.raises(KeyError):
        collectives.agree(KeyError("own"), group)
    assert log == []


@pytest.mark.usefixtures("no_distributed")
def test_a_mesh_of_one_process() -> None:
    mesh = ParallelMesh.single()
    groups = [value for value in vars(mesh).values() if isinstance(value, Group)]
    assert len(groups) == 13
    assert all(group.size == 1 and group.handle is None and group.ranks == (0,) for group in groups)
    assert {group.axis for group in groups} == {name for name, value in vars(mesh).items() if isinstance(value, Group)}
