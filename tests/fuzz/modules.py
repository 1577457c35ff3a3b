"""Random recurrent modules of torch, and in which way each is quantized."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import torch
from torch import nn

from inductor_x86q.graph.reasons import Reason

_LAYERS = (nn.LSTM, nn.GRU, nn.RNN)
_CELLS = (nn.LSTMCell, nn.GRUCell, nn.RNNCell)
WAYS = ("static", "per_tensor", "per_token")


class Network(nn.Module):
    """Recurrent layers one after the other, or a cell that is called at each step, and a linear."""

    def __init__(self, random: random.Random) -> None:
        super().__init__()
        self.batch_first, self.states_read = random.random() < 0.5, random.random() < 0.5
        self.given, self.last = random.random() < 0.3, random.random() < 0.3
        self.width = width = random.choice((3, 8, 20))
        self.layers, self.cell = nn.ModuleList(), None
        if random.random() < 0.25:
            kind, hidden = random.choice(_CELLS), random.choice((4, 9, 16))
            self.cell, width = kind(width, hidden, bias=random.random() < 0.7), hidden
        for _ in range(0 if self.cell is not None else random.choice((1, 1, 2))):
            kind, hidden, ways = random.choice(_LAYERS), random.choice((1, 4, 9, 16, 33)), random.choice((1, 2))
            options: dict[str, Any] = dict(num_layers=random.choice((1, 1, 2, 3)), bidirectional=ways == 2)
            options |= dict(bias=random.random() < 0.7, batch_first=self.batch_first)
            if kind is nn.RNN:
                options["nonlinearity"] = random.choice(("tanh", "relu"))
            self.layers.append(kind(width, hidden, **options))
            width = ways * hidden
        self.head = nn.Linear(width, 5)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        results = []
        for layer in self.layers:
            x, states = layer(x, self._states(layer, x)) if self.given else layer(x)
            if self.states_read:
                results += [*states] if isinstance(states, tuple) else [states]
        if self.cell is not None:
            x = self._steps(x)
        if self.last:
            x = x[:, -1] if self.batch_first else x[-1]
        return (self.head(x), *results)

    def _states(self, layer: Any, x: torch.Tensor) -> Any:
        rows = layer.num_layers * (1 + layer.bidirectional)
        state = torch.full((rows, x.shape[0 if self.batch_first else 1], layer.hidden_size), 0.25)
        return (state, 2 * state) if isinstance(layer, nn.LSTM) else state

    def _steps(self, x: torch.Tensor) -> torch.Tensor:
        axis, state, found = int(self.batch_first), None, []
        for step in x.unbind(axis):
            state = self.cell(step, state)  # type: ignore[misc]
            found.append(state[0] if isinstance(state, tuple) else state)
        return torch.stack(found, axis)


@dataclasses.dataclass(frozen=True)
class Case:
    network: Network
    inputs: tuple[torch.Tensor, ...]
    way: str

    def options(self) -> dict[str, Any]:
        """Of `quantize`."""
        return {"calibration": [self.inputs]} if self.way == "static" else {"dynamic": self.way}

    @property
    def reasons(self) -> frozenset[Reason]:
        """For which something may stay float: products of one row may be so small that Inductor takes them apart."""
        rows = self.inputs[0].shape[0 if self.network.batch_first else 1]
        return frozenset({Reason.NO_KERNEL} if rows == 1 else ())

    def __str__(self) -> str:
        flags = {
            name: value for name, value in vars(self.network).items() if isinstance(value, bool) and name[0] != "_"
        }
        return f"{self.network}\n{flags}\n{tuple(self.inputs[0].shape)}, {self.way}"


def draw(seed: int) -> Case:
    generator = random.Random(seed)
    torch.manual_seed(seed)
    network = Network(generator).eval()
    shape = (generator.choice((1, 2, 3, 5)), generator.choice((1, 2, 4, 7)), network.width)
    return Case(network, (torch.randn(shape),), generator.choice(WAYS))
