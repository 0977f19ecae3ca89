"""Scores of language models against a loop that reads one sequence at a time, and what a score says of its rows."""

from __future__ import annotations

import json
import math
import random
import statistics
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from cli.run_command import run
from learning.models import VOCABULARY, WIDTH, bases, linear_shapes, make_model, make_tokenizer, sentences, write_lora
from peft import PeftModel

import ties_peft
from ties_peft.errors import RecipeError
from ties_peft.evaluation import causal_passes
from ties_peft.evaluation.evaluate import make_scorer
from ties_peft.evaluation.loaded_model import Bench
from ties_peft.evaluation.score import Score
from ties_peft.evaluation.task import read_task

CHOICES = {
    "one token": [" w1", " w2", " w3"],
    "several tokens": [" w1 w2", " w3 w4", " w5 w6 w7"],
    "mixed": [" w1", " w2 w3", " w4 w5 w6"],
}
ROWS = [{"text": text, "label": place % 3} for place, text in enumerate(sentences(11, 4))]
SIZES = {
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "hidden_size": WIDTH,
    "head_dim": 8,
}


def special(name: str) -> Any:
    """A causal model that does more than a matrix product after its last state, or keeps another cache."""
    torch.manual_seed(3)
    common = {"vocab_size": VOCABULARY, "initializer_range": 0.3}
    if name == "mamba":
        sizes = {"hidden_size": WIDTH, "state_size": 4, "num_hidden_layers": 2}
        return transformers.MambaForCausalLM(transformers.MambaConfig(**common, **sizes)).eval()
    kind = {"gemma2": transformers.Gemma2Config, "granite": transformers.GraniteConfig}[name]
    own = {"gemma2": {"final_logit_softcapping": 2.0, "sliding_window": 4}, "granite": {"logits_scaling": 3.0}}[name]
    config = kind(**common, **SIZES, intermediate_size=24, pad_token_id=0, **own)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def log_probabilities(model: Any, text: str, follows: str) -> torch.Tensor:
    """Log p of each token of a continuation, by one pass over one sequence without padding."""
    tokenizer = make_tokenizer(False)
    given, asked = tokenizer(text).input_ids, tokenizer(follows).input_ids
    with torch.no_grad():
        steps = model(torch.tensor([given + asked])).logits[0].double().log_softmax(-1)
    return torch.stack([steps[len(given) - 1 + step, token] for step, token in enumerate(asked)])


def scores_of(model: Any, task: dict[str, Any], size: int = 4) -> Score:
    return ties_peft.evaluate(model, task, tokenizer=make_tokenizer(False), batch_size=size)


@pytest.mark.parametrize("kind", CHOICES)
@pytest.mark.parametrize("form", ["llama", "gpt2", "gemma2", "granite", "mamba"])
def test_losses_of_rows_with_choices_are_those_of_a_loop(form: str, kind: str) -> None:
    model = make_model(form) if form in ("llama", "gpt2") else special(form)
    score = scores_of(model, {"choices": CHOICES[kind], "rows": ROWS})
    for row, loss, right in zip(ROWS, score.losses, score.right, strict=True):
        sums = torch.stack([log_probabilities(model, str(row["text"]), choice).sum() for choice in CHOICES[kind]])
        assert loss == pytest.approx(-float(sums.log_softmax(0)[row["label"]]), abs=1e-4)
        assert right == (int(sums.argmax()) == row["label"])
    assert score.loss == pytest.approx(statistics.fmean(score.losses), abs=1e-6)
    assert score.dtype == "float32"


@pytest.mark.parametrize("form", ["llama", "gpt2", "gemma2", "granite", "mamba"])
def test_losses_of_rows_of_text_are_those_of_a_loop(form: str) -> None:
    model = make_model(form) if form in ("llama", "gpt2") else special(form)
    rows = [
        {"text": text, "label": " ".join(text.split()[: 1 + place % 4])} for place, text in enumerate(sentences(7, 8))
    ]
    score = scores_of(model, {"measure": "loss", "rows": rows})
    wanted = [-log_probabilities(model, row["text"], row["label"]) for row in rows]
    assert score.losses == pytest.approx([float(own.sum()) for own in wanted], abs=1e-4)
    assert score.tokens == tuple(len(own) for own in wanted)
    assert score.loss == pytest.approx(float(torch.cat(wanted).mean()), abs=1e-4)


