"""Optimizers, the global norm and learning-rate schedules."""
