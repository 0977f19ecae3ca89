"""Count and merge the entries of B·A in compiled code, without writing them to memory.

`backends` selects what is used, by device and size: numba on a CPU, Triton on a GPU, else none, and torch computes. The
module that is selected has three functions: `multiply`, `count` and `merge`.
"""
