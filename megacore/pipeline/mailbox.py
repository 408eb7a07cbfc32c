"""What stages hand to each other: by messages between ranks, by reference on one rank.

Parcels are named by what they are and who made them: the activation or the gradient (of its input) that stage s made
of microbatch m. Shapes are known to both ends. Receives are posted where the list has them, sends too; neither is
waited for there. At most ``WINDOW`` sends to one rank are under way: waiting for an older one cannot deadlock, because
the list was proved to run even if every send waits for its receive.
"""

from collections import deque
from collections.abc import Callable, Sequence

from torch import Tensor

from megacore.mesh.group import Group, Message, Pending
from megacore.mesh.messages import exchange_start
from megacore.schedule.instruction import SENDS, Instruction, Op

WINDOW = 2

Key = tuple[str, int, int]
KIND = ("activation", "gradient")


class Mailbox:
    """The parcels of one pipeline rank during one list of instructions."""

    def __init__(self, pp: Group, num_stages: int) -> None:
        self.pp, self.num_stages = pp, num_stages
        self.ready: dict[Key, Tensor] = {}
        self.coming: dict[Key, Pending] = {}
        self.leaving: dict[int, deque[Pending]] = {}

    def put(self, key: Key, x: Tensor) -> None:
        """Lay down what a stage made."""
        self.ready[key] = x

    def settle(self, key: Key) -> None:
        """Wait until what another stage made is here."""
        if key in self.coming:
            self.ready[key] = self.coming.pop(key).wait()

    def take(self, key: Key) -> Tensor:
        """What another stage made, once it is here; each parcel is taken once."""
        self.settle(key)
        return self.ready.pop(key)

    def post(self, instructions: Sequence[Instruction], buffer: Callable[[Instruction], Tensor]) -> None:
        """Start a run of sends and receives together; ``buffer`` makes the tensor that a receive fills."""
        sends = [i for i in instructions if i.op in SENDS]
        receives = [i for i in instructions if i.op not in SENDS]
        pending = exchange_start(
            [Message(self.ready.pop(key_of(i)).contiguous(), i.peer, self._tag(i)) for i in sends],
            [Message(buffer(i), i.peer, self._tag(i)) for i in receives],
            self.pp,
        )
        for instruction, one in zip(sends, pending):
            under_way = self.leaving.setdefault(instruction.peer, deque())
            under_way.append(one)
            if len(under_way) > WINDOW:
                under_way.popleft().wait()
        for instruction, one in zip(receives, pending[len(sends) :]):
            self.coming[key_of(instruction)] = one

    def close(self) -> None:
        """Wait until all sends have left; nothing may be left over."""
        for under_way in self.leaving.values():
            while under_way:
                under_way.popleft().wait()
        assert not self.ready and not self.coming, (list(self.ready), list(self.coming))

    def _tag(self, instruction: Instruction) -> int:
        kind, stage, microbatch = key_of(instruction)
        return (microbatch * self.num_stages + stage) * 2 + KIND.index(kind)


def key_of(instruction: Instruction) -> Key:
    """The parcel that a message carries."""
    gradient = instruction.op in (Op.SEND_GRADIENT, Op.RECEIVE_GRADIENT)
    return KIND[gradient], instruction.stage, instruction.microbatch
