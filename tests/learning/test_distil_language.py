"""Distillation of causal models: what is judged, what adapters write, the closed form, text on which the base is kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from learning.models import bases, linear_shapes, make_model, make_tokenizer, sentences, write_lora
from peft import PeftModel
from torch import Tensor

import ties_peft
from ties_peft.errors import TiesPeftError
from ties_peft.evaluation.loaded_model import Bench
from ties_peft.learning import module_outputs, token_teachers, written_rows
from ties_peft.learning.module_outputs import ModuleInputs
from ties_peft.learning.teacher_specs import AnswerOptions, make_teachers, read_teacher_specs
from ties_peft.learning.token_teachers import TokenTeacher
from ties_peft.learning.written_rows import AnswerWriter, RowWriter, row_beginning, sample

pytestmark = pytest.mark.filterwarnings("ignore::ties_peft.errors.TiesPeftWarning")
CHOICES = {"measure": "choices", "choices": [" w1", " w2"], "template": "w9 {text} w8"}


@pytest.fixture
def loras(tmp_path: Path) -> list[Path]:
    shapes = linear_shapes(make_model("llama"), "q_proj", "k_proj", "down_proj")
    return [write_lora(tmp_path / f"l{seed}", shapes, seed, task_type="CAUSAL_LM") for seed in range(2)]


@pytest.fixture
def bench(bases: dict[str, Path]) -> Bench:
    return Bench.load(bases["llama"], "language")


def log_probabilities(adapter: Path, ids: list[int]) -> Tensor:
    """By PEFT, (tokens, vocabulary)."""
    with torch.no_grad():
        model = PeftModel.from_pretrained(make_model("llama"), adapter).eval()
        found: Tensor = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return found


def test_only_answers_are_judged_and_choices_among_each_other(bench: Bench, loras: list[Path]) -> None:
    """The divergence by its definition; only the judged positions go through the output matrix."""
    rows, starts, choices = [[5, 6, 7, 8, 9], [10, 11, 12]], [3, 2], [20, 30]
    teacher = TokenTeacher(bench, ties_peft.Adapter.load(loras[0]), rows, "t", "x", None, choices, starts)
    teacher.set_predictions(teacher.predict())
    seen: list[int] = []
    head = bench.model.get_output_embeddings()
    handle = head.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape[:-1].numel()))
    with bench.applied(ties_peft.Adapter.load(loras[1])), torch.no_grad():
        found = teacher.compare([0, 1])
    handle.remove()
    assert seen == [3]
    for ids, start, divergence in zip(rows, starts, found.divergence, strict=True):
        log_p, log_q = (log_probabilities(path, ids)[start - 1 : len(ids) - 1] for path in loras)
        expected = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
        log_p, log_q = (log[0, choices].log_softmax(-1) for log in (log_p, log_q))
        expected += (log_p.exp() * (log_p - log_q)).sum()
        assert float(divergence) == pytest.approx(float(expected), rel=1e-2)  # of float16


def test_rows_run_at_once_are_few_enough(bench: Bench, loras: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(token_teachers.PART_TOKENS, "cpu", 16)
    rows = [list(range(5, 5 + length)) for length in (3, 20, 4, 5, 4, 4)]
    teacher = TokenTeacher(bench, ties_peft.Adapter.load(loras[0]), rows, "t", "x")
    assert teacher.parts([0, 1, 2, 3, 4, 5]) == [[1], [3, 2, 4], [5, 0]]
    assert teacher.parts([2, 4, 5], 2) == [[2, 4], [5]]


def test_what_is_written_is_a_sample_of_the_model(bench: Bench) -> None:
    """Of 3000 first tokens each is about as frequent as probable; draws of a row do not depend on the other rows."""
    bench.model.generation_config.eos_token_id = None
    with torch.no_grad():
        expected = bench.model(torch.tensor([[5, 6, 7]])).logits[0, -1].double().softmax(-1)
    drawn = torch.tensor(sample(bench, [[5, 6, 7]] * 3000, 1, 11)).flatten()
    seen = torch.bincount(drawn, minlength=len(expected)) / len(drawn)
    error = (expected * (1 - expected) / len(drawn)).sqrt()
    assert ((seen - expected).abs() < 5 * error + 1e-3).all()
    rows = sample(bench, [[5, 6, 7], [8], [9, 10]], 6, 3)
    assert rows == sample(bench, [[5, 6, 7], [8], [9, 10]], 6, 3)
    assert rows[:1] == sample(bench, [[5, 6, 7]], 6, 3)
    assert rows != sample(bench, [[5, 6, 7], [8], [9, 10]], 6, 4)


def test_answers_end_with_an_end_token_or_after_so_many(bench: Bench) -> None:
    bench.tokenizer.eos_token = "w0"
    bench.model.generation_config.eos_token_id = [2, 30]
    ends = {bench.tokenizer.eos_token_id, 2, 30}
    written = AnswerWriter(4, 0).write(bench, [[5, 6]] * 200, "x", None)
    answers = [ids[2:] for ids in written.sequences]
    assert written.starts == [2] * 200
    assert all(not ends & set(ids[:-1]) and (ids[-1] in ends or len(ids) == 4) for ids in answers)
    assert {ids[-1] for ids in answers if len(ids) < 4} == ends
    assert {len(ids) for ids in answers} == {1, 2, 3, 4}


def test_with_a_template_rows_are_written_into_it(bench: Bench) -> None:
    """The text ends where a stop token does, which is left out; the end of the template and an answer follow."""
    beginning = row_beginning(bench, "w9 ")
    assert bench.tokenizer.decode(beginning) == "w9"
    written = RowWriter(5, 3, ((33, 34),), (7, 8), 0).write(bench, [beginning] * 100, "x", None)
    for ids, start in zip(written.sequences, written.starts, strict=True):
        assert ids[start - 2 : start] == [33, 34]
        assert not {7, 8} & set(ids[1 : start - 2])
        assert start - 3 <= 5
        assert 1 <= len(ids) - start <= 3
    free = RowWriter(5, 3, (), (), 0).write(bench, [[9]] * 10, "x", None)
    assert free.starts == [1] * 10


def test_each_slot_of_a_template_is_written(bench: Bench) -> None:
    """Two slots: what is written into the second one depends on the first, and the answer on both."""
    written = RowWriter(4, 2, ((33,), (34, 35)), (7,), 0).write(bench, [[9]] * 60, "x", None)
    lengths = set()
    for ids, start in zip(written.sequences, written.starts, strict=True):
        assert ids[0] == 9
        assert ids[start - 2 : start] == [34, 35]
        assert 7 not in ids[: start - 2]
        both = [(place - 1, start - 3 - place) for place in range(1, start - 2) if ids[place] == 33]
        lengths |= {one for one in both if max(one) <= 4}
        assert any(max(one) <= 4 for one in both)
    assert len(lengths) > 5


def test_rows_of_whole_prompts_are_written_in_their_format(bench: Bench, loras: list[Path]) -> None:
    """`prompt_format` says what stands around the parts that an adapter writes; without it the rows begin like any text."""
    form = {"measure": "loss", "text": "prompt", "label": "completion", "prompt_format": "w9 {text} w8 {text} w3"}
    specs = read_teacher_specs([loras[0]], "generated", [form], 8)
    (teacher,) = make_teachers(specs, bench, AnswerOptions(None, 3, 0))
    written = teacher.write()
    for ids, start in zip(written["sequences"], written["starts"], strict=True):
        words = bench.tokenizer.decode(ids[:start]).split()
        assert words[0] == "w9"
        assert "w8" in words[1:]
        assert words[-1] == "w3"
        assert 1 <= len(ids) - start <= 3


@pytest.mark.parametrize("rank", [1, 3])
def test_the_closed_form_is_the_best_of_its_rank(
    rank: int, bench: Bench, loras: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against a minimiser of its own: in the coordinates of G^(1/2) the best Δ of a rank is a truncated SVD."""
    monkeypatch.setattr(module_outputs, "RIDGE", 1e-2)
    adapters = [ties_peft.Adapter.load(path) for path in loras]
    rows = [[[5, 6, 7, 8], [9, 10]], [[11, 12, 13], [14, 15, 16, 17, 18]]]
    inputs = ModuleInputs(bench, adapters[0].modules)
    for adapter, own, weight in zip(adapters, rows, (1.5, 0.5), strict=True):
        teacher = TokenTeacher(bench, adapter, own, "t", "x")
        with inputs.gathered(adapter, weight, sum(map(len, own))):
            teacher.predict()
    found = inputs.best(rank)
    for name in adapters[0].modules:
        grams = [weight * gram(path, name, own) for path, own, weight in zip(loras, rows, (1.5, 0.5), strict=True)]
        total = sum(grams, torch.zeros(()))
        total = total + 1e-2 * total.diagonal().mean() * torch.eye(len(total))
        values, vectors = torch.linalg.eigh(total)
        root = vectors @ values.sqrt().diag() @ vectors.T
        wanted = sum(a.delta(name).double() @ g for a, g in zip(adapters, grams, strict=True)) @ torch.linalg.inv(root)
        U, S, Vh = torch.linalg.svd(wanted)
        best = (U[:, :rank] * S[:rank]) @ Vh[:rank] @ torch.linalg.inv(root)
        torch.testing.assert_close(found[name].dense().double(), best, rtol=1e-3, atol=1e-4)