def test_an_adapter_has_the_scores_that_peft_gives_it(tmp_path: Path, bases: dict[str, Path]) -> None:
    folder = write_lora(tmp_path / "a", linear_shapes(make_model("llama"), "q_proj", "down_proj", "lm_head"), 3)
    loaded = PeftModel.from_pretrained(make_model("llama"), folder).eval()
    for task in (
        {"choices": CHOICES["mixed"], "rows": ROWS},
        {"measure": "loss", "label": None, "rows": sentences(5, 2)},
    ):
        own = ties_peft.evaluate(folder, task, base=bases["llama"])
        assert own.losses == pytest.approx(scores_of(loaded, task).losses, abs=1e-4)
        assert own.losses != pytest.approx(ties_peft.evaluate(None, task, base=bases["llama"]).losses, abs=1e-3)


def tokens_run(task: dict[str, Any], size: int) -> int:
    """How many tokens go through a llama for a task, padding included."""
    model, counted = make_model("llama"), []
    model.model.register_forward_pre_hook(
        lambda _, args, given: counted.append(given["input_ids"].numel()), with_kwargs=True
    )
    scores_of(model, task, size)
    return sum(counted)


def test_a_prompt_runs_once_for_all_its_choices() -> None:
    rows = [{"text": " ".join(["w7"] * 20), "label": place % 3} for place in range(6)]
    assert tokens_run({"choices": CHOICES["one token"], "rows": rows}, 6) == 6 * 20
    longest = 3 - 1  # tokens of the longest choice but the last, which nothing follows
    assert tokens_run({"choices": CHOICES["several tokens"], "rows": rows}, 6) == 6 * 19 + 6 * 3 * (1 + longest)


def test_a_model_whose_cache_cannot_be_repeated_has_the_same_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    task = {"choices": CHOICES["several tokens"], "rows": ROWS}
    cached = scores_of(make_model("llama"), task)
    few = tokens_run(task, 4)
    monkeypatch.setattr(causal_passes, "CACHE", "another")
    assert tokens_run(task, 4) > 1.5 * few
    assert scores_of(make_model("llama"), task).losses == pytest.approx(cached.losses, abs=1e-5)


def test_only_the_positions_that_count_have_logits() -> None:
    """A hook on the output layer that is registered later sees what it is given: one state for each position."""
    model, seen = make_model("llama"), []
    model.lm_head.register_forward_hook(lambda _, args, made: seen.append(tuple(made.shape)))
    rows = [{"text": "w1 w2 w3 w4 w5", "label": "w6"}, {"text": "w7", "label": "w8 w9"}]
    scores_of(model, {"measure": "loss", "rows": rows})
    assert seen == [(1, 3, VOCABULARY)]
    assert model(torch.tensor([[5, 6]])).logits.shape == (1, 2, VOCABULARY), "and afterwards all have them again"


@pytest.mark.parametrize("size", [1, 3, 100])
def test_the_batch_size_changes_nothing_but_rounding(size: int) -> None:
    task = {"choices": CHOICES["mixed"], "rows": ROWS}
    one, other = scores_of(make_model("gpt2"), task), scores_of(make_model("gpt2"), task, size)
    assert one.losses == pytest.approx(other.losses, abs=1e-5)


# differences of two scores


def accuracies(*right: int) -> Score:
    held = tuple(map(bool, right))
    return Score("t", "choices", None, len(held), sum(held) / len(held), 0.5, held, losses=(0.5,) * len(held))


def test_the_difference_of_two_accuracies_is_paired() -> None:
    one, other = accuracies(1, 1, 1, 0, 1, 0), accuracies(0, 1, 1, 0, 0, 1)
    found = one.difference(other)
    by_row = [1, 0, 0, 0, 1, -1]
    assert found.mean == pytest.approx(one.value - other.value)
    assert found.error == pytest.approx(statistics.stdev(by_row) / math.sqrt(6))
    assert other.difference(one) == pytest.approx((-found.mean, found.error))
    assert one.difference(one) == (0.0, 0.0)
    assert math.isnan(accuracies(1).difference(accuracies(0)).error)


def test_the_error_of_a_difference_of_losses_is_that_of_resampled_rows() -> None:
    draw = random.Random(5)
    tokens = tuple(draw.randint(1, 12) for _ in range(200))
    losses = [tuple(t * draw.uniform(0.5, mean) for t in tokens) for mean in (1.5, 2.0)]

    def score(own: tuple[float, ...]) -> Score:
        return Score("t", "loss", None, len(own), None, sum(own) / sum(tokens), losses=own, tokens=tokens)

    found = score(losses[0]).difference(score(losses[1]))
    assert found.mean == pytest.approx((sum(losses[1]) - sum(losses[0])) / sum(tokens))

    def resampled() -> float:
        chosen = draw.choices(range(200), k=200)
        count = sum(tokens[i] for i in chosen)
        return (sum(losses[1][i] for i in chosen) - sum(losses[0][i] for i in chosen)) / count

    assert found.error == pytest.approx(statistics.stdev(resampled() for _ in range(2000)), rel=0.1)


