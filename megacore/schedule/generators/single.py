"""The schedules of a pipeline of one rank: the orders in which one stage can take its microbatches."""

from megacore.schedule.check import check
from megacore.schedule.instruction import Instruction, Op, Schedule

END = (Instruction(Op.REDUCE, 0), Instruction(Op.OPTIMIZE))


def one_stage(kind: str, num_microbatches: int) -> Schedule:
    """``1f1b``: each microbatch goes back as soon as it is through, so one lives at a time.

    ``gpipe``: all go through first.
    """
    forward = [Instruction(Op.FORWARD, 0, i) for i in range(num_microbatches)]
    backward = [Instruction(Op.BACKWARD, 0, i) for i in range(num_microbatches)]
    if kind == "gpipe":
        body = forward + backward
    elif kind == "1f1b":
        body = [instruction for pair in zip(forward, backward, strict=True) for instruction in pair]
    else:
        raise ValueError(f"parallel.schedule={kind} needs parallel.pp > 1; for one stage use 1f1b or gpipe")
    return check(Schedule(kind, num_microbatches, ((*body, *END),)))


def forward_only(num_microbatches: int) -> Schedule:
    """Evaluation: every microbatch goes through, none comes back."""
    return Schedule(
        "forward", num_microbatches, (tuple(Instruction(Op.FORWARD, 0, i) for i in range(num_microbatches)),)
    )
