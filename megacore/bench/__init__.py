"""Measured ratios: a harness that alternates two programs in one run, and the baselines to be measured against."""
