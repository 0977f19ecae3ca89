"""Search for the weights or the recipe that score best on a few examples, and evaluate the controls to compare with.

In: adapters, a task with labels. Out: a merged adapter with its trials. Uses: `learning`, `evaluation`, `merging`.
`search` is the entry; `problem` says what is maximised, `tuning` over which parameters, and `trial_plan` by how many trials;
`study` and `sampler` use Optuna; `found` prints the result. The defaults are defined here, so that the command line can
show them without importing torch.
"""

BUDGET = 40  # trials, where they do not try every combination of choices
PENALTY = 0.05  # on the mean of |w|
# The names of the controls; see `controls`.
BASE, MEAN, SINGLE = "base", "mean", "best single"
WEIGHTS, ADAPTERS, TRAINED = "random weights", "random adapters", "trained"
SETTINGS = "random settings"  # the name of `WEIGHTS` where other parameters than the weights are tuned
CONTROLS = (BASE, MEAN, SINGLE, WEIGHTS, ADAPTERS)
AUTO = "auto"  # a sampler: COBYLA where only ranges are tuned, else TPE
IMITATE = "imitate"  # in place of an objective: predict what the source adapters predict; see `imitation`
GRID = "grid"  # a sampler: each combination of choices once
DETAIL = " · "  # separates the name of a stage from the best value so far, which changes during the stage
