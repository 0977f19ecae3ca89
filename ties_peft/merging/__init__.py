"""Merge adapters: options and recipes, the plan with all checks, the loop, the report, prepared and live merges.

In: adapters and a recipe. Out: a `Merged` adapter with its report. Uses: `methods`, `spaces`, `adapters`, `task_vectors`.

    options, recipes/        what can be asked for, and how it is written down
    merge                    makes the recipe, runs the plan, makes the result (`merged`)
    plan                     checks everything before any work, with `compatibility`, `members`, `ranks`, `values`
    loop                     goes through the modules: reads, encodes, merges, decodes, writes
    encoding, thresholds     give the loop the task vectors in the coordinates of the space, and the thresholds of the trims
    extra_tensors            decides on layers that adapters store as a whole; `extra_task_vectors` merges them
    pipeline                 parts and files of LoRAs of image models
    measure, report          what the merge did; `card` and `loading` for readers of the result; `tables` prints
    prepare, live, convert   many merges of the same adapters; a merge inside a PeftModel; a merge of one adapter
"""
