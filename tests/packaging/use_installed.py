"""Merge two small adapters with the ties_peft that is installed, on the command line, and load the result with PEFT.

Runs from an empty folder, in which it writes.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from copy import deepcopy
from pathlib import Path

import peft
import torch
from torch import nn

import ties_peft

COMMAND = str(Path(sysconfig.get_path("scripts")) / "ties-peft")


def run(*arguments: str) -> str:
    """Return what `ties-peft` prints on standard output."""
    return subprocess.run([COMMAND, *arguments], check=True, capture_output=True, text=True).stdout


def make_adapter(base: nn.Module, name: str, seed: int) -> None:
    """Write a LoRA whose B is not zero."""
    model = peft.get_peft_model(deepcopy(base), peft.LoraConfig(r=2, lora_alpha=4, target_modules=["0", "2"]))
    torch.manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter)
    model.save_pretrained(name)


def main() -> None:
    """Make adapters, merge, load, compare."""
    assert Path(ties_peft.__file__).is_relative_to(sys.prefix), ties_peft.__file__
    version = run("--version")
    assert ties_peft.__version__ in version, version
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).eval()
    for seed, name in enumerate(("a", "b")):
        make_adapter(base, name, seed)
    run("merge", "a", "b", "--method", "task_arithmetic", "--scale", "1", "--out", "merged")
    x, by_hand = torch.linspace(-1, 1, 12).reshape(2, 6), deepcopy(base)
    with torch.no_grad():
        for name in ("a", "b"):
            for module, delta in ((m, ties_peft.Adapter.load(name).delta(m)) for m in ("0", "2")):
                by_hand.get_submodule(module).weight += delta
        loaded = peft.PeftModel.from_pretrained(deepcopy(base), "merged").eval()(x)
        assert torch.allclose(loaded, by_hand(x), atol=1e-4), (loaded, by_hand(x))
        assert not torch.allclose(loaded, base(x), atol=1e-2)
    print(version.strip())


if __name__ == "__main__":
    main()
