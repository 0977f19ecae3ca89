"""Merge adapters: options and recipes, the plan with all checks, the loop, the report, prepared and live merges.

In: adapters and a recipe. Out: a `Merged` adapter with its report. Uses: `methods`, `spaces`, `adapters`, `task_vectors`.
`merge` is the loop; `plan` checks everything before it; `encoding` gives the task vectors in the space's coordinates;
`thresholds` finds where trims cut; `measure` and `report` account for the result.
"""
