"""Proves that layouts compute what one process computes, parameter by parameter.

`layouts` and `covering` say which layouts, `plan`, `twin` and `samples` on which model and batch; `ranks` computes them
on one pool of processes, `measure` compares, `outcome` and `screen` tell.
"""
