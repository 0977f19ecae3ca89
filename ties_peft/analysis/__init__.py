"""Look at adapters before a merge, and show what a merge did.

`inspection` summarises adapters and checks whether they can be merged. `analyze` measures how they interfere, `advice` says
in sentences what follows.

In: adapters, or the report of a merge. Out: an `Inspection` or an `Analysis`, which print and convert to JSON. Uses:
`adapters`, `task_vectors`, `merging`.
"""
