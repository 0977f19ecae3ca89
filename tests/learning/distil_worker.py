"""A small distillation in a process of its own, whose threads its environment names: what it gives, on standard output.

python distil_worker.py FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from learning.models import VOCABULARY, linear_shapes, make_tokenizer, sentences, write_lora
from transformers import BertConfig, BertModel

import ties_peft
from ties_peft.evaluation.loaded_model import Bench

SMALL = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 64, "intermediate_size": 128}
TASK = {"measure": "descriptions", "descriptions": ["w1 w2", "w3 w4", "w5 w6"]}


def main(folder: Path) -> None:
    """Print the threads that torch has, whether the start was improved on, and the digest of the result."""
    torch.manual_seed(0)
    model = BertModel(BertConfig(vocab_size=VOCABULARY, max_position_embeddings=32, initializer_range=0.1, **SMALL))
    bench = Bench(model, make_tokenizer(True))
    shapes = linear_shapes(model, "query", "value", "output.dense")
    adapters = [write_lora(folder / f"a{seed}", shapes, seed) for seed in range(2)]
    rows = [[text for text in sentences(60, seed, 9) if len(text.split()) == 9] for seed in range(2)]
    made = ties_peft.distil(adapters, rows=rows, tasks=TASK, bench=bench, steps=8, batch_size=1)
    print(torch.get_num_threads(), made.report.improved, made.digest)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
