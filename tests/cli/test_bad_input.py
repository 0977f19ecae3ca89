"""Bad input: exit status 2, one message that names the fault and the way out, and nothing left on disk."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import huggingface_hub
import pytest
import torch
from cli.run_command import Outcome, run, tree, within
from packaging.version import Version
from safetensors.torch import load_file, save_file
from sampling import some

import ties_peft
from ties_peft import AdapterError, CompatibilityError, MethodError, RecipeError, cli

WEIGHTS = "adapter_model.safetensors"
Q_A = "base_model.model.layers.0.q.lora_A.weight"
Q_B = "base_model.model.layers.0.q.lora_B.weight"


class Maker(NamedTuple):
    """What a case makes its adapters with."""

    lora: Callable[..., Path]
    ia3: Callable[..., Path]
    root: Path


@pytest.fixture
def make(
    make_lora: Callable[..., Path], make_ia3: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Maker:
    monkeypatch.chdir(tmp_path)
    return Maker(make_lora, make_ia3, tmp_path)


def refused(make: Maker, *arguments: object, out: str | None = "new/parent/out") -> str:
    """The one message of a merge that must be refused, all of the contract's conditions checked."""
    before = tree(make.root)
    with within(10):
        outcome = run("merge", *arguments, *(("--out", make.root / out) if out else ()))
    after = tree(make.root)
    assert outcome.code == 2, outcome
    assert outcome.out == ""
    assert sorted(after) == sorted(before)
    assert after == before
    return one_message(outcome)


def one_message(outcome: Outcome) -> str:
    assert outcome.err.startswith("error: ")
    assert outcome.err.count("error: ") == 1
    assert outcome.err.endswith("\n")
    assert "Traceback" not in outcome.err
    return outcome.err.removeprefix("error: ").rstrip("\n")


ROWS = "token_adapter.trainable_tokens_delta"

# Faults of one adapter: each makes an adapter named `bad` and says what its message must hold.

Fault = Callable[[Maker], Path]


def config(**settings: Any) -> Fault:
    """A sound adapter but for some keys of its config."""
    return lambda make: make.lora("bad", **settings)


def raw_config(text: str) -> Fault:
    def fault(make: Maker) -> Path:
        folder = make.lora("bad")
        (folder / "adapter_config.json").write_text(text)
        return folder

    return fault


def weights(content: bytes, name: str = WEIGHTS) -> Fault:
    def fault(make: Maker) -> Path:
        folder = make.lora("bad")
        (folder / WEIGHTS).unlink()
        (folder / name).write_bytes(content)
        return folder

    return fault


def tensors(change: Callable[[dict[str, torch.Tensor]], Any], **settings: Any) -> Fault:
    """A sound adapter but for its tensors, changed in place."""

    def fault(make: Maker) -> Path:
        folder = make.lora("bad", **settings)
        held = load_file(folder / WEIGHTS)
        change(held)
        save_file(held, folder / WEIGHTS)
        return folder

    return fault


def pickled(change: Callable[[dict[str, torch.Tensor]], Any]) -> Fault:
    def fault(make: Maker) -> Path:
        folder = make.lora("bad")
        held = change(load_file(folder / WEIGHTS))
        (folder / WEIGHTS).unlink()
        torch.save(held, folder / "adapter_model.bin")
        return folder

    return fault


def cut_short(make: Maker) -> Path:
    folder = make.lora("bad")
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[:-100])
    return folder


def cut_short_bin(make: Maker) -> Path:
    folder = pickled(lambda held: held)(make)
    path = folder / "adapter_model.bin"
    path.write_bytes(path.read_bytes()[:200])
    return folder


def no_weights(make: Maker) -> Path:
    folder = make.lora("bad")
    (folder / WEIGHTS).rename(folder / "model-00001-of-00002.safetensors")
    return folder


def no_folder(make: Maker) -> Path:
    return make.root / "bad"


