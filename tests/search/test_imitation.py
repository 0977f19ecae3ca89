"""A search without labels: its score is the divergence from the source adapters, and what is best by it is found."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from cli.run_command import run
from learning.models import linear_shapes, make_model, make_tokenizer, save_base, sentences, write_ia3, write_lora
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor

import ties_peft
from ties_peft import Adapter, CompatibilityError, RecipeError, TiesPeftError
from ties_peft.learning import distil_warnings
from ties_peft.search import imitation
from ties_peft.search.imitation import Imitation

pytestmark = pytest.mark.filterwarnings("ignore::ties_peft.TiesPeftWarning")
DESCRIPTIONS = ["w1 w2", "w3 w4", "w5 w6"]
TASK = {"measure": "descriptions", "descriptions": DESCRIPTIONS}
CHOICES = {"measure": "choices", "choices": ["w1", "w2"], "template": "w9 {text} w8"}
RULES = {"method": ["task_arithmetic", "ties", "average"], "scale": [0.3, 1.0, 3.0]}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    return {form: save_base(root / form, form) for form in ("encoder", "classifier", "llama")}


@pytest.fixture
def loras(tmp_path: Path) -> list[Path]:
    """Of the encoder."""
    shapes = linear_shapes(make_model("encoder"), "query", "value", "output.dense")
    return [write_lora(tmp_path / f"a{seed}", shapes, seed) for seed in range(2)]


@pytest.fixture
def causal_loras(tmp_path: Path) -> list[Path]:
    shapes = linear_shapes(make_model("llama"), "q_proj", "k_proj", "down_proj")
    return [write_lora(tmp_path / f"l{seed}", shapes, seed, task_type="CAUSAL_LM") for seed in range(2)]


@pytest.fixture
def texts() -> list[list[str]]:
    """Of each adapter."""
    return [sentences(8, seed) for seed in range(2)]


def label_probabilities(folder: Path, rows: list[str]) -> Tensor:
    """log p of the descriptions by PEFT, one text at a time, in float64."""
    tokenizer, bare = make_tokenizer(True), make_model("encoder").double()
    model = PeftModel.from_pretrained(make_model("encoder"), folder).double().eval()

    def embed(network: Any, text: str) -> Tensor:
        hidden = network(**tokenizer(text, return_tensors="pt", return_token_type_ids=False)).last_hidden_state
        return torch.nn.functional.normalize(hidden.mean(1), dim=-1)

    with torch.no_grad():
        labels = torch.cat([embed(bare, text) for text in DESCRIPTIONS])
        return torch.cat([20 * embed(model, text) @ labels.T for text in rows]).log_softmax(-1)


def token_probabilities(folder: Path, ids: list[int]) -> Tensor:
    """log p of the next token by PEFT, (tokens, vocabulary), in float64."""
    model = PeftModel.from_pretrained(make_model("llama"), folder).double().eval()
    with torch.no_grad():
        found: Tensor = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return found


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def test_the_score_is_minus_the_mean_divergence_of_labels(
    loras: list[Path], texts: list[list[str]], bases: dict[str, Path], tmp_path: Path
) -> None:
    """Of the written result, computed by PEFT in float64; of an adapter itself it is 0 on its own rows."""
    found = ties_peft.search(
        loras, "imitate", {"scale": [0.5, 1.5]}, 3, rows=texts, tasks=TASK, base=bases["encoder"], controls=("base",)
    )
    out = found.adapter.save(tmp_path / "out")
    both = list(zip(loras, texts, strict=True))
    each = [kl(label_probabilities(own, rows), label_probabilities(out, rows)).mean() for own, rows in both]
    assert found.score == pytest.approx(-float(sum(each)) / 2, rel=1e-3)
    assert found.to_dict()["score"] == found.score == max(trial.value for trial in found.trials)
    assert found.controls[0].score < 0
    objective = Imitation(list(map(Adapter.load, loras)), texts, TASK, base=bases["encoder"])
    for place, own in enumerate(loras):
        divergences = objective.divergences(Adapter.load(own))
        assert divergences[place] == pytest.approx(0, abs=1e-6)
        assert divergences[1 - place] > 1e-3


def test_the_score_is_minus_the_mean_divergence_of_tokens(
    causal_loras: list[Path], texts: list[list[str]], bases: dict[str, Path], tmp_path: Path
) -> None:
    """All positions are judged where there are no answers; all of the small vocabulary is kept, in float16."""
    asked: dict[str, Any] = {"rows": texts, "answers": "none", "base": bases["llama"], "controls": ()}
    found = ties_peft.search(causal_loras, "imitate", {"scale": [0.5, 1.5]}, 2, **asked)
    out = found.adapter.save(tmp_path / "out")
    total = 0.0
    for own, rows in zip(causal_loras, texts, strict=True):
        each = make_tokenizer(False)(rows)["input_ids"]
        total += sum(float(kl(token_probabilities(own, ids), token_probabilities(out, ids)).mean()) for ids in each) / 8
    assert found.score == pytest.approx(-total / 2, rel=5e-3)


@pytest.mark.parametrize("rows", ["prompts", "generated"])
def test_adapters_answer_prompts_or_write_rows_themselves(
    rows: str, causal_loras: list[Path], texts: list[list[str]], bases: dict[str, Path]
) -> None:
    """Of an adapter itself the divergence is 0, up to float16, on its own rows alone."""
    given: Any = "generated" if rows == "generated" else texts
    count = 6 if rows == "generated" else None
    opened = list(map(Adapter.load, causal_loras))
    objective = Imitation(opened, given, CHOICES, count, answer_tokens=3, base=bases["llama"])
    for place, own in enumerate(opened):
        divergences = objective.divergences(own)
        assert divergences[place] == pytest.approx(0, abs=1e-4)
        assert divergences[1 - place] > 1e-2


@pytest.mark.filterwarnings("default::ties_peft.TiesPeftWarning")
def test_a_search_on_rows_that_differ_little_is_warned_of_before_its_first_trial(
    causal_loras: list[Path], bases: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distil_warnings, "FEW_DISTINCT", 2.0)
    given: dict[str, Any] = {"rows": "generated", "count": 6, "answer_tokens": 3, "base": bases["llama"]}
    given |= {"budget": 1, "controls": (), "tune": {"scale": [1.0, 3.0]}}
    with pytest.warns(ties_peft.TiesPeftWarning, match="few of the generated rows are of use: l0") as found:
        made = ties_peft.search(causal_loras, "imitate", **given)
    assert [str(one.message) for one in found] == made.warnings
    trials: list[Any] = []
    with warnings.catch_warnings(), pytest.raises(ties_peft.TiesPeftWarning):
        warnings.simplefilter("error", ties_peft.TiesPeftWarning)
        ties_peft.search(causal_loras, "imitate", **given, watch=lambda trial, complete: trials.append(trial))
    assert trials == []


@pytest.mark.parametrize("form", ["encoder", "llama"])
def test_the_rule_with_the_lowest_divergence_is_found(
    form: str, loras: list[Path], causal_loras: list[Path], texts: list[list[str]], bases: dict[str, Path]
) -> None:
    """The grid makes every combination once; the best one is that of a loop over all of them."""
    given, tasks = (loras, TASK) if form == "encoder" else (causal_loras, CHOICES)
    asked: dict[str, Any] = {"rows": texts, "tasks": tasks, "answer_tokens": 3}
    asked |= {"base": bases[form]}
    found = ties_peft.search(given, "imitate", RULES, sampler="grid", controls=(), **asked)
    assert len(found.trials) == 9
    opened = list(map(Adapter.load, given))
    objective = Imitation(opened, texts, tasks, answer_tokens=3, base=bases[form])
    scores = {
        (method, scale): objective(ties_peft.merge(given, method, scale=scale))
        for method in RULES["method"]
        for scale in RULES["scale"]
    }
    best = max(scores, key=lambda rule: scores[rule])
    assert (found.recipe.method, found.recipe.scale) == best
    assert {(t.setting["method"], t.setting["scale"]): t.value for t in found.trials} == pytest.approx(scores, rel=1e-5)


def test_spaces_and_ranks_are_tuned_as_well(loras: list[Path], texts: list[list[str]], bases: dict[str, Path]) -> None:
    tune = {"method": ["ties", "task_arithmetic"], "space": ["delta", "core"], "rank": ["max", 2, 3]}
    found = ties_peft.search(
        loras, "imitate", tune, 9, sampler="grid", rows=texts, tasks=TASK, base=bases["encoder"], controls=()
    )
    tried = [(t.setting["method"], t.setting["space"], t.setting["rank"]) for t in found.trials]
    every = [(m, s, r) for m in tune["method"] for s in tune["space"] for r in tune["rank"]]
    assert tried == every[:9]
    assert found.score == max(trial.value for trial in found.trials)


def test_vectors(texts: list[list[str]], bases: dict[str, Path], tmp_path: Path) -> None:
    vectors = {"encoder.layer.0.attention.self.key": (16, False), "encoder.layer.1.output.dense": (24, True)}
    given = [write_ia3(tmp_path / f"i{seed}", vectors, seed) for seed in range(2)]
    found = ties_peft.search(
        given, "imitate", {"scale": [0.5, 1.5]}, 3, rows=texts, tasks=TASK, base=bases["encoder"], controls=("base",)
    )
    assert found.controls[0].score < found.score < 0


def test_each_classifier_is_imitated_with_its_own_head(
    texts: list[list[str]], bases: dict[str, Path], tmp_path: Path
) -> None:
    """The result has no head; its divergence from each adapter is computed by PEFT with that adapter's."""
    model = make_model("classifier")
    shapes = linear_shapes(model, "query", "value")
    given, heads = [], []
    for seed in range(2):
        folder = write_lora(tmp_path / f"h{seed}", shapes, seed, task_type="SEQ_CLS", modules_to_save=["classifier"])
        torch.manual_seed(seed)
        heads.append({"weight": torch.randn(3, 16), "bias": torch.randn(3)})
        file = folder / "adapter_model.safetensors"
        own = {f"base_model.model.classifier.{name}": tensor for name, tensor in heads[-1].items()}
        save_file(load_file(file) | own, file)
        given.append(folder)
    found = ties_peft.search(
        given, "imitate", {"scale": [0.5, 1.5]}, 2, rows=texts, base=bases["classifier"], controls=("mean",)
    )
    assert not found.adapter.extra_keys
    assert found.recipe.heads == "drop"
    assert any("classifier" in warning for warning in found.adapter.report.warnings)
    out = found.adapter.save(tmp_path / "out")
    total = 0.0
    for own, head, rows in zip(given, heads, texts, strict=True):
        ids = [make_tokenizer(True)(row, return_tensors="pt", return_token_type_ids=False) for row in rows]
        log = []
        for folder in (own, out):
            one = make_model("classifier")
            one.classifier.load_state_dict(head)
            peft = PeftModel.from_pretrained(one, folder).double().eval()
            with torch.no_grad():
                log.append(torch.cat([peft(**row).logits for row in ids]).log_softmax(-1))
        total += float(kl(*log).mean())
    assert found.score == pytest.approx(-total / 2, rel=1e-3)


