"""Read, count and merge the entries of task vectors: by torch, or in compiled code that does not write B·A to memory.

`backends` has a class for each, with these three functions, and selects one for a merge. `numba_kernels` is the compiled
code, for large merges on a CPU.
"""
