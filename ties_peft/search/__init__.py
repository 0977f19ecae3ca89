"""Search for the weights or the recipe that does best on a few examples, and measure what it has to beat.

In: adapters, a task with labels. Out: a merged adapter with its trials. Uses: `learning`, `evaluation`, `merging`.
"""
