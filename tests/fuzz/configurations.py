"""Random networks quantized with random configurations: what each layer is to become, worked out apart from the quantizer."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import torch
from torch import nn

from inductor_x86q import LayerConfig
from inductor_x86q.quantization.observers import MeanSquaredErrorObserver

_ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.GELU, nn.SiLU, nn.Hardswish, nn.Identity, nn.Tanh)
_MODES = {
    nn.Conv2d: ("static", "bfloat16", "float"),
    nn.Linear: ("static", "per_tensor", "per_token", "bfloat16", "float"),
}
_OBSERVERS = ("minmax", "histogram", "percentile:99.9", "mse", MeanSquaredErrorObserver)
_OPERATORS = {nn.Conv2d: torch.ops.aten.conv2d, nn.Linear: torch.ops.aten.linear.default}


class Network(nn.Module):
    """Convolutions, then linears, with an activation behind each, some in a residual branch, some read by two."""

    def __init__(self, random: random.Random) -> None:
        super().__init__()
        width = random.choice((8, 12, 16))
        self.convs, self.linears = nn.ModuleList([nn.Conv2d(3, width, 3)]), nn.ModuleList()
        for _ in range(random.randint(1, 3)):
            groups = random.choice((1, 1, 2, width))
            self.convs.append(nn.Conv2d(width, width, 3, padding=1, groups=groups, bias=random.random() < 0.7))
        for _ in range(random.randint(2, 4)):
            self.linears.append(nn.Linear(width, width, bias=random.random() < 0.7))
        count = len(self.convs) + len(self.linears)
        self.activations = nn.ModuleList(random.choice(_ACTIVATIONS)() for _ in range(count))
        self.residual = [number > 0 and random.random() < 0.3 for number in range(count)]
        self.pooled, self.normed = random.random() < 0.3, random.random() < 0.4
        self.norm = nn.LayerNorm(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for number, layer in enumerate((*self.convs, *self.linears)):
            if number == len(self.convs):
                x = (torch.nn.functional.max_pool2d(x, 2) if self.pooled else x).mean((2, 3))
                x = self.norm(x) if self.normed else x
            y = self.activations[number](layer(x))
            x = x + y if self.residual[number] else y
        return x


@dataclasses.dataclass(frozen=True)
class Case:
    model: nn.Module
    config: dict[Any, Any]
    modes: dict[str, str]  # what each layer is to be

    def __str__(self) -> str:
        return f"{self.model}\nresidual={self.model.residual}\nconfig={self.config}\nexpected {self.modes}"


def draw(seed: int) -> Case:
    generator = random.Random(seed)
    torch.manual_seed(seed)
    model = Network(generator).eval()
    layers = {name: type(module) for name, module in model.named_modules() if type(module) in _MODES}
    config: dict[Any, Any] = {}
    modes = dict.fromkeys(layers, "static")

    def say(selector: Any, of: list[str], modes_of: Any) -> None:
        mode = generator.choice(modes_of)
        config[selector] = LayerConfig(mode=mode) if generator.random() < 0.5 else mode
        modes.update({name: mode for name in of})

    if generator.random() < 0.3:
        say("", list(layers), _MODES[nn.Linear])
        # What the whole model is said to be holds where it can: no ranges of convolutions are computed at every call.
        modes.update(
            {name: "float" for name, kind in layers.items() if kind is nn.Conv2d and modes[name].startswith("per")}
        )
    elif generator.random() < 0.6:
        config[""] = generator.choice(_OBSERVERS)
    for kind in _MODES:
        of_kind = [name for name, other in layers.items() if other is kind]
        for selector in (_OPERATORS[kind], kind, f"{of_kind[0].partition('.')[0]}.*"):
            if generator.random() < 0.25:
                say(selector, of_kind, _MODES[kind])
    for name, kind in layers.items():
        if generator.random() < 0.3:
            say(name, [name], _MODES[kind])
        elif name not in config and modes[name] == "static" and generator.random() < 0.2:
            config[name] = LayerConfig(weight="per_tensor")
    shuffled = list(config.items())
    generator.shuffle(shuffled)  # the order says nothing
    return Case(model, dict(shuffled), modes)
