"""`exact_match` writes greedy text, whatever the base's own generation_config asks for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from learning.models import bases, make_model, make_tokenizer, save_base, sentences
from transformers import GenerationConfig

import ties_peft
from ties_peft.evaluation.evaluate import make_scorer
from ties_peft.evaluation.loaded_model import Bench
from ties_peft.evaluation.task import read_task

OWN: dict[str, dict[str, Any]] = {
    "beams": {"num_beams": 4, "length_penalty": -5.0},
    "penalty": {"repetition_penalty": 9.0},
    "ngrams": {"no_repeat_ngram_size": 1},
    "sampling": {"do_sample": True, "temperature": 9.0, "top_k": 40},
    "least": {"min_new_tokens": 6},
    "forced": {"forced_eos_token_id": 5},
}
NEW = 6


def greedy(model: Any, form: str, ids: list[int], end: int | None) -> list[int]:
    """The likeliest token, one after the other, by the model's logits alone."""
    written: list[int] = []
    with torch.no_grad():
        while len(written) < NEW and (not written or written[-1] != end):
            if form == "t5":
                decoded = torch.tensor([[model.config.decoder_start_token_id, *written]])
                logits = model(input_ids=torch.tensor([ids]), decoder_input_ids=decoded).logits
            else:
                logits = model(input_ids=torch.tensor([[*ids, *written]])).logits
            written.append(int(logits[0, -1].argmax()))
    return written


@pytest.mark.parametrize("form", ["gpt2", "llama", "t5"])
@pytest.mark.parametrize("own", OWN)
def test_greedy_text_is_that_of_a_loop(own: str, form: str, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", form)
    kept = {"decoder_start_token_id": 0} if form == "t5" else {}
    texts, tokenizer, model = sentences(4, 5), make_tokenizer(False), make_model(form)
    first = greedy(model, form, tokenizer(texts[0]).input_ids, None)
    end = first[2]  # so that a text ends before it has all that it may have
    GenerationConfig(**OWN[own], **kept, eos_token_id=[end, 1], pad_token_id=0).save_pretrained(base)
    task = {"measure": "exact_match", "rows": [{"text": text, "label": "w1"} for text in texts], "new_tokens": NEW}
    bench = Bench.load(base, "language")
    before = bench.model.generation_config.to_dict()
    scorer = make_scorer(bench, read_task(task))
    loops = [greedy(model, form, tokenizer(text).input_ids, end) for text in texts]
    assert len(loops[0]) <= 3
    wanted = [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in loops]
    assert scorer.generated() == wanted  # type: ignore[attr-defined]
    assert bench.model.generation_config.to_dict() == before


def test_other_settings_would_write_other_text(tmp_path: Path) -> None:
    """So that the test above can fail: what the base's settings make of the same text."""
    model, tokenizer = make_model("gpt2"), make_tokenizer(False)
    ids = tokenizer(sentences(4, 5)[0], return_tensors="pt").input_ids
    plain = greedy(model, "gpt2", ids[0].tolist(), None)
    for own in ("penalty", "ngrams"):
        made = model.generate(ids, max_new_tokens=NEW, pad_token_id=0, **OWN[own])[0, ids.shape[1] :].tolist()
        assert made != plain
