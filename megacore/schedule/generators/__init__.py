"""One file per family of schedules; each gives the lists of instructions."""
