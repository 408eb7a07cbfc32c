"""Flat buffers: where parameters and gradients are stored, and how gradients are summed over ranks."""
