"""Measure adapters on labelled rows: tasks, rows, a loaded base model, scorers, lm-evaluation-harness.

In: adapters, tasks, a base model. Out: a `Score` for each. Uses: `adapters`, `merging`.
"""

BATCH_SIZE = 32  # rows
