"""Messages between two ranks of a group. They are posted together and never waited for here: computing goes on.

Both ends know shape and dtype beforehand, so nothing but the numbers travels. ``tag`` names a message: gloo matches by
it, NCCL by order, which both ends' lists have in common.
"""

from collections.abc import Sequence
from types import MappingProxyType

from torch import Tensor

from megacore.mesh import gloo, imagined, nccl
from megacore.mesh.group import IMAGINED, Group, Message, Pending
from megacore.mesh.named import named

_BACKENDS = MappingProxyType({"gloo": gloo, "nccl": nccl, IMAGINED: imagined})


def exchange_start(sends: Sequence[Message], receives: Sequence[Message], group: Group) -> list[Pending]:
    """Posts all messages at once; gives what to wait for: of the sends, then of the receives, each in order.

    A tensor is not to be touched until its own ``wait`` returns it.
    """
    for message in sends:
        group.record("send", message.tensor, peer=message.peer)
    if group.log is not None and group.log.receives:
        for message in receives:
            group.record("receive", message.tensor, peer=message.peer)
    pending: list[Pending] = named(_BACKENDS[group.backend], group).exchange(sends, receives, group)
    return pending


def swap(x: Tensor, peer: int, tag: int, group: Group) -> Tensor:
    """x, any shape, of rank ``peer``, which calls this too; x stays as it is."""
    bare = x.detach().contiguous()
    pending = exchange_start([Message(bare, peer, tag)], [Message(bare.new_empty(bare.shape), peer, tag)], group)
    return [each.wait() for each in pending][1]
