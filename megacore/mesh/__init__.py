"""Ranks that talk: groups along the axes of the mesh, collectives over them, their conjugate autograd pairs."""
