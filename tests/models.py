"""Small models, and inputs for them, that several test files quantize and compile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

import inductor_x86q
from inductor_x86q.graph.reasons import Reason
from inductor_x86q.testing import QLinear
from inductor_x86q.testing import quantize_dequantize as QD

X = torch.randn(4, 32, generator=torch.Generator().manual_seed(5))


class Made(nn.Module):
    """A function of a linear, some buffers and inputs."""

    def __init__(self, function: Callable[..., Any], largest: int = 60, **buffers: torch.Tensor) -> None:
        super().__init__()
        self.function = function
        self.fc = QLinear(32, 48, largest=largest)
        for name, tensor in buffers.items():
            self.register_buffer(name, tensor)

    def forward(self, *inputs: torch.Tensor) -> Any:
        return self.function(self, *inputs)


def reasons(report: Any) -> list[Reason]:
    return [miss.reason for miss in (*report.missed, *report.kept_float)]


class EightBits(nn.Module):
    """Activations to 255 and weights to 127, which only VNNI adds without overflow."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = QLinear(32, 48, largest=127)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(QD(x, 0.01, 128, quant_max=255))


class Net(nn.Module):
    """Two convolutions, the second with a residual sum, and a linear."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding=1)
        self.second = nn.Conv2d(16, 16, 3, padding=1)
        self.head = nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x).relu()
        x = (self.second(x) + x).relu()
        return self.head(x.mean((2, 3)))


def quantized_net() -> fx.GraphModule:
    torch.manual_seed(0)
    x = torch.randn(4, 3, 16, 16)
    return inductor_x86q.quantize(Net().eval(), (x,), calibration=[x], reduce_range=True)


class Residual(nn.Module):
    """A block with a residual addition, a max pool and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.pool = nn.MaxPool2d(2)
        self.head = nn.Linear(8 * 4 * 4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.norm(self.first(x)))
        x = F.relu(self.second(x) + x)
        return self.head(self.pool(x).flatten(1))


def image(batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 3, 8, 8)


def residual() -> Residual:
    torch.manual_seed(0)
    return Residual().eval()


def quantized(model: nn.Module, inputs: tuple[Any, ...], **keywords: Any) -> fx.GraphModule:
    return inductor_x86q.quantize(model, inputs, calibration=[inputs], reduce_range=True, **keywords)


class Quantized(nn.Module):
    """A layer behind a quantized input."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(QD(x))
