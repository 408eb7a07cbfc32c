"""Fused operations: one table of backends, one plain reference for each."""
