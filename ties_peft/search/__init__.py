"""Search for the weights or the recipe that does best on a few examples, and measure what it has to beat.

In: adapters, a task with labels. Out: a merged adapter with its trials. Uses: `learning`, `evaluation`, `merging`.
The defaults stand here, where the command line shows them without importing torch.
"""

BUDGET = 40  # trials
PENALTY = 0.05  # on the mean of |w|
# What the result is compared with; see `controls`.
BASE, MEAN, SINGLE = "base", "mean", "best single"
WEIGHTS, ADAPTERS, TRAINED = "random weights", "random adapters", "trained"
CONTROLS = (BASE, MEAN, SINGLE, WEIGHTS, ADAPTERS)
DETAIL = " · "  # in the name of a stage of work, before what changes while the stage lasts
