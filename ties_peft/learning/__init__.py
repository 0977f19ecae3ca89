"""Learn from text with the base model: distillation, statistics for Fisher and RegMean, signs from a few examples.

In: adapters, a base model, rows. Out: an adapter, or files of statistics beside one. Uses: `evaluation`, `merging`.
The choices and defaults are defined here, so that the command line can show them without importing torch.
"""

STATISTICS = ("fisher", "gram")
FITS = ("factors", "gains")
BATCH_SIZE = 16  # rows in a step
GENERATED = "generated"  # in place of rows: each adapter writes its own
GENERATED_ROWS = 100  # that each adapter writes
ANSWERS = ("teachers", "given", "none")  # to prompts: sampled from each adapter, the rows' labels, no answers
ANSWER_TOKENS = 64  # at most, in an answer that an adapter writes
