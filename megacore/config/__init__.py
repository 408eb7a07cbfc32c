"""The description of a run: what can be written, how it is read, what is legal."""
