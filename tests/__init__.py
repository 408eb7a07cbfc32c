"""Tests, one folder per room, so that workers can import them by name."""
