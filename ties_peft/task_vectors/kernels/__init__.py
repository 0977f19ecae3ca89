"""Run the inner loops of a trim and an election as compiled code.

`backends` selects what is used, by device and size: numba on a CPU, Triton on a GPU, else torch. `fused` calls the selected
one; nothing else does.
"""
