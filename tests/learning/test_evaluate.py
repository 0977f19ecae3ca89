"""Evaluation against PEFT, and against definitions written out with the model itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from learning.models import WORDS, bases, linear_shapes, make_model, make_tokenizer, sentences, write_ia3, write_lora
from peft import PeftModel

import ties_peft
from ties_peft.evaluation.evaluate import evaluate_all, make_scorer
from ties_peft.evaluation.task import read_task

pytestmark = pytest.mark.filterwarnings("ignore::ties_peft.errors.TiesPeftWarning")
ENDINGS = {
    "encoder": ("query", "value", "output.dense"),
    "classifier": ("query", "value", "output.dense"),
    "gpt2": ("c_attn", "c_fc"),
    "llama": ("q_proj", "up_proj"),
    "t5": ("q", "v"),
}
DESCRIPTIONS = ["w1 w2 w3", "w4", "w5 w6"]


def adapter(form: str, folder: Path, seed: int = 0, **config: Any) -> Path:
    config = {"fan_in_fan_out": True, **config} if form == "gpt2" else config
    return write_lora(folder, linear_shapes(make_model(form), *ENDINGS[form]), seed, **config)


def rows(count: int = 9, classes: int = 3) -> list[dict[str, Any]]:
    return [{"text": text, "label": place % classes} for place, text in enumerate(sentences(count, 1))]


def task(form: str, **more: Any) -> dict[str, Any]:
    measure = {"encoder": "descriptions", "classifier": "head"}.get(form, "choices")
    lists = {"descriptions": {"descriptions": DESCRIPTIONS}, "choices": {"choices": [" w1", " w2 w3", " w4"]}}
    return {"measure": measure, **lists.get(measure, {}), "rows": rows(), **more}


def by_peft(form: str, folder: Path | None) -> Any:
    return make_model(form) if folder is None else PeftModel.from_pretrained(make_model(form), folder).eval()


def logits_of(form: str, model: Any, asked: dict[str, Any]) -> torch.Tensor:
    """Logits of every row and label, one sequence at a time, in float64 where we sum."""
    tokenizer = make_tokenizer(form in ("encoder", "classifier"))
    bare = make_model(form)

    def embed(network: Any, text: str) -> torch.Tensor:
        hidden = network(**tokenizer(text, return_tensors="pt", return_token_type_ids=False)).last_hidden_state
        return torch.nn.functional.normalize(hidden.mean(1), dim=-1)

    def follows(text: str, choice: str) -> torch.Tensor:
        given, wanted = tokenizer(text, return_tensors="pt").input_ids, tokenizer(choice, return_tensors="pt").input_ids
        if form == "t5":
            steps = model(input_ids=given, labels=wanted).logits[0].log_softmax(-1)
        else:
            steps = model(torch.cat([given, wanted], 1)).logits[0, given.shape[1] - 1 : -1].log_softmax(-1)
        return steps.gather(1, wanted[0].unsqueeze(1)).sum()

    with torch.no_grad():
        found = []
        for row in asked["rows"]:
            if form == "encoder":
                found.append(20 * torch.cat([embed(bare, d) @ embed(model, row["text"]).T for d in DESCRIPTIONS]).T[0])
            elif form == "classifier":
                found.append(
                    model(**tokenizer(row["text"], return_tensors="pt", return_token_type_ids=False)).logits[0]
                )
            else:
                found.append(torch.stack([follows(row["text"], choice) for choice in asked["choices"]]))
    return torch.stack(found).double()


@pytest.mark.parametrize("form", ENDINGS)
@pytest.mark.parametrize("bare", [False, True], ids=["adapter", "bare"])
def test_scores_are_those_of_peft(form: str, bare: bool, tmp_path: Path, bases: dict[str, Path]) -> None:
    folder = None if bare else adapter(form, tmp_path / "a")
    asked = task(form)
    score = ties_peft.evaluate(folder, asked, base=bases[form], batch_size=4)
    logits = logits_of(form, by_peft(form, folder), asked)
    labels = torch.tensor([row["label"] for row in asked["rows"]])
    assert score.right == tuple((logits.argmax(-1) == labels).tolist())
    assert score.accuracy == sum(score.right) / len(labels)
    assert score.loss == pytest.approx(float(torch.nn.functional.cross_entropy(logits, labels)), rel=1e-4)
    assert score.rows == len(labels)


def test_ia3_scores_are_those_of_peft(tmp_path: Path, bases: dict[str, Path]) -> None:
    vectors = {"encoder.layer.0.attention.self.key": (16, False), "encoder.layer.1.output.dense": (24, True)}
    folder = write_ia3(tmp_path / "i", vectors, 3)
    asked = task("encoder")
    logits = logits_of("encoder", by_peft("encoder", folder), asked)
    labels = torch.tensor([row["label"] for row in asked["rows"]])
    score = ties_peft.evaluate(folder, asked, base=bases["encoder"])
    assert score.loss == pytest.approx(float(torch.nn.functional.cross_entropy(logits, labels)), rel=1e-4)


@pytest.mark.parametrize("form", ["gpt2", "t5"])
def test_loss_is_per_token_of_the_label(form: str, bases: dict[str, Path]) -> None:
    given = [{"text": "w1 w2 w3", "label": "w4 w5"}, {"text": "w6", "label": "w7"}]
    score = ties_peft.evaluate(None, {"measure": "loss", "rows": given}, base=bases[form])
    asked = {"rows": given, "choices": ["w4 w5", "w7"]}  # as the blank between them makes them
    sums = logits_of(form, make_model(form), asked).diagonal()
    assert score.loss == pytest.approx(-float(sums.sum()) / 3, rel=1e-4)
    assert (score.accuracy, score.right) == (None, ())


def test_loss_of_texts_alone_is_the_models_own(bases: dict[str, Path]) -> None:
    text = "w1 w2 w3 w4 w5"
    ids = make_tokenizer(False)(text, return_tensors="pt").input_ids
    score = ties_peft.evaluate(None, {"measure": "loss", "label": None, "rows": [text]}, base=bases["llama"])
    with torch.no_grad():
        own = float(make_model("llama")(ids, labels=ids).loss)
    assert score.loss == pytest.approx(own, rel=1e-4)


@pytest.mark.parametrize("form", ["gpt2", "llama", "t5"])
def test_exact_match_is_greedy_text(form: str, bases: dict[str, Path]) -> None:
    tokenizer, model = make_tokenizer(False), make_model(form)
    texts = ["w1 w2", "w3 w4 w5 w6", "w7"]
    written = []
    for text in texts:
        ids = tokenizer(text, return_tensors="pt").input_ids
        made = model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
        written.append(
            tokenizer.decode(made[0, 0 if form == "t5" else ids.shape[1] :], skip_special_tokens=True).strip()
        )
    given = [{"text": text, "label": answer} for text, answer in zip(texts, written, strict=True)]
    given[1]["label"] += " w1"
    asked = {"measure": "exact_match", "rows": given, "new_tokens": 4}
    assert ties_peft.evaluate(None, asked, base=bases[form]).right == (True, False, True)


def test_choices_by_the_mean_are_another_order(bases: dict[str, Path]) -> None:
    bench = ties_peft.Bench.load(bases["gpt2"], "language")
    scorer = make_scorer(bench, read_task(task("gpt2", mean=True)))
    totals, counts = scorer.log_probabilities()  # type: ignore[attr-defined]
    means = (totals / counts).reshape(-1, 3)
    assert counts[:3].tolist() == [1, 2, 1]
    assert scorer.score().right == tuple((means.argmax(-1) == scorer.labels).tolist())


def test_the_base_is_itself_again_after_an_adapter_was_on_it(tmp_path: Path, bases: dict[str, Path]) -> None:
    bench = ties_peft.Bench.load(bases["encoder"], "encoder")
    before = {name: (p.data_ptr(), p.clone()) for name, p in bench.model.named_parameters()}
    own = ties_peft.Adapter.load(adapter("encoder", tmp_path / "a"))
    with bench.applied(own):
        changed = [n for n, p in bench.model.named_parameters() if not torch.equal(p, before[n][1])]
    assert sorted(changed) == sorted(f"{name}.weight" for name in own.modules)
    with pytest.raises(ZeroDivisionError), bench.applied(own):
        1 / 0  # noqa: B018
    assert all(p.data_ptr() == before[n][0] and torch.equal(p, before[n][1]) for n, p in bench.model.named_parameters())
    assert bench.active_adapter is None


def test_many_on_one_base_are_as_one_by_one(tmp_path: Path, bases: dict[str, Path]) -> None:
    folders = [adapter("encoder", tmp_path / name, seed) for seed, name in enumerate("ab")]
    other = task("encoder", rows=rows(7), name="other")
    table = evaluate_all([None, *folders], [task("encoder"), other], base=bases["encoder"])
    for line, folder in zip(table, [None, *folders], strict=True):
        alone = [ties_peft.evaluate(folder, one, base=bases["encoder"]) for one in (task("encoder"), other)]
        assert [s.right for s in line] == [s.right for s in alone]
        assert [s.loss for s in line] == pytest.approx([s.loss for s in alone], rel=1e-5)


def test_a_loaded_peft_model_is_judged_as_its_adapter(tmp_path: Path, bases: dict[str, Path]) -> None:
    folder = adapter("encoder", tmp_path / "a")
    model = by_peft("encoder", folder)
    loaded = ties_peft.evaluate(model, task("encoder"), tokenizer=make_tokenizer(True))
    assert loaded.loss == pytest.approx(
        ties_peft.evaluate(folder, task("encoder"), base=bases["encoder"]).loss, rel=1e-5
    )


def test_rows_that_are_cut_are_counted(bases: dict[str, Path]) -> None:
    long = [{"text": " ".join(WORDS[:9]), "label": 0}, {"text": "w1", "label": 1}]
    assert ties_peft.evaluate(None, task("encoder", rows=long, max_tokens=6), base=bases["encoder"]).cut == 1
    assert ties_peft.evaluate(None, task("gpt2", rows=long, max_tokens=6), base=bases["gpt2"]).cut == 1
