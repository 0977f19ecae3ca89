"""Inspect adapters before a merge. In: adapters. Out: facts and refusals, as text and JSON. Uses: `merging`."""
