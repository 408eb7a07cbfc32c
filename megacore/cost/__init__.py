"""The hardware's figures, and what a run on it costs. No torch here."""
