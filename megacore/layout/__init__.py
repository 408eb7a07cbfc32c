"""Integer arithmetic of a run: who is which rank, which stage holds which layer, which slice of a tensor is whose."""

from megacore.layout.buffer import BufferLayout, Slot
from megacore.layout.layout import Layout
from megacore.layout.partition import Piece, Segment, Split, balanced
from megacore.layout.stages import stages_of_layers

__all__ = ["BufferLayout", "Layout", "Piece", "Segment", "Slot", "Split", "balanced", "stages_of_layers"]