def gram(adapter: Path, name: str, rows: list[list[int]]) -> Tensor:
    """The mean of x·xᵀ, by PEFT and one row at a time."""
    model = PeftModel.from_pretrained(make_model("llama"), adapter).eval()
    seen: list[Tensor] = []
    layer = model.get_submodule(f"base_model.model.{name}")
    layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][0].double()))
    with torch.no_grad():
        for ids in rows:
            model(torch.tensor([ids]))
    x = torch.cat(seen)
    return x.T @ x / len(x)


def test_one_adapter_is_its_own_closed_form(bases: dict[str, Path], loras: list[Path]) -> None:
    """With many rows: its start imitates it, and no step is better."""
    texts = sentences(60, 0)
    made = ties_peft.distil(
        loras[:1], rows=texts, tasks={"measure": "loss", "label": None}, base=bases["llama"], steps=1
    )
    assert made.report.start == "the closed form of the modules' outputs"
    assert made.report.divergence[0] < 1e-2


@pytest.mark.parametrize(
    "given", [{"rows": sentences(4, 0)}, {"rows": "generated", "count": 4}], ids=["texts", "generated"]
)
def test_too_few_rows_are_refused_before_the_base_is_loaded(
    given: dict[str, Any], loras: list[Path], tmp_path: Path
) -> None:
    with pytest.raises(TiesPeftError, match=r"'l0' has 4 rows .*; expected at least 5"):
        ties_peft.distil(loras, **given, base=tmp_path / "nowhere")


