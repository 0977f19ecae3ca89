"""A head, or anything else, that the base's files lack is not drawn and judged in silence."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import PREFIX
from learning.models import bases, linear_shapes, make_model, make_tokenizer, sentences, write_lora
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

import ties_peft
from ties_peft.errors import CompatibilityError, TiesPeftError
from ties_peft.evaluation.evaluate import evaluate_all
from ties_peft.evaluation.loaded_model import Bench
from ties_peft.search import CONTROLS, TRAINED
from ties_peft.search.controls import new_adapter, random_adapter

pytestmark = pytest.mark.filterwarnings("ignore::ties_peft.errors.TiesPeftWarning")
HEAD = ("classifier.bias", "classifier.weight")


def head_task(count: int = 6) -> dict[str, Any]:
    return {"measure": "head", "rows": [{"text": t, "label": n % 2} for n, t in enumerate(sentences(count, 1))]}


def with_head(folder: Path, base: Path, seed: int) -> Path:
    """A SEQ_CLS adapter as PEFT writes it, on a base without a head: its own head goes with it."""
    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_pretrained(base)
    made = get_peft_model(model, LoraConfig(task_type=TaskType.SEQ_CLS, r=2, target_modules=["query", "value"]))
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    made.save_pretrained(folder)
    return folder


def without_head(folder: Path) -> Path:
    return write_lora(folder, linear_shapes(make_model("classifier"), "query", "value"), 3, task_type="SEQ_CLS")


def uses(adapter: Path | None, base: Path) -> dict[str, Callable[[], Any]]:
    """Whoever judges an adapter on a base."""
    task = head_task()
    pair = [adapter, adapter]
    found: dict[str, Callable[[], Any]] = {"evaluate": lambda: ties_peft.evaluate(adapter, task, base=base)}
    if adapter is not None:
        found |= {
            "distil": lambda: ties_peft.distil(pair, rows=20, tasks={"measure": "head"}, base=base, steps=2),
            "search": lambda: ties_peft.search(pair, task, base=base, budget=2),
            "signs": lambda: ties_peft.few_shot_signs(pair, [task], base=base, steps=2),
            "gather": lambda: ties_peft.gather_statistics(adapter, task, "gram", base=base, save=False),
        }
    return found


def test_the_bare_base_has_no_head(bases: dict[str, Path]) -> None:
    with pytest.raises(CompatibilityError) as caught:
        ties_peft.evaluate(None, head_task(), base=bases["encoder"])
    told = str(caught.value)
    assert all(part in told for part in (*HEAD, "loaded as classifier", "at random")), told


@pytest.mark.parametrize("who", ["evaluate", "distil", "search", "signs", "gather"])
def test_an_adapter_without_a_head_on_a_base_without_one(who: str, tmp_path: Path, bases: dict[str, Path]) -> None:
    with pytest.raises(CompatibilityError, match=r"hold .*classifier\.bias, classifier\.weight"):
        uses(without_head(tmp_path / "a"), bases["encoder"])[who]()


def test_it_is_known_before_anything_is_judged(
    tmp_path: Path, bases: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first adapter brings its head, the second does not."""
    pair = [with_head(tmp_path / "a", bases["encoder"], 0), without_head(tmp_path / "b")]
    monkeypatch.setattr(
        ties_peft.evaluation.scorers.Classification, "score", lambda *_: pytest.fail("an adapter was judged")
    )
    with pytest.raises(CompatibilityError, match=r"neither does adapter '.*b'"):
        evaluate_all(pair, [head_task()], base=bases["encoder"])


def test_an_adapter_that_brings_its_head_is_as_in_peft(tmp_path: Path, bases: dict[str, Path]) -> None:
    folder, task = with_head(tmp_path / "a", bases["encoder"], 0), head_task()
    scores = [ties_peft.evaluate(folder, task, base=bases["encoder"]) for _ in range(2)]
    model = AutoModelForSequenceClassification.from_pretrained(bases["encoder"])
    model = PeftModel.from_pretrained(model, folder).eval()
    tokenizer = make_tokenizer(True)
    with torch.no_grad():
        logits = torch.cat(
            [
                model(**tokenizer(row["text"], return_tensors="pt", return_token_type_ids=False)).logits
                for row in task["rows"]
            ]
        )
    labels = torch.tensor([row["label"] for row in task["rows"]])
    assert scores[0] == scores[1]
    assert scores[0].loss == pytest.approx(float(torch.nn.functional.cross_entropy(logits, labels)), rel=1e-4)
    ties_peft.distil([folder], rows=20, tasks={"measure": "head"}, base=bases["encoder"], steps=2)
    ties_peft.gather_statistics(folder, task, "gram", base=bases["encoder"], save=False)
    found = ties_peft.search([folder, folder], task, base=bases["encoder"], budget=2, controls=(*CONTROLS, TRAINED))
    assert [control.name for control in found.controls] == [*CONTROLS, TRAINED]
    signs = ties_peft.few_shot_signs([folder, folder], [task], base=bases["encoder"], steps=2)
    own = ties_peft.Adapter.load(folder)
    for made in (signs, random_adapter(own, 0), new_adapter(own, 0)):
        assert made.extra_keys == own.extra_keys
        assert all(torch.equal(made.tensors.read(name), own.tensors.read(name)) for name in own.extra_keys)


