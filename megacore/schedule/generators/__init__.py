"""One file per family of schedules; each gives the lists of computing instructions, and ``lower`` adds the rest."""
