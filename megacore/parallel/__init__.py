"""Layers whose matrices, vocabulary and activations are split over the tensor-parallel group."""