def test_given_answers_end_with_the_end_token_once(bench: Bench, loras: list[Path]) -> None:
    """Without it the result need not stop where its adapter stops."""
    tokenizer = bench.tokenizer
    tokenizer.add_special_tokens({"eos_token": "w19"})
    labels = ["w1", "w2 w3", "w4 w19", "w5", "w6"]
    task = {
        "measure": "exact_match",
        "rows": [{"text": "w7", "label": label} for label in labels],
        "template": "w9 {text} w8",
    }
    (teacher,) = make_teachers(
        read_teacher_specs(loras[:1], tasks=task, answers="given"), bench, AnswerOptions("given", 3, 0)
    )
    expected = [f"w9 w7 w8 {label.removesuffix(' w19')}".split() for label in labels]
    ids = [[*tokenizer.convert_tokens_to_ids(words), tokenizer.eos_token_id] for words in expected]
    assert [row[-len(right) :] for row, right in zip(teacher.sequences, ids, strict=True)] == ids
    assert [len(teacher.outputs([place])) for place in range(5)] == [2, 3, 2, 2, 2]  # the answers and their ends


def test_a_row_without_its_label_is_named_with_its_own_file(
    loras: list[Path], bases: dict[str, Path], tmp_path: Path
) -> None:
    """The rows are those of `rows`, and not those that the task names."""
    whole, bare = tmp_path / "whole.jsonl", tmp_path / "bare.jsonl"
    rows = [{"text": text, "label": "w1"} for text in sentences(6, 0)]
    whole.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    bare.write_text("\n".join(json.dumps({"text": row["text"]}) for row in rows), encoding="utf-8")
    task = {"measure": "exact_match", "rows": str(whole), "template": "w9 {text} w8"}
    with pytest.raises(TiesPeftError) as caught:
        ties_peft.distil(loras, rows=str(bare), tasks=task, answers="given", base=bases["llama"])
    said = str(caught.value)
    assert "bare.jsonl', row 1: there is no label 'label'; the row has the keys text. " in said and "label: KEY" in said
    assert "whole" not in said