def test_scores_of_other_rows_have_no_difference() -> None:
    with pytest.raises(RecipeError, match=r"6 rows.*5 rows"):
        accuracies(1, 1, 1, 0, 1, 0).difference(accuracies(1, 1, 1, 0, 1))


# generated text


def chrf(text: str, answer: str) -> float:
    """ChrF of one text (Popović 2015): F₂ of the mean precision and recall of character n-grams, n = 1 to 6, blanks aside."""
    shares = []
    for n in range(1, 7):
        made, wanted = (
            Counter(one[i : i + n] for i in range(len(one) - n + 1))
            for one in (text.replace(" ", ""), answer.replace(" ", ""))
        )
        if made and wanted:
            common = sum((made & wanted).values())
            shares.append((common / sum(made.values()), common / sum(wanted.values())))
    precision, recall = (statistics.fmean(values) for values in zip(*shares, strict=True))
    return 100 * 5 * precision * recall / (4 * precision + recall) if precision + recall else 0.0


def test_chrf_and_bleu_of_generated_text(bases: dict[str, Path]) -> None:
    pytest.importorskip("sacrebleu")
    bench = Bench.load(bases["llama"], "language")
    texts = sentences(3, 6)
    asked: dict[str, Any] = {
        "measure": "exact_match",
        "rows": [{"text": t, "label": "w1"} for t in texts],
        "new_tokens": 6,
    }
    written = make_scorer(bench, read_task(asked)).score().texts
    answers = [written[0], " ".join(written[1].split()[:5]) + " w9 w8", "another one"]
    rows = [{"text": text, "label": answer} for text, answer in zip(texts, answers, strict=True)]
    score = ties_peft.evaluate(None, {**asked, "measure": "chrf", "rows": rows}, bench=bench)
    assert score.texts == written
    assert score.right == (True, False, False) and score.accuracy == pytest.approx(1 / 3)
    assert score.text_scores == pytest.approx([chrf(*pair) for pair in zip(written, answers, strict=True)], abs=1e-6)
    assert score.value == pytest.approx((score.chrf or 0) / 100)
    same = [{"text": text, "label": own} for text, own in zip(texts, written, strict=True)]
    bleu = ties_peft.evaluate(None, {**asked, "measure": "bleu", "rows": same}, bench=bench)
    assert (bleu.bleu, bleu.chrf, bleu.value) == pytest.approx((100, 100, 1))
    better = bleu.difference(ties_peft.evaluate(None, {**asked, "measure": "bleu", "rows": rows}, bench=bench))
    assert better.mean > 0


def test_chrf_without_sacrebleu_names_the_extra(bases: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    task = {"measure": "chrf", "rows": [{"text": "w1", "label": "w2"}]}
    with pytest.raises(RecipeError, match=r"pip install 'ties-peft\[metrics\]'"):
        ties_peft.evaluate(None, task, base=bases["llama"])


# the precision of the base


def test_the_base_is_loaded_in_the_precision_that_is_asked_for(bases: dict[str, Path]) -> None:
    task = {"choices": CHOICES["one token"], "rows": ROWS}
    exact, coarse = (
        ties_peft.evaluate(None, task, base=bases["llama"], dtype=dtype) for dtype in ("float32", torch.bfloat16)
    )
    assert (exact.dtype, coarse.dtype) == ("float32", "bfloat16")
    assert exact.losses != coarse.losses
    assert exact.losses == pytest.approx(coarse.losses, abs=0.1)
    with pytest.raises(RecipeError, match=r"'float31'.*float32"):
        ties_peft.evaluate(None, task, base=bases["llama"], dtype="float31")
    with pytest.raises(RecipeError, match="loaded already"):
        ties_peft.evaluate(make_model("llama"), task, tokenizer=make_tokenizer(False), dtype="float32")


def test_the_command_says_precision_speed_and_rows(tmp_path: Path, bases: dict[str, Path]) -> None:
    (tmp_path / "t.yaml").write_text(json.dumps({"choices": CHOICES["mixed"], "rows": "r.jsonl"}), encoding="utf-8")
    (tmp_path / "r.jsonl").write_text("\n".join(map(json.dumps, ROWS)), encoding="utf-8")
    words = ["evaluate", "--bare", "--base", str(bases["llama"]), "--task", str(tmp_path / "t.yaml")]
    (line,) = json.loads(run(*words, "--precision", "bfloat16", "--json").out)["evaluated"]
    (score,) = line["scores"]
    assert score["dtype"] == "bfloat16" and score["rows_per_second"] > 0
    assert len(score["losses"]) == len(score["right"]) == len(ROWS)
    assert statistics.fmean(score["losses"]) == pytest.approx(score["loss"])
    shown = run(*words, "--precision", "float32").out
    assert "base in float32" in shown and "rows a second" in shown
