"""Building a run and walking its steps."""