@pytest.mark.parametrize("rows", ["prompts", "generated", "given"])
def test_rows_of_every_kind_are_imitated_and_resumed(
    rows: str, bases: dict[str, Path], loras: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What adapters wrote is kept in the state; the same bytes with it and without."""
    labelled = [{"text": text, "label": number % 2} for number, text in enumerate(sentences(20, 0))]
    task = {**CHOICES, "rows": labelled}
    given: dict[str, Any] = {
        "prompts": {"rows": sentences(20, 0), "tasks": CHOICES},
        "generated": {"rows": "generated", "count": 20, "tasks": CHOICES},
        "given": {"tasks": task, "answers": "given"},
    }[rows]
    given |= {"base": bases["llama"], "steps": 40, "answer_tokens": 3}
    made = ties_peft.distil(loras, **given, state=tmp_path / "state")
    assert made.report.divergence[1] < made.report.divergence[0]
    assert [line.rows + line.held for line in made.report.lessons] == [20, 20]
    assert not any("choices" in warning for warning in made.report.warnings)
    monkeypatch.setattr(written_rows, "sample", lambda *_: pytest.fail("rows were written again"))
    monkeypatch.setattr(TokenTeacher, "predict", lambda *_: pytest.fail("a teacher ran again"))
    assert ties_peft.distil(loras, **given, state=tmp_path / "state").digest == made.digest
    monkeypatch.undo()
    assert ties_peft.distil(loras, **given).digest == made.digest
    assert ties_peft.distil(loras, **given, seed=1).digest != made.digest


def test_the_base_is_kept_on_text_of_its_own(bases: dict[str, Path], loras: list[Path]) -> None:
    """The more its weight, the nearer is the result to the base there; it is no adapter of the recipe."""
    text, rows = sentences(20, 7), sentences(20, 0)
    given: dict[str, Any] = {"rows": rows, "base": bases["llama"], "steps": 40, "answers": "none", "keep_base": text}
    light, heavy = (ties_peft.distil(loras, **given, keep_weight=weight) for weight in (0.1, 10))
    last = [made.report.lessons[-1] for made in (light, heavy)]
    assert [(line.name, line.kind) for line in last] == [("base", "model")] * 2
    assert last[1].divergence[1] < last[0].divergence[1]
    assert len(heavy.recipe["adapters"]) == 2
    assert heavy.recipe["keep_base"] == "20, texts given"
    assert heavy.recipe["weights"] == (1.0, 1.0, 10.0)


def test_the_base_runs_in_the_precision_asked_for(bases: dict[str, Path], loras: list[Path]) -> None:
    """What is fitted and written stays float32; the divergences differ by rounding."""
    given: dict[str, Any] = {"rows": sentences(20, 0), "base": bases["llama"], "steps": 20, "answers": "none"}
    half, whole = (ties_peft.distil(loras, **given, precision=one) for one in ("bfloat16", "float32"))
    assert half.digest != whole.digest
    assert half.report.dtype == whole.report.dtype == "float32"
    assert half.report.divergence == pytest.approx(whole.report.divergence, rel=0.2)


def test_texts_without_a_task_are_matched_with_what_follows(bench: Bench, loras: list[Path]) -> None:
    """They may be plain text or prompts: all positions are judged, and an answer is written."""
    from ties_peft.learning.teacher_specs import AnswerOptions, make_teachers, read_teacher_specs

    (teacher,) = make_teachers(read_teacher_specs(loras[:1], sentences(5, 0)), bench, AnswerOptions(None, 3, 0))
    teacher.set_written(teacher.write())
    grown = [len(after) - len(before) for after, before in zip(teacher.sequences, teacher.given, strict=True)]
    assert all(1 <= more <= 3 for more in grown)
    assert len(teacher.outputs([0])) == len(teacher.sequences[0]) - 1


def test_choices_that_begin_alike_are_said_to_be_unused(bases: dict[str, Path], loras: list[Path]) -> None:
    task = {**CHOICES, "choices": [" w1 w2", " w1 w3"]}
    made = ties_peft.distil(loras, rows=sentences(6, 0), tasks=task, base=bases["llama"], steps=1, answer_tokens=1)
    assert any("the choices of the tasks of l0, l1 are not used" in warning for warning in made.report.warnings)


@pytest.mark.parametrize(
    ("form", "asked", "parts"),
    [
        ("llama", {"answers": "teacher"}, ["unknown kind of answers 'teacher'", "teachers"]),
        ("llama", {"answers": "given"}, ["rows of 'l0' are texts without labels"]),
        ("llama", {"answer_tokens": 0}, ["answer_tokens is 0"]),
        ("llama", {"rows": "generated", "count": 0}, ["count is 0"]),
        ("llama", {"rows": "generated", "count": 3}, ["has 3 rows", "expected at least 5"]),
        ("llama", {"count": 7}, ["count is 7, and no adapter writes rows", "--rows generated"]),
        ("llama", {"weights": "norm"}, ["weights is 'norm'", "a number for each adapter"]),
        ("llama", {"keep_base": 20, "keep_weight": 0}, ["a weight is 0"]),
        ("encoder", {"rows": "generated"}, ["only a causal language model can write"]),
        ("encoder", {"answers": "teachers"}, ["only a causal language model can write"]),
        ("encoder", {"keep_base": 20}, ["expected a causal language model"]),
    ],
)
def test_wrong_input(
    form: str, asked: dict[str, Any], parts: list[str], tmp_path: Path, bases: dict[str, Path]
) -> None:
    shapes = linear_shapes(make_model(form), "q_proj", "query")
    own = [write_lora(tmp_path / "l0", shapes, 0)]
    task = CHOICES if form == "llama" else {"measure": "descriptions", "descriptions": ["w1 w2", "w3 w4"]}
    with pytest.raises(TiesPeftError) as caught:
        ties_peft.distil(own, **{"rows": sentences(6, 0), "tasks": task, "base": bases[form], "steps": 1, **asked})
    assert all(part in str(caught.value) for part in parts), caught.value
