"""One self-contained page about a run: what it did, how well, and what happened to it."""
