"""Our kernels in C++/CUDA (csrc/cuda), each an operation ``torch.ops.megacore_cuda.NAME`` with a fake twin and an
autograd formula. ``library`` loads them or says why not; ``operations`` may be imported only where it did; ``build``
compiles.

Tests compile them, and run them on an emulated device that a C++ compiler makes of the same sources. They have never
run on a GPU.
"""
