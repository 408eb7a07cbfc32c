"""Proves that a training schedule computes the step, before anything runs."""

from megacore.schedule.instruction import Instruction, Op, Schedule


def check(schedule: Schedule) -> Schedule:
    """Returns the schedule if every rank computes the whole step.

    That is: stages 0 to n-1 each live on one rank; each forwards each microbatch once, then takes it back once, in
    ascending order (so that gradients sum alike in every schedule), and sums its gradients after the last one; on
    every rank the optimizer steps last of all.

    Raises ValueError with rank, position, instruction and reason.
    """
    _check_homes(schedule)
    for rank, instructions in enumerate(schedule.ranks):
        _check_rank(rank, instructions, schedule.num_microbatches)
    return schedule


def _check_homes(schedule: Schedule) -> None:
    """Without it, a stage that nobody mentions would pass as computed."""
    home: dict[int, int] = {}
    for rank, instructions in enumerate(schedule.ranks):
        stages = {instruction.stage for instruction in instructions if instruction.op is not Op.OPTIMIZE}
        if not stages:
            raise ValueError(f"rank {rank} has no stage")
        for stage in sorted(stages):
            if home.setdefault(stage, rank) != rank:
                raise ValueError(f"rank {rank} has stage {stage}, which rank {home[stage]} has already")
    if sorted(home) != list(range(len(home))):
        raise ValueError(f"the ranks have stages {sorted(home)}; they must be 0 to {len(home) - 1}")


def _check_rank(rank: int, instructions: tuple[Instruction, ...], num_microbatches: int) -> None:
    stages = {instruction.stage for instruction in instructions if instruction.stage >= 0}
    next_of = {(op, stage): 0 for op in (Op.FORWARD, Op.BACKWARD) for stage in stages}
    reduced: set[int] = set()
    stepped = False

    def refuse(position: int, reason: str) -> ValueError:
        return ValueError(f"rank {rank}, position {position}, {instructions[position]}: {reason}")

    for position, instruction in enumerate(instructions):
        op, stage, microbatch = instruction.op, instruction.stage, instruction.microbatch
        if stepped:
            raise refuse(position, "nothing may follow the optimizer step")
        if op in (Op.FORWARD, Op.BACKWARD):
            expected = next_of[op, stage]
            if microbatch != expected or microbatch >= num_microbatches:
                raise refuse(position, f"microbatch {expected} of {num_microbatches} is due")
            if op is Op.BACKWARD and microbatch >= next_of[Op.FORWARD, stage]:
                raise refuse(position, "its forward has not run")
            next_of[op, stage] += 1
        elif op is Op.REDUCE:
            if next_of[Op.BACKWARD, stage] != num_microbatches or stage in reduced:
                raise refuse(position, "a stage's gradients are summed once, after its last backward")
            reduced.add(stage)
        else:
            if reduced != stages:
                raise refuse(position, f"stages {sorted(stages - reduced)} have not summed their gradients")
            stepped = True
    if not stepped:
        raise ValueError(f"rank {rank} ends without an optimizer step")