def a_file(make: Maker) -> Path:
    return make.lora("bad") / "adapter_config.json"


def weights_without_config(make: Maker) -> Path:
    return no_config(make) / WEIGHTS


def no_config(make: Maker) -> Path:
    folder = make.lora("bad")
    (folder / "adapter_config.json").unlink()
    return folder


def vector_on_nothing(make: Maker) -> Path:
    folder = make.ia3("bad")
    save_file({"base_model.model.x.ia3_l": torch.ones(3, 4)}, folder / WEIGHTS)
    return folder


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 131072\n"
AGAIN = "again"
FAULTS: dict[str, tuple[Fault, tuple[str, ...]]] = {
    "no such folder": (no_folder, ("no such folder", "Check the path")),
    "a file": (a_file, ("is a file", "adapter_config.json")),
    "no config": (no_config, ("no adapter_config.json", "which would give lora_alpha", "--alpha")),
    "weights without config": (weights_without_config, ("no adapter_config.json", "ties-peft convert", "--alpha")),
    "not JSON": (raw_config('{"peft_type": None}'), ("not JSON", AGAIN)),
    "empty config": (raw_config(""), ("not JSON", AGAIN)),
    "nested without end": (raw_config("[" * 100_000), ("not JSON", AGAIN)),
    "not an object": (raw_config("[]"), ("list", "expected an object")),
    "not text": (raw_config("\x00"), ("not JSON",)),
    "peft_type null": (config(peft_type=None), ("peft_type", "None", "LORA", "IA3")),
    "peft_type unknown": (config(peft_type="MY_OWN"), ("MY_OWN", "LORA", "IA3", "Leave it out")),
    "peft_type of another kind": (config(peft_type="LOHA"), ("LoHa", AGAIN)),
    "peft_type a number": (config(peft_type=7), ("peft_type", "7")),
    "truncated": (cut_short, ("truncated", "download or save the adapter again")),
    "truncated .bin": (cut_short_bin, ("adapter_model.bin", AGAIN)),
    "empty": (weights(b""), ("is empty", AGAIN)),
    "empty .bin": (weights(b"", "adapter_model.bin"), ("is empty", AGAIN)),
    "LFS pointer": (weights(POINTER), ("Git LFS pointer", "git lfs pull")),
    "LFS pointer .bin": (weights(POINTER, "adapter_model.bin"), ("Git LFS pointer", "git lfs pull")),
    "a web page": (weights(b"<!DOCTYPE html><html>no</html>"), ("not a whole safetensors file",)),
    "no weights": (no_weights, ("adapter_model.safetensors", "model-00001-of-00002.safetensors", AGAIN)),
    "NaN": (tensors(lambda t: t[Q_A].__setitem__((0, 0), float("nan"))), ("NaN or infinity", Q_A, "leave it out")),
    "infinity": (tensors(lambda t: t[Q_B].__setitem__((0, 0), float("-inf"))), ("NaN or infinity", Q_B)),
    "lone A": (tensors(lambda t: t.pop(Q_B)), ("layers.0.q", "lora_A but no lora_B", AGAIN)),
    "lone B": (tensors(lambda t: t.pop(Q_A)), ("layers.0.q", "lora_B but no lora_A", AGAIN)),
    "A and B unlike": (tensors(lambda t: t.update({Q_A: torch.ones(3, 10)})), ("[3, 10]", "[12, 4]", AGAIN)),
    "no tensors": (tensors(lambda t: t.clear()), ("no LoRA tensors", AGAIN)),
    "whole numbers": (tensors(lambda t: t.update({Q_A: torch.ones(4, 10).to(torch.int8)})), (Q_A, "unquantised")),
    "all whole numbers": (config(dtype=torch.int8), ("unquantised",)),
    "float8": (config(dtype=torch.float8_e4m3fn), ("float16",)),
    "complex": (pickled(lambda t: {k: v.to(torch.complex64) for k, v in t.items()}), ("complex64",)),
    "sparse": (pickled(lambda t: {k: v.to_sparse() for k, v in t.items()}), ("sparse",)),
    "on no device": (pickled(lambda t: {k: v.to("meta") for k, v in t.items()}), ("bad",)),
    "a list": (pickled(lambda t: list(t.values())), ("not a table of tensors", AGAIN)),
    "no prefix": (tensors(lambda t: t.update({"q.lora_A.weight": torch.ones(4, 4)})), ("base_model.model.", "PEFT")),
    "values too large": (config(gain=1e30, alpha=1e30), ("bad",)),
    "DoRA": (config(use_dora=True), ("use_dora", "lora_magnitude_vector")),
    "DoRA by its tensors": (
        tensors(lambda t: t.update({"base_model.model.layers.0.q.lora_magnitude_vector.weight": torch.ones(12)})),
        ("use_dora", "lora_magnitude_vector"),
    ),
    "a head without PEFT's prefix": (
        tensors(lambda t: t.update({"score.weight": torch.ones(2, 12)})),
        ("'score.weight'", "'base_model.model.'", "Save the adapter with PEFT"),
    ),
    "rows of tokens nobody names": (
        tensors(lambda t: t.update({f"base_model.model.wte.{ROWS}": torch.ones(2, 12)})),
        ("2 × 12", "'wte'", "trainable_token_indices", "None"),
    ),
    "rows of other tokens": (
        tensors(lambda t: t.update({f"base_model.model.wte.{ROWS}": torch.ones(2, 12)}), trainable_token_indices=[7]),
        ("2 × 12", "'wte'", "trainable_token_indices", "[7]"),
    ),
    "two biases for one place": (
        tensors(
            lambda t: t.update({f"base_model.model.q{end}": torch.ones(3) for end in (".bias", ".base_layer.bias")})
        ),
        ("'base_model.model.q.bias'", "Leave one of them out"),
    ),
    "a LoRA of another form": (
        tensors(lambda t: t.update({"base_model.model.layers.0.q.lora_C.weight": torch.ones(2, 12)})),
        ("LoRA of an unknown form", "layers.0.q.lora_C.weight"),
    ),
    "embeddings": (
        tensors(lambda t: t.update({"base_model.model.wte.lora_embedding_A": torch.ones(4, 9)})),
        ("wte", "lora_embedding_A", "lora_embedding_B"),
    ),
    "grouped convolution": (
        tensors(lambda t: t.update({Q_A: torch.ones(4, 10, 3, 3), Q_B: torch.ones(12, 2, 1, 1)})),
        ("grouped convolution", "layers.0.q"),
    ),
    "lora_bias": (config(lora_bias=True), ("lora_bias",)),
    "lora_bias by its tensors": (
        tensors(lambda t: t.update({"base_model.model.layers.0.q.lora_B.bias": torch.ones(12)})),
        ("bias", "lora_B.bias"),
    ),
    "pissa": (config(init_lora_weights="pissa_niter_4"), ("pissa_niter_4", "path_initial_model_for_weight_conversion")),
    "olora": (config(init_lora_weights="OLoRA"), ("OLoRA", "path_initial_model_for_weight_conversion")),
    "no alpha": (config(lora_alpha=None), ("lora_alpha=None", "adapter_config.json")),
    "alpha NaN": (config(lora_alpha=float("nan")), ("lora_alpha", "finite")),
    "alpha pattern of no pattern": (config(alpha_pattern={"(": 3}), ("alpha_pattern", "adapter_config.json")),
    "alpha pattern a list": (config(alpha_pattern=["q"]), ("alpha_pattern", "adapter_config.json")),
    "(IA)³ of no vector": (vector_on_nothing, ("ia3_l", "[3, 4]", "[k, 1] or [1, k]")),
}


