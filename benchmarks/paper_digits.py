"""Merge convolutional experts over disjoint classes: an experiment of `paper.py`. Needs scikit-learn, the extra `paper`.

A small residual network is trained on a few scans of all ten digits. Then one expert for each pair of digits, LoRA on every
convolution, is trained on noisy scans of its two digits alone; the network's last layer stays as it is. The experts are merged
from files and loaded by PEFT. Accuracy is counted among the two digits of the expert, and among all ten.
"""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from paper_judge import Sizes, mean
from torch import Tensor, nn
from torch.nn import functional

import ties_peft

GROUPS = ((0, 1), (2, 3), (4, 5), (6, 7), (8, 9))
WIDTH = 32
FEW = 100  # rows that the base is trained on
TRAIN, VALIDATION = 1000, 200  # rows of the experts, rows for nothing but choosing; the others are for testing
NOISE = 0.35
RANK = 4
METHODS = ("average", "task_arithmetic", "ties", "dare", "auto")


class Block(nn.Module):
    """Two convolutions beside the identity."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = (nn.Conv2d(width, width, 3, padding=1) for _ in range(2))
        self.norms = nn.ModuleList(nn.GroupNorm(4, width) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """Return x plus what the convolutions make of it."""
        inner = functional.relu(self.norms[0](self.first(x)))
        return functional.relu(x + self.norms[1](self.second(inner)))


class Network(nn.Module):
    """A residual network for images of 8 × 8."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, WIDTH, 3, padding=1)
        self.blocks = nn.ModuleList(Block(WIDTH) for _ in range(3))
        self.head = nn.Linear(WIDTH, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits, (rows, 10)."""
        x = functional.relu(self.stem(x))
        for place, block in enumerate(self.blocks):
            x = block(x if place == 0 else functional.max_pool2d(x, 2))
        return self.head(x.mean((2, 3)))


class Images(NamedTuple):
    """Images (rows, 1, 8, 8) and their digits."""

    x: Tensor
    y: Tensor

    def of(self, digits: Sequence[int]) -> Images:
        """Return those of some digits."""
        chosen = torch.isin(self.y, torch.tensor(digits))
        return Images(self.x[chosen], self.y[chosen])


def read_images(seed: int) -> dict[str, Images]:
    """Return clean rows for the base, and noisy ones to train experts, to choose by and to test on; no row is in two of them."""
    from sklearn.datasets import load_digits

    scans = load_digits()
    draw = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(scans.target), generator=draw)
    x = torch.tensor(scans.images, dtype=torch.float32).unsqueeze(1)[order] / 16
    noisy = x + NOISE * torch.randn(x.shape, generator=draw)
    y = torch.tensor(scans.target)[order]
    edges = (0, FEW, FEW + TRAIN, FEW + TRAIN + VALIDATION, len(y))
    names = ("base", "train", "validation", "test")
    parts = zip(names, edges[:-1], edges[1:], strict=True)
    return {name: Images((x if name == "base" else noisy)[a:b], y[a:b]) for name, a, b in parts}


def train(model: nn.Module, images: Images, digits: Sequence[int], epochs: int, rate: float, seed: int) -> None:
    """Train the parameters that want it, by the cross-entropy among some digits."""
    draw = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], rate)
    places = torch.tensor([list(digits).index(int(one)) for one in images.y])
    model.train()
    with torch.enable_grad():
        for _ in range(epochs):
            for rows in torch.randperm(len(places), generator=draw).split(50):
                loss = functional.cross_entropy(model(images.x[rows])[:, list(digits)], places[rows])
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
    model.eval()


def expert(base: nn.Module, images: Images, digits: Sequence[int], epochs: int, seed: int, folder: Path) -> Path:
    """Train a LoRA of the base's convolutions and save it."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=r"stem|blocks\.\d+\.(first|second)")
    model = get_peft_model(copy.deepcopy(base), config)
    train(model, images.of(digits), digits, epochs, 1e-3, seed)
    model.save_pretrained(folder)
    return folder


@torch.no_grad()
def judged(
    base: nn.Module, folder: Path | None, images: Images, groups: Sequence[Sequence[int]]
) -> tuple[float, float]:
    """Return the mean over groups of the accuracy among the group's own digits, and among all ten, in percent."""
    from peft import PeftModel

    model = base if folder is None else PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()
    own, whole = [], []
    for digits in groups:
        chosen = images.of(digits)
        logits = model(chosen.x)
        among = torch.tensor(digits)[logits[:, list(digits)].argmax(-1)]
        own.append(100 * float((among == chosen.y).double().mean()))
        whole.append(100 * float((logits.argmax(-1) == chosen.y).double().mean()))
    return mean(own), mean(whole)


def run(seed: int, epochs: int) -> dict[str, tuple[float, float]]:
    """Train base and experts with one seed; return the accuracies of each way."""
    images = read_images(seed)
    torch.manual_seed(seed)
    base = Network()
    train(base, images["base"], range(10), 2 * epochs, 3e-3, seed)
    base.requires_grad_(False)
    test = images["test"]
    with tempfile.TemporaryDirectory() as work, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        place = Path(work)
        experts = [expert(base, images["train"], digits, epochs, seed, place / str(digits[0])) for digits in GROUPS]
        each = [judged(base, path, test, [digits]) for path, digits in zip(experts, GROUPS, strict=True)]
        found = {"base": judged(base, None, test, GROUPS)}
        found["own expert of each pair"] = (mean(one[0] for one in each), mean(one[1] for one in each))
        for method in METHODS:
            ties_peft.merge(experts, method, rank="max").save(place / method)
            found[method] = judged(base, place / method, test, GROUPS)
        together = expert(base, images["train"], range(10), epochs, seed, place / "together")
        found["one LoRA trained on all ten"] = judged(base, together, test, GROUPS)
    return found


def table(sizes: Sizes) -> dict[str, Any]:
    """Return the accuracies, the mean over the seeds."""
    runs = [run(seed, sizes.epochs) for seed in range(sizes.seeds)]
    lines = [
        {"way": way, "among its two": mean(one[way][0] for one in runs), "among all ten": mean(one[way][1] for one in runs)}
        | {"lowest": min(one[way][0] for one in runs), "highest": max(one[way][0] for one in runs)}
        for way in runs[0]
    ]  # fmt: skip
    return {"seeds": sizes.seeds, "epochs": sizes.epochs, "noise": NOISE, "rows": lines}
