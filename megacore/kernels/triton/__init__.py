"""Our kernels in Triton, one file per kind, each an operation ``torch.ops.megacore_triton.NAME`` with a fake twin and
an autograd formula. Only ``available`` may be imported where triton is not installed.

Tests run them in Triton's interpreter, on CPU tensors. They have never run on a GPU.
"""
