"""Names that anyone may have chosen: nothing outside --out is written, nothing reaches the terminal that it would obey."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from cli.run_command import run, tree
from safetensors.torch import load_file, save_file

import ties_peft
from ties_peft import Adapter, AdapterError, RecipeError

Make = Callable[..., Path]
WEIGHTS = "adapter_model.safetensors"
NASTY = "a\x1b[31m\x07[red]b`` ```"
SECRET = "hf_" + "s3cr3t" * 6
pytestmark = pytest.mark.filterwarnings("ignore::ties_peft.TiesPeftWarning")


def obeyed(text: str) -> list[str]:
    """The characters of a text that a terminal acts upon, but for the ends of lines."""
    return sorted({c for c in text if not c.isprintable() and c != "\n"})


@pytest.fixture
def nasty(make_lora: Make, tmp_path: Path) -> Path:
    """An adapter whose folder, base model and modules have names made to do harm."""
    folder = make_lora("plain", seed=1, base_model_name_or_path=f"org/{NASTY}\n---\nevil: true", task_type=NASTY)
    held = load_file(folder / WEIGHTS)
    for side, shape in (("A", (4, 10)), ("B", (12, 4))):
        held[f"base_model.model.../../../{NASTY}.lora_{side}.weight"] = torch.ones(shape)
        held[f"base_model.model./etc/x.lora_{side}.weight"] = torch.ones(shape)
    save_file(held, folder / WEIGHTS)
    return folder.rename(tmp_path / NASTY)


@pytest.mark.parametrize("arguments", [("inspect",), ("merge", "--dry-run"), ("merge", "--out")])
def test_nothing_printed_is_obeyed(make_lora: Make, nasty: Path, tmp_path: Path, arguments: tuple[str, ...]) -> None:
    out = [str(tmp_path / "out")] if "--out" in arguments else []
    done = run(arguments[0], str(make_lora("b")), str(nasty), *arguments[1:], *out)
    assert done.code == 0, done.err
    assert obeyed(done.out + done.err) == []
    assert "[red]" in done.out  # shown, not taken for a colour


def test_nothing_outside_the_output_is_written(make_lora: Make, nasty: Path, tmp_path: Path) -> None:
    inputs = [str(make_lora("b")), str(nasty)]
    before = tree(tmp_path)
    assert run("merge", *inputs, "--out", str(tmp_path / "out")).code == 0
    after = tree(tmp_path)
    assert {path for path in after if Path(path).parts[0] != "out"} == set(before)
    assert {path: after[path] for path in before} == before
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "README.md",
        "adapter_config.json",
        WEIGHTS,
        "provenance.json",
        "recipe.yaml",
    }
    card = (tmp_path / "out" / "README.md").read_text()
    assert obeyed(card) == []
    front = card.split("---\n")[1]
    assert "evil" not in [line.partition(":")[0] for line in front.splitlines()]
    fence, block = re.findall(r"\n(`{3,})yaml\n(.*)", card, re.DOTALL)[0]
    recipe = yaml.safe_load(block[: block.index(f"\n{fence}\n")])  # no name closes the block of the recipe
    assert recipe["parameters"] == {"space": "delta", "rank": "auto", "seed": 0}


def test_the_same_names_come_back(make_lora: Make, nasty: Path, tmp_path: Path) -> None:
    merged = ties_peft.merge([make_lora("b"), nasty])
    merged.save(tmp_path / "out")
    assert Adapter.load(tmp_path / "out").modules == merged.modules
    again = ties_peft.Recipe.from_file(tmp_path / "out" / "recipe.yaml")
    assert again.adapters[1] == str(nasty)


@pytest.mark.parametrize(
    "source",
    ["../../etc", "org/..", "org/../x", "/no/where", "org/name@../x", "org/name:../../x", "a\x1b[2J/b", "org/\n"],
)
def test_a_name_that_leads_elsewhere_is_no_adapter(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused without a word to the Hub, and safe to print."""
    import huggingface_hub

    def called(*_: object, **__: object) -> None:
        raise AssertionError("the Hub was asked")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", called)
    with pytest.raises((AdapterError, RecipeError)) as caught:
        Adapter.load(source)
    assert obeyed(str(caught.value)) == []


def test_a_subfolder_leads_inside(make_lora: Make) -> None:
    folder = make_lora("a")
    with pytest.raises(AdapterError, match=r"'\.\./a'"):
        Adapter.load(folder, subfolder="../a")


def test_an_output_that_is_a_link_is_refused(make_lora: Make, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "elsewhere")
    merged = ties_peft.merge([make_lora("a"), make_lora("b", seed=1)])
    with pytest.raises(RecipeError, match="not a folder"):
        merged.save(tmp_path / "out")
    assert not list((tmp_path / "elsewhere").iterdir())


def test_no_token_is_written(make_lora: Make, tmp_path: Path) -> None:
    environment = {**os.environ, "HF_TOKEN": SECRET, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "ties_peft", "merge", str(make_lora("a")), "--out", str(tmp_path / "out")]
    done = [
        subprocess.run([*command, *more], capture_output=True, text=True, env=environment, check=False)
        for more in ([str(make_lora("b", seed=1))], ["org/private", "--force"])
    ]
    assert [one.returncode for one in done] == [0, 2]
    said = "".join(one.stdout + one.stderr for one in done)
    written = b"".join(path.read_bytes() for path in (tmp_path / "out").iterdir())
    assert SECRET not in said
    assert SECRET.encode() not in written


def test_a_file_that_changes_while_it_is_read_is_refused(make_lora: Make) -> None:
    """Between the digest and the merge, say: what is written must be what is reported."""
    folder, other = make_lora("a"), make_lora("b", seed=1)
    adapter = Adapter.load(folder)
    adapter.check()
    content = (other / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content)
    os.utime(folder / WEIGHTS, ns=(1, 1))
    with pytest.raises(AdapterError, match="changed while it was read"):
        ties_peft.merge([adapter, other])


MEASURE = """
import resource, sys
import ties_peft
ties_peft.Adapter  # everything is imported
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    adapter = ties_peft.Adapter.load(sys.argv[1])
    adapter.check()
except ties_peft.TiesPeftError:
    pass
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in other units")
@pytest.mark.parametrize("name", [WEIGHTS, "adapter_model.bin"])
def test_memory_is_a_small_multiple_of_the_file(make_lora: Make, name: str) -> None:
    """At most three times the file and 64 MB, whatever the file claims to hold."""
    folder = make_lora("large", shapes={f"layers.{i}.q": (4096, 4096) for i in range(40)}, rank=16)
    held = load_file(folder / WEIGHTS)
    if name != WEIGHTS:
        (folder / WEIGHTS).unlink()
        torch.save(held, folder / name)
    size = (folder / name).stat().st_size
    assert size > 20e6
    done = subprocess.run([sys.executable, "-c", MEASURE, str(folder)], capture_output=True, text=True, check=True)
    assert float(done.stdout) <= 3 * size + 64e6
