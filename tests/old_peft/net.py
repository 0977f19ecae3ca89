"""A small network with weights that need no random numbers; runs under any PyTorch and any PEFT."""

import torch
from torch import nn


class Config(dict):
    """As much of a transformers config as any release of PEFT asks for."""

    model_type, _name_or_path, tie_word_embeddings = "custom", "org/base", False

    def to_dict(self):
        return {"model_type": "custom"}


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 10), nn.Linear(10, 6)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(torch.tanh(self.q(x)))))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Block(), Block()])
        self.embed, self.config, self.name_or_path = nn.Embedding(2, 2), Config(model_type="custom"), "org/base"

    def forward(self, x):
        for block in self.layers:
            x = block(x)
        return x

    def get_input_embeddings(self):
        return self.embed


def wave(parameter, name, step, size, centre=0.0):
    """Values that depend on the place and the length of the name alone."""
    places = torch.arange(parameter.numel(), dtype=torch.float64)
    return (torch.cos(places * step + len(name)) * size + centre).reshape(parameter.shape).float()


def base():
    """The network, always with the same weights."""
    net = Net().eval()
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            parameter.copy_(wave(parameter, name, 1.3, 0.3))
    return net


def inputs():
    """Two rows."""
    return torch.linspace(-1, 1, 12).reshape(2, 6)