@pytest.mark.parametrize("name", some(FAULTS, 12, "merge"))
def test_a_faulty_adapter_is_refused_by_merge(make: Maker, name: str) -> None:
    fault, words = FAULTS[name]
    message = refused(make, make.lora("good"), fault(make))
    for word in ("bad", *words):
        assert word in message, message
    assert message.endswith((".", "?"))


@pytest.mark.parametrize("name", FAULTS)
def test_a_faulty_adapter_raises_adapter_error(make: Maker, name: str) -> None:
    fault, words = FAULTS[name]
    with within(10), pytest.raises(AdapterError, match="bad") as caught:
        ties_peft.merge([make.lora("good"), fault(make)])
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("name", some(FAULTS, 12, "inspect"))
def test_inspect_names_the_fault_and_shows_the_others(make: Maker, name: str) -> None:
    fault, words = FAULTS[name]
    with within(10):
        outcome = run("inspect", make.lora("good"), fault(make))
    assert outcome.code == 2
    assert "good" in outcome.out and "rank 4" in outcome.out
    message = one_message(outcome)
    for word in ("bad", *words):
        assert word in message, message


class TouchesAFile:
    """Runs when it is unpickled without care."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("write", [torch.save, lambda what, path: path.write_bytes(pickle.dumps(what))])
def test_a_malicious_pickle_is_not_executed(
    make: Maker, write: Callable[[Any, Path], Any], recwarn: pytest.WarningsRecorder
) -> None:
    folder = make.lora("bad")
    (folder / WEIGHTS).unlink()
    write({Q_A: TouchesAFile(make.root / "executed")}, folder / "adapter_model.bin")
    message = refused(make, make.lora("good"), folder)
    assert not (make.root / "executed").exists()
    assert "bad" in message and "adapter_model.bin" in message and "not executed" in message
    assert "safetensors" in message
    alone = Version(torch.__version__) >= Version("2.6")  # older releases of torch warn by themselves
    assert not (alone and recwarn.list), "torch's own warning would stand beside the one message"


def test_unlike_widths_stand_all_in_one_table(make: Maker) -> None:
    good = make.lora("good", shapes={"a.q": (12, 10), "a.v": (12, 10), "a.o": (8, 8)})
    wide = make.lora("wide", shapes={"a.q": (12, 11), "a.v": (13, 10), "a.o": (8, 8)})
    message = refused(make, good, wide)
    assert "a.q: good has 12 × 10, wide has 12 × 11" in message
    assert "a.v: good has 12 × 10, wide has 13 × 10" in message
    assert "a.o" not in message
    assert "Leave some out" in message
    with pytest.raises(CompatibilityError):
        ties_peft.merge([good, wide])


def test_lora_with_ia3_lists_the_kind_of_each(make: Maker) -> None:
    message = refused(make, make.lora("first"), make.ia3("second"))
    for word in ("LoRA", "first", "(IA)³", "second", "Merge each type"):
        assert word in message
    with pytest.raises(CompatibilityError):
        ties_peft.merge([make.root / "first", make.root / "second"])


def test_no_module_in_common_is_refused_unless_allowed(make: Maker) -> None:
    pair = make.lora("left", shapes={"a.q": (6, 5)}), make.lora("right", shapes={"b.q": (6, 5)})
    message = refused(make, *pair)
    for word in ("left", "right", "a.q", "b.q", "no module in common", "--allow-disjoint"):
        assert word in message
    with pytest.raises(CompatibilityError):
        ties_peft.merge(pair)
    assert run("merge", *pair, "--allow-disjoint", "--out", make.root / "out").code == 0
    assert ties_peft.Adapter.load(make.root / "out").modules == ("a.q", "b.q")


ASKED: dict[str, tuple[tuple[str, ...], type[Exception], tuple[str, ...]]] = {
    "unknown method": (("--method", "tise"), RecipeError, ("method 'tise'", "did you mean 'ties'", "average")),
    "unknown space": (("--space", "dleta"), RecipeError, ("space 'dleta'", "did you mean 'delta'", "factors")),
    "unknown parameter": (("--set", "densty=0.3"), MethodError, ("auto", "'densty'", "did you mean 'density'")),
    "lacking": (("--method", "average", "--density", "0.3"), MethodError, ("average", "density")),
    "set without a value": (("--set", "elect"), RecipeError, ("--set", "elect", "NAME=VALUE")),
    "set to no known value": (("--set", "elect=cont"), MethodError, ("elect", "'cont'", "'mass', 'count' or 'none'")),
    "set to no date": (("--set", "elect=2001-13-45"), MethodError, ("elect", "2001-13-45")),
    "unknown scope": (("--scope", "layer"), MethodError, ("scope", "'layer'", "'adapter' or 'module'")),
    "scope not offered": (("--space", "factors", "--scope", "adapter"), MethodError, ("factors", "'module'")),
    "space not offered": (("--space", "factors", "--method", "average"), MethodError, ("average", "factors", "delta")),
    "density 0": (("--density", "0"), MethodError, ("density", "0", "(0, 1]")),
    "density 1.5": (("--density", "1.5"), MethodError, ("density", "1.5", "(0, 1]")),
    "density negative": (("--density", "-0.2"), MethodError, ("density", "-0.2", "(0, 1]")),
    "density NaN": (("--density", "nan"), MethodError, ("density", "nan", "(0, 1]")),
    "one weight too many": (("--weights", "1,1,1"), RecipeError, ("3 weights", "2 adapters")),
    "one weight too few": (("--weights", "1"), RecipeError, ("1 weight", "2 adapters")),
    "weight NaN": (("--weights", "1,nan"), RecipeError, ("weights", "nan", "finite")),
    "weight infinite": (("--weights", "1,inf"), RecipeError, ("weights", "inf", "finite")),
    "weight no number": (("--weights", "1,two"), RecipeError, ("--weights", "1,two", "1,0.5,1")),
    "weights empty": (("--weights", ""), RecipeError, ("--weights", "1,0.5,1")),
    "weights all 0": (("--weights", "0,0"), RecipeError, ("every weight is 0",)),
    "weights that cancel": (("--method", "average", "--weights", "1,-1"), MethodError, ("average", "sum to 0")),
    "rank 0": (("--rank", "0"), RecipeError, ("rank", "0", "from 1 up", "auto")),
    "rank -1": (("--rank", "-1"), RecipeError, ("rank", "-1", "from 1 up", "auto")),
    "rank many": (("--rank", "many"), RecipeError, ("--rank", "many", "auto")),
    "rank 1.5": (("--rank", "1.5"), RecipeError, ("--rank", "1.5", "whole number")),
    "scale no number": (("--scale", "big"), RecipeError, ("--scale", "big", "finite", "1/sqrt(N)")),
    "scale NaN": (("--scale", "nan"), RecipeError, ("scale", "nan", "finite")),
    "scale past float32": (("--scale", "1e39"), RecipeError, ("scale",)),
    "past float16": (("--scale", "1e7", "--dtype", "float16"), RecipeError, ("float16", "float32")),
    "seed -1": (("--seed", "-1"), RecipeError, ("seed", "-1")),
    "unknown dtype": (("--dtype", "int4"), RecipeError, ("dtype", "int4", "bfloat16, float16, float32")),
    "unknown device": (("--device", "banana"), RecipeError, ("device", "banana", "cpu")),
    "device without memory": (("--device", "meta"), RecipeError, ("device", "meta", "cpu")),
    "signs from nowhere": (("--set", "sign_from=/no/where"), AdapterError, ("/no/where", "no such folder")),
    "signs from a number": (("--set", "sign_from=3"), MethodError, ("sign_from", "3")),
}


@pytest.mark.parametrize("name", some(ASKED, 9))
def test_what_cannot_be_asked_is_refused(make: Maker, name: str) -> None:
    flags, _, words = ASKED[name]
    message = refused(make, make.lora("a"), make.lora("b", seed=1), *flags)
    for word in words:
        assert word in message, message


@pytest.mark.parametrize("name", ASKED)
def test_what_cannot_be_asked_raises_by_who_mends_it(make: Maker, name: str) -> None:
    """The same before it is turned into a message: the error's branch of the tree."""
    flags, branch, words = ASKED[name]
    arguments = ["merge", str(make.lora("a")), str(make.lora("b", seed=1)), *flags, "--out", str(make.root / "out")]
    with within(10), pytest.raises(branch) as caught:
        cli.app(arguments, standalone_mode=False)
    for word in words:
        assert word in str(caught.value)


