"""Lists in finer steps: a stage's units (embedding, blocks, head) one at a time, for ZeRO stages 2 and 3.

Who keeps only a part of the gradients sums a unit's as soon as they are complete; who keeps only a part of the
parameters gathers a unit's before use, one unit ahead, and frees them after it. A stage's list becomes

    F0.0                ->  G0.0 G0.1 F0.0/0 X0.0 G0.2 F0.0/1 X0.1 F0.0/2 ...
    B0.0 (2 units)      ->  B0.0/1 R0/1 B0.0/0 R0/0

Who keeps whole gradients sums them once, when a stage's last backward is done with them. Only that one is cut then (and
the first forward, where new weights are still on their way):

    F0.1 B0.1 R0        ->  F0.1/0 F0.1/1 B0.1/1 R0/1 B0.1/0 R0/0

Nothing changes between ranks: messages stand where they stood.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping

from megacore.schedule.instruction import COMPUTE, Instruction, Op

Unit = tuple[int, int]
NEEDS_PARAMS = (Op.FORWARD, Op.BACKWARD, Op.INPUT_GRAD)


def by_unit(instructions: Iterable[Instruction], num_units: Mapping[int, int], gathers: bool) -> list[Instruction]:
    """One rank's lowered list with every computation cut into those of the ``num_units`` units of its stage.

    Sums follow a unit's last outstanding weight gradient; with ``gathers`` parameters come and go around their use.
    """
    fine = list(_with_sums(_cut(instructions, num_units)))
    return list(_with_gathers(fine)) if gathers else fine


def with_early_sums(
    instructions: Iterable[Instruction], num_units: Mapping[int, int], late_weights: bool = False
) -> list[Instruction]:
    """One rank's lowered list, in which sums of the stages of ``num_units`` begin while their last backward goes on.

    With ``late_weights`` their first forward goes unit by unit, too, so that it can begin before all weights are there.
    Where that is half of a pair, or its forward is, it stays whole, and the sum behind it.
    """
    listed = list(instructions)
    last: dict[int, Instruction] = {}
    paired = {(each.stage, each.microbatch) for each in listed if each.op is Op.PAIR}
    for each in listed:
        if each.op in (Op.BACKWARD, Op.WEIGHT_GRAD):
            last[each.stage] = each
        elif each.op is Op.PAIR:
            last.pop(each.back_stage, None)
    cut = {each[1:3] for each in last.values() if each.stage in num_units and each[1:3] not in paired}
    stages = {stage for stage, _ in cut}
    if late_weights:
        first: dict[int, Instruction] = {}
        for each in listed:
            if each.op is Op.FORWARD:
                first.setdefault(each.stage, each)
        cut |= {each[1:3] for stage, each in first.items() if stage in stages and each[1:3] not in paired}
    fine = []
    for each in listed:
        if each.op in COMPUTE and each.op is not Op.PAIR and each[1:3] in cut:
            for part in _cut((each,), num_units):
                fine.append(part)
                if each == last.get(each.stage):
                    fine.append(Instruction(Op.REDUCE, part.stage, unit=part.unit))
        elif each.op is not Op.REDUCE or each.stage not in stages:
            fine.append(each)
    return fine


def _cut(instructions: Iterable[Instruction], num_units: Mapping[int, int]) -> Iterator[Instruction]:
    for each in instructions:
        if each.op is Op.PAIR:
            halves = (
                Instruction(Op.FORWARD, each.stage, each.microbatch),
                Instruction(Op.BACKWARD, each.back_stage, each.back_microbatch),
            )
            yield from _cut(halves, num_units)
        elif each.op in COMPUTE:
            units = range(num_units[each.stage])
            for unit in units if each.op is Op.FORWARD else reversed(units):
                yield each._replace(unit=unit)
        elif each.op is not Op.REDUCE:  # units are summed one by one
            yield each


def _with_sums(fine: Iterable[Instruction]) -> Iterator[Instruction]:
    """Where weight gradients lag behind, a unit's are summed when none is outstanding."""
    outstanding: Counter[Unit] = Counter()
    for each in fine:
        yield each
        unit = each.stage, each.unit
        outstanding[unit] += (each.op is Op.INPUT_GRAD) - (each.op is Op.WEIGHT_GRAD)
        if each.op in (Op.BACKWARD, Op.WEIGHT_GRAD) and not outstanding[unit]:
            yield Instruction(Op.REDUCE, each.stage, unit=each.unit)


def _with_gathers(fine: list[Instruction]) -> Iterator[Instruction]:
    """Parameters come one use ahead, and stay if the next use is of the same unit."""
    uses = [(each.stage, each.unit) for each in fine if each.op in NEEDS_PARAMS]
    number = 0
    for each in fine:
        if each.op not in NEEDS_PARAMS:
            yield each
            continue
        unit, after = uses[number], uses[number + 1] if number + 1 < len(uses) else None
        if number == 0:
            yield Instruction(Op.GATHER, unit[0], unit=unit[1])
        if after is not None and after != unit:
            yield Instruction(Op.GATHER, after[0], unit=after[1])
        yield each
        if after != unit:
            yield Instruction(Op.FREE, unit[0], unit=unit[1])
        number += 1
