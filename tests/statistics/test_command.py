"""`ties-peft statistics`, on a tiny base in a folder."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny

Make = Callable[..., Path]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny encoder and a tokenizer of words, as save_pretrained writes them."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = sorted({word for text in (*tiny.TEXTS, *tiny.DESCRIPTIONS) for word in text.split()})
    table = Tokenizer(models.WordLevel({"[PAD]": 0, "[UNK]": 1} | {w: i + 2 for i, w in enumerate(words)}, "[UNK]"))
    table.pre_tokenizer = pre_tokenizers.Whitespace()
    folder = tmp_path_factory.mktemp("base")
    PreTrainedTokenizerFast(tokenizer_object=table, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)
    tiny.encoder().model.save_pretrained(folder)
    return folder


def test_gathers_once_and_says_so(base: Path, make_lora: Make, tmp_path: Path) -> None:
    folder = make_lora("a", shapes=tiny.BERT, gain=0.2)
    (tmp_path / "rows.txt").write_text("\n".join(tiny.TEXTS), encoding="utf-8")
    task = tmp_path / "task.yaml"
    task.write_text(json.dumps({**tiny.ENCODER, "rows": "rows.txt"}), encoding="utf-8")
    code = f"""
import sys
from ties_peft import cli
for flags in (["--json"], [], ["--json", "--again", "--kind", "gram"]):
    sys.argv = ["ties-peft", "statistics", {str(folder)!r}, "--task", {str(task)!r}, "--base", {str(base)!r}, *flags]
    try:
        cli.main()
    except SystemExit as stop:
        assert not stop.code
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    first, *told, last = done.stdout.splitlines()
    made = json.loads(first)["statistics"]
    assert [(one["adapter"], one["file"], one["rows"]) for one in made] == [
        (str(folder), "fisher.safetensors", 6),
        (str(folder), "gram.safetensors", 6),
    ]
    assert told == [f"{folder}/{kind}.safetensors: 6 rows of task on {base}" for kind in ("fisher", "gram")]
    assert len(json.loads(last)["statistics"]) == 1
    assert (folder / "gram.safetensors").stat().st_mode & 0o777 == 0o644