def test_rank_on_ia3_is_refused(make: Maker) -> None:
    message = refused(make, make.ia3("a"), make.ia3("b", seed=1), "--rank", "8")
    assert "rank" in message and "(IA)³" in message and "Leave it out" in message


def test_factors_is_not_for_ia3(make: Maker) -> None:
    message = refused(make, make.ia3("a"), "--method", "ties", "--space", "factors")
    assert "factors" in message and "(IA)³" in message and "delta" in message


@pytest.mark.parametrize("dry", [(), ("--dry-run",)])
def test_factors_needs_equal_ranks(make: Maker, dry: tuple[str, ...]) -> None:
    message = refused(make, make.lora("a", rank=4), make.lora("b", rank=2), "--space", "factors", *dry)
    assert "factors" in message and "[2, 4]" in message and "delta" in message


def test_no_adapters(make: Maker) -> None:
    assert "no adapters" in refused(make)


def test_no_output(make: Maker) -> None:
    assert "--out" in refused(make, make.lora("a"), out=None)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("merge", "--bogus", "1"), ("--bogus",)),
        (("merge", "x", "--target", "tgi", "--out", "y"), ("x",)),
        (("merge", "x", "--out", "y", "--density", "much"), ("--density is 'much'; expected a number",)),
        (("merge", "x", "--seed", "1.5"), ("--seed",)),
        (("merge", "x", "--out"), ("--out",)),
        (("mergee",), ("mergee",)),
        (("inspect",), ("adapters",)),
        (("inspect", "x", "--deep"), ("--deep",)),
        (("convert", "x"), ("--out",)),
        (("convert",), ("adapter",)),
        (("push", "x"), ("repo",)),
    ],
)
def test_usage(make: Maker, arguments: tuple[str, ...], words: tuple[str, ...]) -> None:
    outcome = run(*arguments)
    assert outcome.code == 2
    assert outcome.out == ""
    assert "Traceback" not in outcome.err
    for word in words:
        assert word in outcome.err.lower()


