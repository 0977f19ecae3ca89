"""Distillation: it imitates, it is never worse than its start, it can be stopped, it is one ordinary adapter."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import PREFIX
from learning.models import (
    VOCABULARY,
    bases,
    linear_shapes,
    make_model,
    make_tokenizer,
    sentences,
    write_ia3,
    write_lora,
)
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

import ties_peft
from ties_peft.errors import TiesPeftError
from ties_peft.evaluation.loaded_model import Bench
from ties_peft.learning import fitting
from ties_peft.learning.estimate import Estimate, print_estimate
from ties_peft.learning.teachers import LabelTeacher
from ties_peft.learning.token_teachers import TokenTeacher
from ties_peft.learning.written_rows import random_rows

pytestmark = pytest.mark.filterwarnings("ignore::ties_peft.errors.TiesPeftWarning")
TASK = {"measure": "descriptions", "descriptions": ["w1 w2", "w3 w4", "w5 w6"]}
VECTORS = {"encoder.layer.0.attention.self.key": (16, False), "encoder.layer.1.output.dense": (24, True)}
QUICK: dict[str, Any] = {"steps": 40}


@pytest.fixture
def loras(tmp_path: Path) -> list[Path]:
    shapes = linear_shapes(make_model("encoder"), "query", "value", "output.dense")
    return [write_lora(tmp_path / f"a{seed}", shapes, seed) for seed in range(2)]


@pytest.fixture
def vectors(tmp_path: Path) -> list[Path]:
    return [write_ia3(tmp_path / f"i{seed}", VECTORS, seed + 5) for seed in range(2)]


def predicted(base: str, folder: Path, texts: list[str]) -> torch.Tensor:
    """log p of the labels, by PEFT and one text at a time."""
    tokenizer, bare = make_tokenizer(True), make_model(base)
    model = PeftModel.from_pretrained(make_model(base), folder).eval()

    def embed(network: Any, text: str) -> torch.Tensor:
        hidden = network(**tokenizer(text, return_tensors="pt", return_token_type_ids=False)).last_hidden_state
        return torch.nn.functional.normalize(hidden.mean(1), dim=-1)

    with torch.no_grad():
        heads = torch.cat([embed(bare, text) for text in TASK["descriptions"]])
        return torch.cat([20 * embed(model, text) @ heads.T for text in texts]).double().log_softmax(-1)


@pytest.mark.parametrize("kinds", ["lora", "ia3", "mixed"])
def test_one_adapter_imitates_several(
    kinds: str,
    loras: list[Path],
    vectors: list[Path],
    tmp_path: Path,
    bases: dict[str, Path],
) -> None:
    """The divergences reported are those of the written files, computed by PEFT on the rows held back."""
    teachers = {"lora": loras, "ia3": vectors, "mixed": [loras[0], vectors[0]]}[kinds]
    texts = {folder: sentences(60, seed) for seed, folder in enumerate(teachers)}
    made = ties_peft.distil(teachers, rows=texts, tasks=TASK, base=bases["encoder"], steps=120)
    report = made.report
    assert report.improved
    assert report.divergence[1] < report.divergence[0]
    assert report.kind == ("(IA)³" if kinds == "ia3" else "LoRA")
    out = made.save(tmp_path / "out")
    assert {p.name for p in out.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors", "provenance.json"}
    for number, (folder, line) in enumerate(zip(teachers, report.lessons, strict=True)):
        bench = Bench(make_model("encoder"), make_tokenizer(True))
        teacher = TokenTeacher(bench, ties_peft.Adapter.load(folder), bench.all_token_ids(texts[folder]), "x", "x")
        held = fitting.split_rows([teacher] * len(teachers), 0)[number][1]
        rows = [texts[folder][place] for place in held]
        log_p, log_q = predicted("encoder", folder, rows), predicted("encoder", out, rows)
        divergence = float((log_p.exp() * (log_p - log_q)).sum(-1).mean())
        assert line.divergence[1] == pytest.approx(divergence, rel=1e-3, abs=1e-6)
        assert line.agreement[1] == pytest.approx(float((log_p.argmax(-1) == log_q.argmax(-1)).double().mean()))


def test_without_text_rows_are_random_tokens(loras: list[Path], bases: dict[str, Path]) -> None:
    made = ties_peft.distil(loras, tasks=TASK, rows=50, base=bases["encoder"], **QUICK)
    assert [line.origin for line in made.report.lessons] == ["random tokens and words of the labels"] * 2
    bench = Bench.load(bases["encoder"], "encoder")
    rows = random_rows(bench, 400, 0, "x")
    assert all((ids[0], ids[-1]) == (1, 2) for ids in rows)  # [CLS] … [SEP]
    assert {token for ids in rows for token in ids[1:-1]} == set(range(4, VOCABULARY))
    assert rows != random_rows(bench, 400, 1, "x") != random_rows(bench, 400, 1, "y")


def test_half_of_the_random_tokens_are_of_the_descriptions(bases: dict[str, Path]) -> None:
    """Of 400 rows of 6 to 32 tokens about one half; as often as they stand in the descriptions; the lengths stay."""
    bench = Bench.load(bases["encoder"], "encoder")
    plain, mixed = (random_rows(bench, 400, 0, "x", described) for described in (None, ["w1 w1 w1", "w2"]))
    assert [len(ids) for ids in plain] == [len(ids) for ids in mixed]
    assert all((ids[0], ids[-1]) == (1, 2) for ids in mixed)
    ((_, often, _),), ((_, seldom, _),) = bench.all_token_ids(["w1"]), bench.all_token_ids(["w2"])
    tokens = [token for ids in mixed for token in ids[1:-1]]
    shares = [tokens.count(token) / len(tokens) for token in (often, seldom)]
    others = 1 / (VOCABULARY - 4)
    assert shares == pytest.approx([0.375 + others / 2, 0.125 + others / 2], abs=0.02)
    kept = [new == old for one, other in zip(mixed, plain, strict=True) for new, old in zip(one, other, strict=True)]
    assert mixed != random_rows(bench, 400, 1, "x", ["w1 w1 w1", "w2"])
    assert sum(kept) / len(kept) > 0.5


@pytest.mark.parametrize(
    ("texts", "random", "steps"), [(10, 0, 120), (600, 0, 300), (0, 1600, 200), (600, 1600, 500), (9000, 0, 1200)]
)
def test_steps_are_eight_passes_over_texts_and_two_over_random_rows(texts: int, random: int, steps: int) -> None:
    """At 16 rows a step, and from 120 to 1200 of them."""
    given = [(("w1",), texts), (None, random)]
    specs: list[Any] = [SimpleNamespace(rows=SimpleNamespace(texts=kind, generated=False)) for kind, _ in given]
    teachers: list[Any] = [SimpleNamespace(sequences=[[1]] * count) for _, count in given]
    assert ties_peft.distil.__globals__["_default_steps"](specs, teachers, 16) == steps
    assert ties_peft.distil.__globals__["_default_steps"](specs, teachers, 16, 0.5) == steps / 2


def test_the_same_bytes_twice_and_when_stopped(
    loras: list[Path],
    tmp_path: Path,
    bases: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Stopped in the middle, it goes on from the last look: its teachers are not run again."""

    def once(state: Path | None) -> str:
        return ties_peft.distil(loras, rows=40, tasks=TASK, base=bases["encoder"], steps=60, seed=3, state=state).digest

    monkeypatch.setattr(fitting, "PATIENCE", 100)
    whole = once(None)
    assert once(None) == whole
    learn, count = fitting.Fit.take_step, 0

    def stopping(*given: Any) -> None:
        nonlocal count
        count += 1
        if count == 33:
            raise KeyboardInterrupt
        learn(*given)

    monkeypatch.setattr(fitting.Fit, "take_step", stopping)
    with pytest.raises(KeyboardInterrupt):
        once(tmp_path / "state")
    kept = {p.name for p in (tmp_path / "state").iterdir()}
    assert kept == {"fit.pt", *(f"teacher {number}.pt" for number in range(len(loras)))}
    monkeypatch.setattr(
        "ties_peft.learning.teachers.LabelTeacher.predict", lambda *_: pytest.fail("a teacher ran again")
    )
    assert once(tmp_path / "state") == whole
    assert 60 < count <= 33 + 30 + 5
    with pytest.raises(TiesPeftError, match="is of other work"):
        ties_peft.distil(loras, rows=41, tasks=TASK, base=bases["encoder"], steps=60, state=tmp_path / "state")


