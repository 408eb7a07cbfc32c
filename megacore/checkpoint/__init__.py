"""Checkpoints: state by global name and slice, saved from any layout and read into any other."""