def test_unknown_method_of_the_list() -> None:
    outcome = run("methods", "tise")
    assert (outcome.code, outcome.out) == (2, "")
    assert "did you mean 'ties'" in one_message(outcome)


# Where the output shall go


def test_existing_output_needs_force(make: Maker) -> None:
    a = make.lora("a")
    assert run("merge", a, "--out", make.root / "out").code == 0
    message = refused(make, a, out="out")
    assert "out" in message and "not empty" in message and "--force" in message
    assert run("merge", a, "--out", make.root / "out", "--force", "--rank", "2").code == 0
    assert ties_peft.Adapter.load(make.root / "out").ranks == (2,)


@pytest.mark.parametrize("foreign", ["notes.txt", ".git/config", "optimizer.pt", "README.md/mine.txt"])
def test_force_spares_a_folder_with_foreign_files(make: Maker, foreign: str) -> None:
    a = make.lora("a")
    path = make.root / "out" / foreign
    path.parent.mkdir(parents=True)
    path.write_text("precious")
    message = refused(make, a, "--force", out="out")
    assert foreign.split("/")[0] in message
    assert "Choose another" in message


@pytest.mark.parametrize("out", ["in/a", "in/a/merged", "in", "in/../in/a", "link"])
@pytest.mark.parametrize("force", [(), ("--force",)])
def test_the_output_is_no_input(make: Maker, out: str, force: tuple[str, ...]) -> None:
    a = make.lora("in/a")
    (make.root / "link").symlink_to(a)
    message = refused(make, a, make.lora("b"), *force, out=out)
    assert str(make.root / out) in message
    assert "Choose another" in message