def test_stopped_between_teachers_the_first_is_not_run_again(
    loras: list[Path], tmp_path: Path, bases: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    taught: list[str] = []
    predict = LabelTeacher.predict

    def teaching(teacher: LabelTeacher, *given: Any) -> dict[str, torch.Tensor]:
        taught.append(teacher.name)
        if taught == ["a0", "a1"]:
            raise KeyboardInterrupt
        return predict(teacher, *given)

    def once() -> None:
        ties_peft.distil(loras, rows=40, tasks=TASK, base=bases["encoder"], steps=1, state=tmp_path / "state")

    monkeypatch.setattr(LabelTeacher, "predict", teaching)
    with pytest.raises(KeyboardInterrupt):
        once()
    once()
    assert taught == ["a0", "a1", "a1"]


def test_the_same_bytes_for_any_number_of_threads(tmp_path: Path) -> None:
    """In processes of their own. MKL adds up 64 columns of eleven tokens differently in one thread and in two."""
    tests, found = Path(__file__).parent.parent, []
    for threads in ("1", "2"):
        given = [sys.executable, "-W", "ignore", str(tests / "learning" / "distil_worker.py"), str(tmp_path / threads)]
        path = os.pathsep.join([str(tests), os.environ.get("PYTHONPATH", "")])
        own = {**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "PYTHONPATH": path}
        done = subprocess.run(given, capture_output=True, text=True, check=False, env=own)
        assert done.returncode == 0, done.stderr
        found.append(done.stdout.split())
    assert [line[:2] for line in found] == [["1", "True"], ["2", "True"]]
    assert found[0][2] == found[1][2]


@pytest.mark.parametrize("stopped", [False, True])
def test_threads_are_those_asked_for_and_afterwards_those_before(
    stopped: bool, loras: list[Path], bases: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    learn, seen, before = fitting.Fit.take_step, set(), torch.get_num_threads()

    def learning(*given: Any) -> None:
        seen.add(torch.get_num_threads())
        if stopped:
            raise KeyboardInterrupt
        learn(*given)

    monkeypatch.setattr(fitting.Fit, "take_step", learning)
    made = None
    with contextlib.suppress(KeyboardInterrupt):
        made = ties_peft.distil(loras, rows=20, tasks=TASK, base=bases["encoder"], steps=2, threads=before + 1)
    assert (seen, torch.get_num_threads()) == ({before + 1}, before)
    assert stopped or (made is not None and made.recipe["threads"] == before + 1)


def test_never_worse_than_the_start(loras: list[Path], bases: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """A step far too large: the rate is lowered three times, and what is given back is the start, said so."""
    monkeypatch.setitem(ties_peft.distil.__globals__["RATES"], "factors", 1e6)
    with pytest.warns(ties_peft.TiesPeftWarning, match="the start itself"):
        made = ties_peft.distil(loras, rows=40, tasks=TASK, base=bases["encoder"], rank=2, **QUICK)
    assert not made.report.improved
    assert made.report.retries == 3
    start = ties_peft.merge(loras, "tsv", scale=0.6, rank=2, restore_norm=True)
    for name in start.modules:
        torch.testing.assert_close(made.delta(name), start.delta(name))
    assert all(before == after for before, after in (line.divergence for line in made.report.lessons))


def test_gains_only_scale_the_directions_of_the_start(loras: list[Path], bases: dict[str, Path]) -> None:
    made = ties_peft.distil(loras, rows=40, tasks=TASK, base=bases["encoder"], fit="gains", **QUICK)
    start = ties_peft.merge(loras, "flat_tsv", rank="max")
    assert made.report.rank == 4
    for name in made.modules:
        B, A = start.read(name).B.double(), start.read(name).A.double()
        core = torch.linalg.pinv(B) @ made.delta(name).double() @ torch.linalg.pinv(A)
        assert (core - core.diag().diag()).abs().max() < 1e-4 * core.abs().max()


def test_the_rank_asked_for_may_exceed_the_merges(loras: list[Path], bases: dict[str, Path]) -> None:
    """Directions that start at nothing are woken, so that they can learn; the start's function stays."""
    made = ties_peft.distil(loras, rows=40, tasks=TASK, base=bases["encoder"], rank=6, **QUICK)
    assert made.ranks == (6,)
    ranks = [int(torch.linalg.matrix_rank(made.delta(name).double(), rtol=1e-5)) for name in made.modules]
    assert min(ranks) > 4


def test_each_teacher_is_imitated_under_its_own_head(tmp_path: Path, bases: dict[str, Path]) -> None:
    """Two classifiers with heads of their own: one adapter without a head serves under both, by PEFT."""
    shapes = linear_shapes(make_model("classifier"), "query", "value", "output.dense")
    folders = [write_lora(tmp_path / f"c{seed}", shapes, seed, task_type="SEQ_CLS") for seed in range(2)]
    heads = [torch.randn(3, 16, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
    for folder, head in zip(folders, heads, strict=True):
        tensors = load_file(folder / "adapter_model.safetensors")
        own = {f"{PREFIX}classifier.weight": head, f"{PREFIX}classifier.bias": torch.zeros(3)}
        save_file({**tensors, **own}, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    texts = [sentences(60, seed) for seed in range(2)]
    made = ties_peft.distil(folders, rows=texts, base=bases["classifier"], steps=120)
    assert made.report.divergence[1] < made.report.divergence[0]
    assert not made.extra_keys
    assert any("its own head" in warning for warning in made.report.warnings)
    out = made.save(tmp_path / "out")
    tokenizer = make_tokenizer(True)
    for number, (folder, head, line) in enumerate(zip(folders, heads, made.report.lessons, strict=True)):
        bench = Bench(make_model("classifier"), tokenizer)
        teacher = TokenTeacher(bench, ties_peft.Adapter.load(folder), bench.all_token_ids(texts[number]), "x", "x")
        held = fitting.split_rows([teacher] * 2, 0)[number][1]
        found = []
        for own in (folder, out):
            base = make_model("classifier")
            base.classifier.weight.data, base.classifier.bias.data = head, torch.zeros(3)
            model = PeftModel.from_pretrained(base, own).eval()
            rows = [tokenizer(texts[number][place], return_tensors="pt", return_token_type_ids=False) for place in held]
            with torch.no_grad():
                found.append(torch.cat([model(**row).logits for row in rows]).double().log_softmax(-1))
        log_p, log_q = found
        divergence = float((log_p.exp() * (log_p - log_q)).sum(-1).mean())
        assert line.divergence[1] == pytest.approx(divergence, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("form", ["gpt2", "llama"])
def test_causal_models_by_their_next_tokens(form: str, tmp_path: Path, bases: dict[str, Path]) -> None:
    """Two LoRAs trained on two languages: the distilled one is nearer to both than its start, by the labels' loss."""
    base, languages = bases[form], {"up": 1, "down": -1}
    texts = {
        name: [" ".join(f"w{(first + step * place) % 40}" for place in range(8)) for first in range(40)]
        for name, step in languages.items()
    }
    teachers = {name: train(form, texts[name], tmp_path / name) for name in languages}
    made = ties_peft.distil(
        list(teachers.values()), rows={teachers[n]: texts[n] for n in languages}, base=base, rank=4, steps=200
    )
    start = ties_peft.merge(list(teachers.values()), "tsv", scale=0.6, rank=4, restore_norm=True)

    def loss(adapter: Any) -> float:
        tasks = [{"measure": "loss", "label": None, "rows": own} for own in texts.values()]
        return sum(float(ties_peft.evaluate(adapter, task, base=base).loss or 0) for task in tasks)

    assert made.report.divergence[1] < made.report.divergence[0]
    assert loss(made) < loss(start) - 0.05
    assert made.config["task_type"] == "CAUSAL_LM"


def train(form: str, texts: list[str], folder: Path) -> Path:
    """A LoRA trained by PEFT on next tokens, in a second."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    targets = ["c_attn", "c_fc"] if form == "gpt2" else ["q_proj", "v_proj", "up_proj"]
    model = get_peft_model(make_model(form), LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM"))
    ids = make_tokenizer(False)(texts, return_tensors="pt").input_ids
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=3e-2)
    for _ in range(60):
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.save_pretrained(folder)
    return folder


def test_of_a_large_vocabulary_the_likeliest_are_kept(
    loras: list[Path],
    bases: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """KL of kept tokens and the rest in one sum: at most the whole one, and by the definition."""
    monkeypatch.setattr("ties_peft.learning.token_teachers.TOP_K", 5)
    bench = Bench.load(bases["llama"], "language")
    shapes = linear_shapes(bench.model, "q_proj", "up_proj")
    teacher = ties_peft.Adapter.load(write_lora(tmp_path / "t", shapes, 0))
    teacher = TokenTeacher(bench, teacher, [[5, 6, 7, 8], [9, 10]], "t", "x")
    teacher.set_predictions(teacher.predict())
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        q = make_model("llama")(ids).logits[0].double().softmax(-1)
        p = PeftModel.from_pretrained(make_model("llama"), tmp_path / "t")(ids).logits[0].double().softmax(-1)
    top = p.topk(5).indices
    kept_p, kept_q = p.gather(1, top), q.gather(1, top)
    rest_p, rest_q = 1 - kept_p.sum(1), 1 - kept_q.sum(1)
    expected = ((kept_p * (kept_p / kept_q).log()).sum(1) + rest_p * (rest_p / rest_q).log()).mean()
    found = teacher.compare([0, 1]).divergence[0]
    log_p, log_q = (
        torch.cat([kept, rest.unsqueeze(1)], 1).log() for kept, rest in ((kept_p, rest_p), (kept_q, rest_q))
    )
    rounding = log_p.exp() * log_p.abs() / 2048 * ((log_p - log_q).abs() + expected)  # of float16, to first order
    assert float(found) == pytest.approx(float(expected), abs=float(rounding.sum(1).mean()))
    with torch.no_grad():
        other = PeftModel.from_pretrained(make_model("llama"), tmp_path / "t")(torch.tensor([[9, 10]])).logits[0]
    masses = torch.cat([kept_p.sum(1), other.double().softmax(-1).topk(5).values.sum(1)])
    assert teacher.kept_probability == pytest.approx(float(masses.mean()), rel=1e-3)
    assert float(found) < float((p * (p / q).log()).sum(1).mean())


@pytest.mark.parametrize(
    ("asked", "parts"),
    [
        ({"rows": {"nobody": ["w1"] * 9}}, ["rows", "unknown adapter 'nobody'"]),
        ({"rows": [50, 50, 50]}, ["3 rows for 2 adapters"]),
        ({"rows": 4}, ["has 4 rows", "expected at least 5"]),
        ({"rows": [["w1"] * 9, 7.5]}, ["expected a list of texts"]),
        ({"tasks": None}, ["has no task, and its config", "task_type is"]),
        ({"fit": "gain"}, ["unknown fit 'gain'", "gains"]),
        ({"rank": 0}, ["rank is 0"]),
        ({"threads": 0}, ["threads is 0"]),
        ({"weights": [1]}, ["1 weights for 2 adapters"]),
        ({"weights": [1, 0]}, ["a weight is 0", "above 0"]),
        ({"weights": [1, float("nan")]}, ["a weight is nan"]),
        ({"kind": "ia3"}, ["none of the adapters is"]),
        ({"start": {"method": "tys"}}, ["unknown method 'tys'"]),
    ],
)
def test_wrong_input(asked: dict[str, Any], parts: list[str], loras: list[Path], bases: dict[str, Path]) -> None:
    with pytest.raises(TiesPeftError) as caught:
        ties_peft.distil(loras, **{"base": bases["encoder"], "tasks": TASK, **QUICK, **asked})
    assert all(part in str(caught.value) for part in parts), caught.value


def language_teachers(folder: Path, form: str = "llama") -> list[Path]:
    shapes = linear_shapes(make_model(form), "q_proj", "v_proj", "up_proj")
    return [write_lora(folder / f"l{seed}", shapes, seed, task_type="CAUSAL_LM") for seed in range(2)]


def test_what_is_estimated_before_it_starts(
    tmp_path: Path, bases: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tokens that the model reads, counted by a hook on its embeddings, and the size of what is kept."""
    bench, found, counted = Bench.load(bases["llama"], "language"), [], {True: 0, False: 0}

    def count(_: Any, inputs: Any, __: Any) -> None:
        if found:
            counted[torch.is_grad_enabled()] += inputs[0].numel()

    bench.model.get_input_embeddings().register_forward_hook(count)
    monkeypatch.setattr(fitting, "PATIENCE", 100)
    state = tmp_path / "state"
    made = ties_peft.distil(
        language_teachers(tmp_path), rows=40, bench=bench, steps=60, state=state, on_estimate=found.append
    )
    (told,) = found
    assert made.report.retries == 0
    assert (told.steps, told.forward_tokens, told.trained_tokens) == (60, counted[False], counted[True])
    kept = [torch.load(state / f"teacher {number}.pt", weights_only=True)["state"] for number in range(2)]
    assert told.cache_bytes == sum(t.numel() * t.element_size() for one in kept for t in one.values())
    assert told.seconds > 0
    assert told.memory is None or told.memory > told.cache_bytes
    assert "60 steps" in str(told)


@pytest.mark.parametrize(("vocabulary", "short"), [(40_000, torch.int16), (70_000, torch.int32)])
def test_token_numbers_of_a_large_vocabulary_are_kept(vocabulary: int, short: torch.dtype, tmp_path: Path) -> None:
    """A teacher measured against itself: no divergence but that of rounding, at tokens beyond those of int16 too."""
    size = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, initializer_range=1.0, **size))
    bench = Bench(model, make_tokenizer(False))
    adapter = ties_peft.Adapter.load(write_lora(tmp_path / "t", linear_shapes(model, "q_proj"), 0))
    teacher = TokenTeacher(bench, adapter, [[5, 6, 7, 39_999], [9, 10]], "t", "x")
    predictions = teacher.predict()
    assert predictions["tokens"].dtype == short
    assert teacher.cache_bytes == sum(tensor.numel() * tensor.element_size() for tensor in predictions.values())
    teacher.set_predictions(predictions)
    with bench.applied(adapter), torch.no_grad():
        likeliest = model(torch.tensor([[5, 6, 7, 39_999]])).logits[0].topk(128).indices
        assert likeliest.max() > 1 << 15
        found = teacher.compare([0, 1])
    assert found.divergence.abs().max() < 1e-4
    assert found.agreement.tolist() == [1, 1]


def test_weights_say_which_adapter_counts_more(loras: list[Path], bases: dict[str, Path]) -> None:
    """The heavier is imitated better than with the weights swapped; equal ones change nothing, whatever their size."""

    def once(weights: Any) -> Any:
        given: dict[str, Any] = {"rows": 40, "tasks": TASK, "base": bases["encoder"], "steps": 40, "rank": 1}
        return ties_peft.distil(loras, weights=weights, **given)

    first, second = once([20, 1]), once([1, 20])
    for number, (heavy, light) in enumerate(((first, second), (second, first))):
        closer, other = (made.report.lessons[number].divergence[1] for made in (heavy, light))
        assert closer < other
    report = first.report
    own = [line.divergence[1] for line in report.lessons]
    assert report.divergence[1] == pytest.approx((20 * own[0] + own[1]) / 21)
    assert min(value for _, value in report.history) == pytest.approx(report.divergence[1], rel=1e-3)
    assert first.recipe["weights"] == (20.0, 1.0)
    assert once(None).digest == once([3, 3]).digest


def test_a_long_estimate_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    for seconds, parts in ((9.0, []), (840.0, ["240 steps", "14 minutes", "3.2 GB", "36.0 MB"])):
        print_estimate(Estimate(240, 1, 1, 36_000_000, seconds, 3_200_000_000))
        told = capsys.readouterr().err
        assert bool(told) == bool(parts)
        assert all(part in told for part in parts)
