"""Learn from text with the base model: distillation, statistics for Fisher and RegMean, signs from a few examples.

In: adapters, a base model, rows. Out: an adapter, or files beside one. Uses: `evaluation`, `merging`.
The choices and defaults stand here, where the command line shows them without importing torch.
"""

STATISTICS = ("fisher", "gram")
FITS = ("factors", "gains")
BATCH_SIZE = 16  # rows
GENERATED = "generated"  # in place of rows: each adapter writes its own
GENERATED_ROWS = 100  # that each adapter writes
ANSWERS = ("teachers", "given", "none")  # to prompts: sampled from each adapter, of the rows' labels, none
ANSWER_TOKENS = 64  # in an answer that an adapter writes, at most
