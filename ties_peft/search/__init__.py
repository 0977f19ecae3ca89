"""Search for the weights or the recipe that does best on a few examples, and evaluate the baselines it has to beat.

In: adapters, a task with labels. Out: a merged adapter with its trials. Uses: `learning`, `evaluation`, `merging`.
`search` is the entry; `problem` says what is maximised, `tuning` over what; `study` and `sampler` use Optuna. The defaults
stand here, where the command line shows them without importing torch.
"""

BUDGET = 40  # trials
PENALTY = 0.05  # on the mean of |w|
# The baselines; see `controls`.
BASE, MEAN, SINGLE = "base", "mean", "best single"
WEIGHTS, ADAPTERS, TRAINED = "random weights", "random adapters", "trained"
CONTROLS = (BASE, MEAN, SINGLE, WEIGHTS, ADAPTERS)
IMITATE = "imitate"  # in place of an objective: predict what the source adapters predict; see `imitation`
GRID = "grid"  # a sampler: each combination of choices once
DETAIL = " · "  # in the name of a stage of work, before what changes while the stage lasts
