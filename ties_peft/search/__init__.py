"""Search for the weights or the recipe that score best on a few examples, and evaluate the controls to compare with.

In: adapters, a task with labels. Out: a merged adapter with its trials. Uses: `learning`, `evaluation`, `merging`.
`search` is the entry; `problem` says what is maximised, and `tuning` over which parameters; `study` and `sampler` use
Optuna. The defaults are defined here, so that the command line can show them without importing torch.
"""

BUDGET = 40  # trials
PENALTY = 0.05  # on the mean of |w|
# The names of the controls; see `controls`.
BASE, MEAN, SINGLE = "base", "mean", "best single"
WEIGHTS, ADAPTERS, TRAINED = "random weights", "random adapters", "trained"
CONTROLS = (BASE, MEAN, SINGLE, WEIGHTS, ADAPTERS)
IMITATE = "imitate"  # in place of an objective: predict what the source adapters predict; see `imitation`
GRID = "grid"  # a sampler: each combination of choices once
DETAIL = " · "  # separates the name of a stage from the best value so far, which changes during the stage