def test_one_search_however_often_it_is_stopped(
    causal_loras: list[Path],
    texts: list[list[str]],
    bases: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The adapters run once, and not again with a state; another seed's answers are another search."""
    ran: list[str] = []
    run_once = imitation.run_teachers

    def watched(teachers: Any, checkpoint: Any, progress: Any) -> None:
        for teacher in teachers:
            own = teacher.predict
            monkeypatch.setattr(
                teacher, "predict", lambda *a, own=own, name=teacher.name: (ran.append(name), own(*a))[1]
            )
        run_once(teachers, checkpoint, progress)

    monkeypatch.setattr(imitation, "run_teachers", watched)
    asked: dict[str, Any] = {"rows": texts, "tasks": CHOICES, "answer_tokens": 3, "base": bases["llama"]}
    asked |= {"tune": {"scale": [0.3, 2.0]}, "controls": ("mean",)}
    whole = ties_peft.search(causal_loras, "imitate", budget=5, **asked)
    assert len(ran) == 2
    kept: dict[str, Any] = {"storage": tmp_path / "s.db", "state": tmp_path / "state"}
    first = ties_peft.search(causal_loras, "imitate", budget=2, **asked, **kept)
    assert len(ran) == 4
    rest = ties_peft.search(causal_loras, "imitate", budget=5, **asked, **kept)
    again = ties_peft.search(causal_loras, "imitate", budget=5, **asked, storage=tmp_path / "s.db")
    assert len(ran) == 4  # read from the state; and nothing is left to score
    assert rest.to_dict() == whole.to_dict() == again.to_dict()
    assert rest.trials[:2] == first.trials
    with pytest.raises(RecipeError, match="of another search; the two differ in examples, recipe, seed"):
        ties_peft.search(causal_loras, "imitate", budget=5, **asked, storage=tmp_path / "s.db", seed=1)
    with pytest.raises(RecipeError, match="of other work"):
        ties_peft.search(causal_loras, "imitate", budget=5, **asked, state=tmp_path / "state", seed=1)


def test_labels_are_not_read(loras: list[Path], bases: dict[str, Path], tmp_path: Path) -> None:
    """Rows with labels, with other ones and without any give one search; a judge may have labels."""
    found = []
    for name, label in (("a", 0), ("b", 2), ("c", None)):
        rows = [{"text": text} | ({} if label is None else {"label": label}) for text in sentences(6, 3)]
        file = tmp_path / f"{name}.jsonl"
        file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
        task = {**TASK, "rows": str(file)}
        found.append(
            ties_peft.search(
                loras, "imitate", {"scale": [0.5, 1.5]}, 2, tasks=task, base=bases["encoder"], controls=()
            ).to_dict()
        )
    assert found[0] == found[1] == found[2]
    judge = {**TASK, "rows": [{"text": text, "label": 1} for text in sentences(6, 4)]}
    judged = ties_peft.search(
        loras, "imitate", {"scale": [0.5, 1.5]}, 2, tasks=task, base=bases["encoder"], judge=judge, controls=("mean",)
    )
    assert judged.judged is not None
    assert judged.score == found[0]["score"]


FAULTS: list[tuple[dict[str, Any], str]] = [
    ({"tasks": TASK}, r"no rows on which a0, a1 could predict. Give them \(rows= or --rows: a list of texts"),
    ({"rows": ["w1 w2"] * 9}, "Give its task"),
    ({"rows": [["w1"] * 9] * 3, "tasks": TASK}, "3 rows for 2 adapters"),
    ({"rows": [["w1"] * 3], "tasks": TASK}, "has 3 rows .texts given.; expected at least 5"),
    ({"rows": "generated", "tasks": TASK}, "only a causal language model can write"),
    ({"rows": 9, "tasks": TASK, "answers": "theirs"}, "unknown kind of answers"),
    ({"rows": 9, "tasks": TASK, "count": 0}, "count is 0"),
    ({"rows": 9, "tasks": TASK, "answer_tokens": 0}, "answer_tokens is 0"),
    ({"rows": 9, "tasks": TASK, "controls": ("trained",)}, "'trained' needs a task with labels"),
    (
        {"rows": 9, "tasks": TASK, "sampler": "grid", "tune": {"scale": [0.5, 1.5]}},
        "scale can take any value of a range",
    ),
]


@pytest.mark.parametrize(("given", "text"), FAULTS)
def test_wrong_input_is_refused_before_an_adapter_runs(
    given: dict[str, Any], text: str, loras: list[Path], bases: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Imitation, "divergences", lambda *_: pytest.fail("an adapter was run"))
    with pytest.raises(TiesPeftError, match=text):
        ties_peft.search(loras, "imitate", budget=2, **({"base": bases["encoder"]} | given))


def test_a_choice_that_cannot_be_merged_is_refused_before_the_base_is_loaded(loras: list[Path], tmp_path: Path) -> None:
    with pytest.raises(CompatibilityError, match="tune: method=fisher cannot be merged: method 'fisher' needs fisher"):
        ties_peft.search(
            loras, "imitate", {"method": ["ties", "fisher"]}, rows=9, tasks=TASK, base=tmp_path / "nowhere"
        )


def test_rows_without_imitation_are_refused(loras: list[Path]) -> None:
    for given in ({"rows": 9}, {"count": 3, "answers": "none"}, {"answer_tokens": 3}, {"state": "x"}):
        with pytest.raises(RecipeError, match=f"{', '.join(given)}: only .* 'imitate'"):
            ties_peft.search(loras, lambda adapter: math.nan, **given)


def test_a_judge_needs_a_head_where_each_adapter_has_its_own(texts: list[list[str]], tmp_path: Path) -> None:
    """A base without a head: the result, which has none, could not be judged."""
    make_model("encoder").save_pretrained(tmp_path / "base")
    make_tokenizer(True).save_pretrained(tmp_path / "base")
    shapes = {f"bert.{name}": shape for name, shape in linear_shapes(make_model("encoder"), "query").items()}
    given = []
    for seed in range(2):
        folder = write_lora(tmp_path / f"h{seed}", shapes, seed, task_type="SEQ_CLS", modules_to_save=["classifier"])
        file = folder / "adapter_model.safetensors"
        head = {"classifier.weight": torch.randn(3, 16), "classifier.bias": torch.randn(3)}
        save_file(load_file(file) | {f"base_model.model.{name}": value for name, value in head.items()}, file)
        given.append(folder)
    judge = {"measure": "head", "rows": [{"text": text, "label": 1} for text in texts[0]]}
    asked: dict[str, Any] = {"rows": texts, "base": tmp_path / "base", "tune": {"scale": [0.5, 1.5]}, "controls": ()}
    assert ties_peft.search(given, "imitate", budget=2, **asked).score < 0
    with pytest.raises(CompatibilityError, match="classifier"):
        ties_peft.search(given, "imitate", budget=2, judge=judge, watch=lambda *_: pytest.fail("a trial"), **asked)


def test_the_command(loras: list[Path], bases: dict[str, Path], tmp_path: Path) -> None:
    task, rows = tmp_path / "task.yaml", tmp_path / "rows.txt"
    task.write_text(json.dumps(TASK), encoding="utf-8")
    rows.write_text("\n".join(sentences(8, 0)), encoding="utf-8")
    out = tmp_path / "out"
    common = ("search", *loras, "--base", bases["encoder"], "--no-controls", "--out", out)
    asked = (*common, "--objective", "imitate", "--task", task, "--tune", "method=[ties,average]", "--sampler", "grid")
    done = run(*asked, "--rows", rows, "--rows", rows, "--state", tmp_path / "state", "--json")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    called = ties_peft.search(
        loras,
        "imitate",
        {"method": ["ties", "average"]},
        sampler="grid",
        rows=rows,
        tasks=TASK,
        base=bases["encoder"],
        controls=(),
    )
    assert [trial["value"] for trial in found["trials"]] == [trial.value for trial in called.trials]
    assert found["score"] == called.score < 0
    assert (found["sampler"], found["combinations"]) == ("grid", 2)
    assert found["measures"] == {"score": imitation.MEASURE}
    assert f"score  {imitation.MEASURE}" in str(called)
    assert sorted(path.name for path in (tmp_path / "state").iterdir()) == ["teacher 0.pt", "teacher 1.pt"]
    assert Adapter.load(out).digest == called.adapter.digest
    for flags, text in (
        ((*asked, "--force"), "(rows= or --rows: a list of texts"),
        ((*common, "--force", "--objective", "labels", "--task", task), "--objective is 'labels'"),
        ((*common, "--force", "--task", task, "--rows", rows), "rows: only a search with objective 'imitate'"),
        ((*common, "--force"), "--task is given 0 times"),
        ((*common, "--force", "--task", task, "--task", task), "--task is given 2 times"),
        ((*asked, "--rows", rows, "--force", "--state", out), "lies in the output"),
    ):
        done = run(*flags)
        assert done.code == 2
        assert text in done.err
        assert done.err.count("\n") == 1
