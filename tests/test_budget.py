"""quantize(max_drop=…): within the budget with few layers moved, and clear about metrics and budgets that cannot be."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

import inductor_x86q
from inductor_x86q import QuantizationError


class Hard(nn.Module):
    """Plain convolutions, and a small depthwise one in the middle with channels whose ranges are apart by 1,000 times.

    A silu keeps the channels from being scaled, so that corrections alone do not meet the budget.
    """

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.stem = nn.Conv2d(3, 32, 3)
        self.body = nn.Conv2d(32, 32, 3)
        self.narrow = nn.Conv2d(32, 32, 1)
        self.depthwise = nn.Conv2d(32, 32, 3, groups=32)
        self.wide = nn.Conv2d(32, 32, 3)
        self.head = nn.Linear(32, 8)
        factors = torch.logspace(-3, 0, 32)
        with torch.no_grad():
            self.narrow.weight *= factors[:, None, None, None]
            self.narrow.bias *= factors  # type: ignore[operator]
            self.depthwise.weight /= factors[:, None, None, None]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.body(torch.relu(self.stem(x))))
        x = torch.relu(self.depthwise(nn.functional.silu(self.narrow(x))))
        return self.head(torch.relu(self.wide(x)).mean((2, 3)))


DATA = [torch.randn(8, 3, 12, 12, generator=torch.Generator().manual_seed(n)) for n in range(3)]


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return Hard().eval()


def tuned(model: nn.Module, **keywords: Any) -> Any:
    return inductor_x86q.quantize(model, (DATA[0],), **{"calibration": DATA, **keywords})


def refusal(model: nn.Module, **keywords: Any) -> str:
    with pytest.raises(QuantizationError) as raised:
        tuned(model, **keywords)
    return str(raised.value)


def closeness(model: nn.Module) -> Any:
    """1 less the error, of what differs between inputs: most of the outputs are the same for all."""
    with torch.no_grad():
        expected = model(DATA[0])
    differing = (expected - expected.mean(0)).norm()
    return lambda module: 1 - float((module(DATA[0]) - expected).norm() / differing)


def test_a_hard_network_meets_the_budget(model: nn.Module) -> None:
    """The layer that does the harm goes to float32, and hardly any multiply-accumulates with it."""
    validate = closeness(model)
    graph = tuned(model, validate=validate, max_drop=0.05)
    tuning = graph.tuning
    assert tuning.int8_metric < tuning.float_metric - 0.05, "the default is to fail"
    assert tuning.metric >= tuning.float_metric - 0.05
    assert tuning.metric == pytest.approx(validate(graph))
    assert tuning.moved[0].layer == "depthwise" and 0 < tuning.share_of_macs <= 0.1
    assert tuning.evaluations <= 8
    assert "depthwise: float32" in str(tuning)


def test_a_budget_that_int8_meets_moves_nothing(model: nn.Module) -> None:
    graph = tuned(model, validate=lambda module: 0.5, max_drop=0)
    assert graph.tuning.moved == () and graph.tuning.evaluations == 2
    assert "every layer is in int8" in str(graph.tuning)


def test_without_a_metric_it_is_the_noise(model: nn.Module) -> None:
    graph = tuned(model, max_drop=0.003, accuracy="bias")
    assert graph.tuning.float_metric == 1 and graph.tuning.metric >= 0.997
    assert not graph.tuning.corrected  # what is asked for is kept


def test_a_budget_out_of_reach(model: nn.Module) -> None:
    text = refusal(model, validate=lambda module: float(module is model), max_drop=0.1)
    assert "no choice of layers is within max_drop=0.1" in text and "float model has 1" in text


def test_metrics_that_are_none(model: nn.Module) -> None:
    def broken(module: nn.Module) -> float:
        raise KeyError("labels")

    assert "validate failed for the float model: KeyError" in refusal(model, validate=broken, max_drop=0.1)
    assert "gave nan for the float model" in refusal(model, validate=lambda module: math.nan, max_drop=0.1)
    assert "a tensor of shape (2,)" in refusal(model, validate=lambda module: torch.ones(2), max_drop=0.1)
    assert "gave a str" in refusal(model, validate=lambda module: "good", max_drop=0.1)
    assert tuned(model, validate=lambda module: torch.tensor(0.5), max_drop=0.1).tuning.metric == 0.5


def test_arguments(model: nn.Module) -> None:
    assert "expected a number, at least 0" in refusal(model, max_drop=-1)
    assert "without max_drop" in refusal(model, validate=lambda module: 1.0)
    assert "expected a function of a module" in refusal(model, validate=3, max_drop=0.1)


def test_an_interrupt_keeps_what_was_found(model: nn.Module) -> None:
    inner, calls = closeness(model), []

    def validate(module: nn.Module) -> float:
        calls.append(module)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return inner(module) if len(calls) != 5 else 1.0  # with two layers moved

    with pytest.warns(UserWarning, match="interrupted"):
        graph = tuned(model, validate=lambda module: min(validate(module), 1.0), max_drop=1e-6)
    assert graph.tuning.metric == 1.0
