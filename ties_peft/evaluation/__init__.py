"""Measure adapters on labelled rows: tasks, rows, a loaded base model, scorers, lm-evaluation-harness.

In: adapters, tasks, a base model. Out: a `Score` for each adapter and task. Uses: `adapters`, `merging`.
"""

BATCH_SIZE = 32  # rows that are run at once
