"""Training steps as a competent user of PyTorch, transformers, DTensor and DDP writes them.

They are what the engine is measured against, so they must be as fast as those tools allow; none of them uses a line
of the engine.
"""