def test_the_output_is_no_input_under_home(make: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    """`~` is opened as the home folder, so it must be recognised as the same folder too."""
    monkeypatch.setenv("HOME", str(make.root))
    make.lora("a")
    assert "input" in refused(make, "~/a", "--force", out="a")


def test_the_output_is_not_the_giver_of_signs(make: Maker) -> None:
    a, signs = make.lora("a"), make.lora("signs", seed=1)
    assert "signs" in refused(make, a, "--set", f"sign_from={signs}", "--force", out="signs")


def test_the_output_in_a_file(make: Maker) -> None:
    a = make.lora("a")
    (make.root / "file").write_text("mine")
    for out in ("file", "file/out", "file/deep/out"):
        message = refused(make, a, out=out)
        assert str(make.root / out) in message


def test_the_output_in_a_file_is_known_before_the_work(make: Maker) -> None:
    a = make.lora("a")
    (make.root / "file").write_text("mine")
    assert "file" in refused(make, a, "--dry-run", out="file/out")


def test_the_output_in_this_folder(make: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--out .` in an empty folder works or is refused; either way nothing is left beside it."""
    a = make.lora("a")
    (make.root / "here").mkdir()
    monkeypatch.chdir(make.root / "here")
    outcome = run("merge", a, "--out", ".")
    assert sorted(path.name for path in make.root.iterdir()) == ["a", "here"]
    names = {path.name for path in Path().iterdir()}
    assert "adapter_config.json" in names if outcome.code == 0 else not names, (outcome, names)


@pytest.mark.parametrize("out", ["x" * 300, "x/" * 3000, "ring", "ring/out"])
def test_the_output_of_an_impossible_name(make: Maker, out: str) -> None:
    (make.root / "ring").symlink_to("ring")
    assert "output" in refused(make, make.lora("a"), out=out)


# Names of adapters


@pytest.mark.parametrize("name", ["x" * 5000, "~nobody-of-this-name/a", "a\x1b[31mb", "..."])
def test_strange_names_are_refused_politely(make: Maker, name: str) -> None:
    message = refused(make, name)
    assert "\x1b" not in message
    assert len(message) < 1000


def test_a_hub_id_that_is_not_there(make: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> str:
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    message = refused(make, "org/nothing")
    for word in ("org/nothing", "no such folder", "Hub", "no network", "spelling"):
        assert word in message


# Recipes

RECIPES: dict[str, tuple[str, tuple[str, ...]]] = {
    "unknown key": ("merge_metod: ties\nadapters: [A]", ("line 1", "merge_metod", "did you mean 'merge_method'")),
    "unknown key below": (
        "adapters:\n  - adapter: A\n    parameters:\n      wieght: 2",
        ("line 4", "wieght", "did you mean 'weight'"),
    ),
    "unknown parameter": ("adapters: [A]\nparameters:\n  densty: 0.3", ("densty", "did you mean 'density'")),
    "not YAML": ("adapters: [A", ("not YAML",)),
    "control character": ("adapters: \x01", ("not YAML",)),
    "no table": ("- A", ("line 1", "keys")),
    "empty": ("", ("line 1", "keys")),
    "no adapters": ("merge_method: ties\nadapters: []", ("line 2", "adapters")),
    "without adapters": ("merge_method: ties", ("adapters",)),
    "adapter without a name": ("adapters:\n  - parameters: {weight: 1}", ("line 2", "adapter", "path or Hub id")),
    "weight no number": ("adapters:\n  - adapter: A\n    parameters: {weight: heavy}", ("line 3", "heavy", "number")),
    "weight NaN": ("adapters:\n  - adapter: A\n    parameters: {weight: .nan}", ("line 3", "nan", "number")),
    "twice": ("adapters: [A]\nmodels: [A]", ("line 2", "models", "twice")),
    "method no name": ("merge_method: [ties]\nadapters: [A]", ("line 1", "method")),
    "method null": ("adapters: [A]\nmerge_method:", ("line 2", "method")),
    "space a list": ("adapters: [A]\nparameters: {space: [delta]}", ("delta",)),
    "rank a list": ("adapters: [A]\nparameters: {rank: [1]}", ("rank",)),
    "dtype a list": ("adapters: [A]\ndtype: [float16]", ("float16",)),
    "base a list": ("adapters: [A]\nbase_model: [org/base]", ("line 2", "org/base")),
    "allow_disjoint a word": ("adapters: [A]\nallow_disjoint: 'no'", ("line 2", "'no'")),
    "parameters a list": ("adapters: [A]\nparameters: [density]", ("line 2", "keys")),
    "no date": ("adapters: [A]\nparameters: {scale: 2001-13-45}", ("recipe.yaml",)),
    "holds itself": ("adapters: &all [*all]", ("recipe.yaml",)),
    "code": ("adapters: !!python/object/apply:os.system [touch executed]", ("not YAML",)),
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_faulty_recipe_names_the_line(make: Maker, name: str) -> None:
    text, words = RECIPES[name]
    path = make.root / "recipe.yaml"
    path.write_text(text.replace("A", str(make.lora("a"))))
    message = refused(make, "--recipe", path)
    for word in words:
        assert word in message, message


def test_a_recipe_that_is_not_there(make: Maker) -> None:
    message = refused(make, "--recipe", "nowhere.yaml")
    assert "nowhere.yaml" in message and "cannot be read" in message


# Faults of the Python API alone


@pytest.mark.parametrize(
    ("changes", "branch"),
    [
        ({"method": ["ties"]}, RecipeError),
        ({"space": None}, RecipeError),
        ({"weights": 1.0}, RecipeError),
        ({"weights": ["1"]}, RecipeError),
        ({"rank": True}, RecipeError),
        ({"rank": None}, RecipeError),
        ({"seed": True}, RecipeError),
        ({"device": None}, RecipeError),
        ({"dtype": torch.int8}, RecipeError),
        ({"dtype": 16}, RecipeError),
        ({"scopee": "module"}, MethodError),
    ],
)
def test_python_raises_by_who_mends_it(make: Maker, changes: dict[str, Any], branch: type[Exception]) -> None:
    with pytest.raises(branch):
        ties_peft.merge([make.lora("a")], **changes)


@pytest.mark.parametrize("wrap", [str, ties_peft.Adapter.load])
def test_one_adapter_alone_is_not_a_list(make: Maker, wrap: Callable[[Path], Any]) -> None:
    """`merge("path")` would read a path letter by letter."""
    with pytest.raises(RecipeError, match="list"):
        ties_peft.merge(wrap(make.lora("a")))


def test_the_tree_of_errors() -> None:
    for branch in (AdapterError, CompatibilityError, RecipeError, MethodError):
        assert branch.__bases__ == (ties_peft.TiesPeftError,)
    assert issubclass(ties_peft.TiesPeftWarning, UserWarning)


def test_an_unforeseen_fault_is_not_hidden(make: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bug is no bad input: it leaves with its traceback, hence with exit status 1."""

    def broken(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError

    a = make.lora("a")
    monkeypatch.setattr(import_module("ties_peft.merging.merge"), "merge_recipe", broken)
    before = tree(make.root)
    with pytest.raises(ZeroDivisionError):
        run("merge", a, "--out", make.root / "new/out")
    assert tree(make.root) == before