def test_what_was_worn_counts_no_longer(tmp_path: Path, bases: dict[str, Path]) -> None:
    bench = Bench.load(bases["encoder"], "classifier")
    own = ties_peft.Adapter.load(with_head(tmp_path / "a", bases["encoder"], 0))
    inputs = bench.pad_batch([[1, 5, 2]])
    with bench.applied_extra_tensors(own):
        bench.model(**inputs)
    with bench.applied(own), bench.applied_extra_tensors(own):
        bench.model(**inputs)
    with pytest.raises(CompatibilityError, match="loaded as classifier, do not hold"):
        bench.model(**inputs)


def less(folder: Path, form: str, *parts: str) -> Path:
    """A base's folder whose file lacks the tensors with such names."""
    make_model(form).save_pretrained(folder)
    make_tokenizer(form in ("encoder", "classifier")).save_pretrained(folder)
    held = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in held.items() if not any(part in name for part in parts)}
    assert len(kept) < len(held)
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_a_pooler_is_missed_only_where_it_is_used(tmp_path: Path, bases: dict[str, Path]) -> None:
    task = {"measure": "descriptions", "descriptions": ["w1", "w2"], "rows": [{"text": "w3", "label": 0}]}
    bare = ties_peft.evaluate(None, task, base=less(tmp_path / "e", "encoder", "pooler"))
    assert bare == ties_peft.evaluate(None, task, base=bases["encoder"])
    with pytest.raises(CompatibilityError, match=r"hold .*bert\.pooler\.dense\.bias, bert\.pooler\.dense\.weight"):
        ties_peft.evaluate(None, head_task(), base=less(tmp_path / "c", "classifier", "pooler"))


def test_weights_that_are_tied_are_there(tmp_path: Path, bases: dict[str, Path]) -> None:
    for form in ("gpt2", "t5"):
        assert not Bench.load(bases[form], "language")._missing
    bench = Bench.load(less(tmp_path / "g", "gpt2", "ln_f"), "language")
    assert sorted(bench._missing) == ["transformer.ln_f.bias", "transformer.ln_f.weight"]
    text = {"measure": "loss", "label": None, "rows": ["w1 w2"]}
    with pytest.raises(CompatibilityError, match=r"hold .*transformer\.ln_f\.bias"):
        ties_peft.evaluate(None, text, bench=bench)


def test_an_update_of_a_drawn_layer_does_not_bring_it(tmp_path: Path, bases: dict[str, Path]) -> None:
    """A LoRA on the head is an update of what was drawn; the whole head beside it is the head."""
    shapes = linear_shapes(make_model("classifier"), "query", "classifier")
    lora = write_lora(tmp_path / "a", shapes, 0)
    base = less(tmp_path / "base", "classifier", "classifier")
    with pytest.raises(CompatibilityError, match="neither does adapter"):
        ties_peft.evaluate(lora, head_task(), base=base)
    tensors = load_file(lora / "adapter_model.safetensors")
    keep = {name: tensor for name, tensor in tensors.items() if "classifier" not in name}
    whole = {f"{PREFIX}classifier.weight": torch.ones(3, 16), f"{PREFIX}classifier.bias": torch.zeros(3)}
    save_file({**keep, **whole}, lora / "adapter_model.safetensors")
    assert ties_peft.evaluate(lora, head_task(), base=base).rows == 6


def test_what_libraries_log_while_a_base_loads_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as the Hub's attempts to connect, six for each file; afterwards they log as before."""
    import transformers
    from huggingface_hub.utils import logging as hub

    seen: list[int] = []
    levels = hub.get_verbosity(), transformers.logging.get_verbosity()

    def fail(*_: Any, **__: Any) -> Any:
        seen.extend((hub.get_verbosity(), transformers.logging.get_verbosity()))
        raise OSError("no network")

    monkeypatch.setattr(transformers.AutoModel, "from_pretrained", fail)
    with pytest.raises(TiesPeftError, match="no network"):
        ties_peft.Bench.load("org/base", "encoder")
    assert seen == [logging.ERROR, logging.ERROR]
    assert (hub.get_verbosity(), transformers.logging.get_verbosity()) == levels
