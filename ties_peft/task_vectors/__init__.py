"""Compute with task vectors: the mathematics of merging, free of files and models.

In: weighted task vectors of one module, factored (B·A) or dense. Out: merged vectors, thresholds, factors of a rank.
Uses: `errors`.

- `delta`: one task vector; `collection`: those of one module, with the operations of the papers (`trim`, `elect`,
  `disjoint_merge`, `drop`, `sum`)
- `trim`, `threshold`, `order_statistics`: which entries are kept; `sparsify`, `random_numbers`: random masks
- `elect`: signs, and the mean of what agrees
- `factorise`, `singular_values`, `subspace`: low-rank algebra
- `tiles` (threads), `processes`, `kernels` (compiled loops): who does the work
"""
