"""Files of old PEFT releases are read right, and what we write loads in old releases.

The files under `files/` were written by the releases that their folders name, through `make_fixtures.py`.
"""

from __future__ import annotations

import json
import subprocess
import sys
import venv
from pathlib import Path

import peft
import pytest
import torch

import ties_peft

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
from net import base, inputs  # noqa: E402

OLD = sorted(path.parent for path in (HERE / "files").glob("*/*/adapter_config.json"))
RELEASES = {  # each with the libraries of its time
    "0.6.0": ("transformers==4.35.2", "accelerate==0.24.1", "huggingface_hub==0.17.3"),
    "0.10.0": ("transformers==4.39.3", "accelerate==0.28.0", "huggingface_hub==0.22.2"),
    "0.13.0": ("transformers==4.45.2", "accelerate==1.0.1", "huggingface_hub==0.25.2"),
}
pytestmark = pytest.mark.filterwarnings("ignore::ties_peft.TiesPeftWarning")


def outcome(folder: Path) -> torch.Tensor:
    """What the network gives with an adapter, by today's PEFT."""
    with torch.no_grad():
        result: torch.Tensor = peft.PeftModel.from_pretrained(base(), folder).eval()(inputs())
    return result


def test_there_are_files_of_each_release() -> None:
    assert {path.parent.name for path in OLD} == {f"peft-{v}" for v in ("0.3.0", "0.6.0", "0.9.0", "0.12.0", "0.15.2")}
    assert {path.name for path in OLD} == {"lora", "lora-patterns", "rslora", "ia3"}


@pytest.mark.parametrize("folder", OLD, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_a_file_of_an_old_release_is_read_right(folder: Path, tmp_path: Path) -> None:
    """Merged alone, it computes what it computed in the release that wrote it."""
    expected = torch.tensor(json.loads((folder / "expected.json").read_text())["output"])
    assert (expected - base()(inputs())).abs().max() > 0.05  # the adapter does something
    merged = ties_peft.merge([folder], method="average").save(tmp_path / "merged")
    assert torch.allclose(outcome(merged), expected, atol=1e-5)


def write_results(root: Path) -> list[Path]:
    """One result of each kind, of unlike members."""
    files = HERE / "files"
    lora = [files / "peft-0.9.0" / name for name in ("lora", "rslora", "lora-patterns")]
    ia3 = [files / f"peft-{version}" / "ia3" for version in ("0.6.0", "0.15.2")]
    return [
        ties_peft.merge(lora).save(root / "lora"),
        ties_peft.merge(lora[:1], method="average", dtype="float16").save(root / "one"),
        ties_peft.merge(ia3).save(root / "ia3"),
    ]


@pytest.mark.slow
@pytest.mark.parametrize("release", RELEASES)
def test_a_result_loads_in_an_old_release(release: str, tmp_path: Path) -> None:
    environment = tmp_path / "environment"
    venv.create(environment, with_pip=True)
    python = environment / "bin" / "python"
    wanted = (f"torch=={torch.__version__.partition('+')[0]}", f"peft=={release}", "numpy<2")
    install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *wanted, *RELEASES[release]]
    subprocess.run(install, check=True)
    for folder in write_results(tmp_path / "results"):
        done = subprocess.run(
            [python, HERE / "load_result.py", folder], capture_output=True, text=True, check=False, cwd=HERE
        )
        assert done.returncode == 0, done.stderr
        said = json.loads(done.stdout.splitlines()[-1])
        assert said["version"] == release
        assert torch.allclose(torch.tensor(said["output"]), outcome(folder), atol=1e-4), folder.name
