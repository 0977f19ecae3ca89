"""Adapters as the PEFT at hand writes them: `python make_fixtures.py FOLDER`, run once under each old release.

Beside each lies expected.json: what the network of `net.py` gave with that adapter, in that release.
"""

import json
import sys
from pathlib import Path

import peft
import torch
from net import base, inputs, wave


def save(folder, config):
    model = peft.get_peft_model(base(), config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "ia3_" in name:
                parameter.copy_(wave(parameter, name, 0.7, 0.4, 1.0 if "ia3_" in name else 0.0))
        output = model(inputs())
    model.save_pretrained(folder)
    (folder / "expected.json").write_text(json.dumps({"output": output.tolist()}) + "\n")
    (folder / "README.md").unlink(missing_ok=True)


def main():
    root = Path(sys.argv[1])
    lora = {"r": 2, "lora_alpha": 6, "lora_dropout": 0.1}
    fields = peft.LoraConfig.__dataclass_fields__
    save(root / "lora", peft.LoraConfig(target_modules=["q", "down"], **lora))
    if "rank_pattern" in fields:
        patterns = {"rank_pattern": {"layers.0.q": 3}, "alpha_pattern": {"up": 5}}
        save(root / "lora-patterns", peft.LoraConfig(target_modules=["q", "up"], **lora, **patterns))
    if "use_rslora" in fields:
        save(root / "rslora", peft.LoraConfig(target_modules=["q", "up"], use_rslora=True, **lora))
    if hasattr(peft, "IA3Config"):
        save(root / "ia3", peft.IA3Config(target_modules=["q", "down"], feedforward_modules=["down"]))


if __name__ == "__main__":
    main()
