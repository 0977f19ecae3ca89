"""Compute with task vectors: the mathematics of merging, free of files and models.

In: weighted task vectors of one module, factored (B·A) or dense. Out: merged vectors, thresholds, factors of a rank.
Uses: `errors`. `collection.TaskVectors` has the operations of the papers (`trim`, `elect`, `disjoint_merge`, `drop`,
`sum`); it is built from `trim`, `threshold`, `elect`, `sparsify`, `factorise`, `singular_values`, `subspace`,
`random_numbers`, and what divides the work: `tiles` (threads), `processes`, `kernels`.
"""
