"""Look at adapters before a merge: `inspection` summarises them and checks whether they can be merged.

In: adapters. Out: an `Inspection`, printable and as JSON. Uses: `adapters`, `merging`.
"""
