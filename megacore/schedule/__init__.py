"""Pipeline schedules as data: lists of instructions, generated, written, read and checked before anything runs."""

from megacore.schedule.instruction import Instruction, Op, Schedule

__all__ = ["Instruction", "Op", "Schedule"]
