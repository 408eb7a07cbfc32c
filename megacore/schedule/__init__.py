"""Pipeline schedules as data: lists of instructions, generated, lowered, written, read and checked before anything
runs."""

from megacore.schedule.instruction import Instruction, Op
from megacore.schedule.schedule import Instructions, Schedule

__all__ = ["Instruction", "Instructions", "Op", "Schedule"]
