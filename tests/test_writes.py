"""Models that write into tensors: into part of a value, and into buffers, which are no constants then."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import inductor_x86q
from inductor_x86q import inspection, testing

F = nn.functional


class Net(nn.Module):
    """Two linears, and a function of them, the input and a buffer."""

    def __init__(self, function: Callable[[Any, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 8)
        self.register_buffer("state", torch.randn(16, 16) / 4)
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(self, x)


def into_a_column(net: Any, x: torch.Tensor) -> torch.Tensor:
    x = net.first(x)
    x[:, 0] = 3.0
    return net.second(x)


def into_a_view(net: Any, x: torch.Tensor) -> torch.Tensor:
    x = net.first(x)
    x.view(-1, 4, 4)[:, 1].fill_(2.0)
    return net.second(x)


def into_an_input(net: Any, x: torch.Tensor) -> torch.Tensor:
    x = x.clone()
    x[:, 0] = 2.0
    return net.second(net.first(x))


def added_to(net: Any, x: torch.Tensor) -> torch.Tensor:
    x = net.first(x)
    net.state.add_(x.mean(0) / 8)
    return x @ net.state


def assigned(net: Any, x: torch.Tensor) -> torch.Tensor:
    x = net.first(x)
    net.state = net.state * 0.5 + x.mean(0)
    return x @ net.state


def multiplied_afterwards(net: Any, x: torch.Tensor) -> torch.Tensor:
    x = net.first(x) @ net.state
    net.state.mul_(0.5)
    return x


def moved_on(net: Any, x: torch.Tensor) -> torch.Tensor:
    net.state.copy_(net.state.roll(1, 0))
    return F.linear(net.first(x), net.state)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("function", [into_a_column, into_a_view, into_an_input])
def test_what_reads_a_value_reads_what_was_written_into_it(function: Any, dynamic: bool) -> None:
    model, x = Net(function).eval(), torch.randn(8, 16)
    q = inductor_x86q.quantize(model, (x,), dynamic=dynamic, **({} if dynamic else {"calibration": [x]}))  # type: ignore[arg-type]
    with torch.no_grad():
        assert testing.snr(q(x), model(x)) > 35
    fused, report = inspection.run_fused(q, (x,))
    assert len(report.fused) == 2
    testing.assert_same(fused, q(x), min_snr=60)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("function", [added_to, assigned, multiplied_afterwards, moved_on])
def test_a_buffer_that_is_written_into_is_no_weight(function: Any, dynamic: bool) -> None:
    """It changes from call to call as the model's does, and quantizing leaves the model's as it was."""
    model, inputs = Net(function).eval(), [torch.randn(8, 16) for _ in range(3)]
    state, own = model.state.clone(), copy.deepcopy(model)
    data = {} if dynamic else {"calibration": inputs}
    q = inductor_x86q.quantize(model, (inputs[0],), dynamic=dynamic, **data)  # type: ignore[arg-type]
    with torch.no_grad():
        for x in inputs:
            assert testing.snr(q(x), own(x)) > 30
    assert torch.equal(model.state, state)
