"""Read, count and merge the entries of task vectors: by torch, or in compiled code that does not write B·A to memory.

`backends` has these three functions and decides which code does the work. `numba_kernels` is the compiled code, for
large merges on a CPU.
"""
