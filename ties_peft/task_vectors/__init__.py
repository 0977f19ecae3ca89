"""Compute with task vectors: the mathematics of merging, free of files and models.

In: weighted task vectors of one module, factored (B·A) or dense. Out: merged vectors, thresholds, factors of a rank.
Uses: `errors`. `collection.TaskVectors` has the verbs of the papers (`trim`, `elect`, `disjoint_merge`, `drop`, `sum`); below it
stand the pieces: `trim`, `threshold`, `elect`, `sparsify`, `factorise`, `singular_values`, `subspace`, `random_numbers`, and what
divides the work: `tiles` (threads), `processes`, `kernels`.
"""
