"""Merge adapters: options and recipes, the plan with all checks, the loop, the report, prepared and live merges.

In: adapters and a recipe. Out: a `Merged` adapter with its report. Uses: `methods`, `spaces`, `adapters`, `task_vectors`.

`merge` makes the recipe and the result; `plan` and `compatibility` check everything before any work; `loop` goes through
the modules; `encoding` gives it the task vectors in the coordinates of the space, `thresholds` the thresholds of the trims;
`measure`, `report` and `card` describe the result; `tables` prints.
"""
