"""quantize(max_drop=…): within the budget with few layers moved, and clear about metrics and budgets that cannot be."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

import inductor_x86q
from inductor_x86q import BudgetError, QuantizationError, cpu
from inductor_x86q.accuracy import costs
from inductor_x86q.report import Report

HALF = "bfloat16" if cpu.has_bf16() else "float32"


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


class Outliers(nn.Module):
    """Linears, and one in the middle that reads a few features 300 times as large as the others; a gelu keeps them there."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.stem, self.body = nn.Linear(64, 192), nn.Linear(192, 64)
        self.up, self.down = nn.Linear(64, 32), nn.Linear(32, 24)
        self.wide, self.head = nn.Linear(24, 256), nn.Linear(256, 16)
        with torch.no_grad():
            self.up.weight[:3] *= 300
            self.down.weight[:, :3] /= 300

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.body(torch.relu(self.stem(x.flatten(1)[:, :64]))))
        x = torch.relu(self.down(nn.functional.gelu(self.up(x))))
        return self.head(torch.relu(self.wide(x)))


DATA = [torch.randn(8, 3, 12, 12, generator=torch.Generator().manual_seed(n)) for n in range(3)]


@pytest.fixture(autouse=True)
def untimed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without compiling, where the times are not what the test is about."""
    if "timed" not in request.keywords:
        monkeypatch.setattr(costs, "microseconds", lambda *arguments: ({}, 0.0))


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return Hard().eval()


def tuned(model: nn.Module, **keywords: Any) -> Any:
    """With 8 bits on every CPU: the networks are as hard as they are to be, and the search runs them eagerly."""
    return inductor_x86q.quantize(model, (DATA[0],), **{"calibration": DATA, "reduce_range": False, **keywords})


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


class Product(nn.Module):
    """A layer whose weight has its inputs first."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(24, 40))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight


class Kinds(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.up = nn.Conv2d(4, 8, 3, padding=1), nn.ConvTranspose2d(8, 6, 2, 2)
        self.linear, self.product = nn.Linear(6, 24), Product()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.product(torch.relu(self.linear(torch.relu(self.up(torch.relu(self.conv(x)))).movedim(1, -1))))


def test_multiply_accumulates_of_each_layer() -> None:
    """Of an open batch those of the one at hand; of a transposed convolution each input's with each tap."""
    x = torch.randn(3, 4, 5, 5)
    q = inductor_x86q.quantize(Kinds().eval(), (x,), calibration=[x])
    pixels = 3 * 5 * 5
    expected = {
        "conv": pixels * 8 * 4 * 9,
        "up": pixels * 8 * 6 * 4,
        "linear": 4 * pixels * 24 * 6,
        "product": 4 * pixels * 24 * 40,
    }
    assert costs.macs(q, (x,)) == expected
    report = inductor_x86q.explain(q, (x,))
    reported = {fusion.layer: fusion.macs for fusion in report.fused}
    assert not report.missed and reported == {
        **reported,
        **{name: expected[name] for name in ("conv", "linear", "product")},
    }


@pytest.mark.parametrize(("max_drop", "dtype"), [(0.05, "float32"), (0.32, HALF)])
def test_a_hard_network_meets_the_budget(model: nn.Module, max_drop: float, dtype: str) -> None:
    """The layer that does the harm leaves int8, and hardly any multiply-accumulates with it."""
    validate = closeness(model)
    graph = tuned(model, validate=validate, max_drop=max_drop)
    tuning = graph.tuning
    assert tuning.int8_metric < tuning.float_metric - 3 * max_drop, "the default is to fail"
    assert tuning.metric >= tuning.float_metric - max_drop
    assert tuning.metric == pytest.approx(validate(graph))
    assert tuning.moved[0].layer == "depthwise" and 0 < tuning.share_of_macs <= 0.1
    assert {moved.dtype for moved in tuning.moved} == {dtype} and tuning.evaluations <= 12
    assert [step.metric for step in tuning.steps].count(tuning.metric) and tuning.steps[0].what == "int8"
    again = tuned(model, **tuning.arguments)
    assert validate(again) == pytest.approx(tuning.metric)
    assert f"], config={{'depthwise': '{dtype[:5]}" in str(tuning) and "accuracy=['" in str(tuning)


def test_outlier_features_meet_the_budget() -> None:
    net = Outliers().eval()
    validate = closeness(net)
    tuning = tuned(net, validate=validate, max_drop=0.11).tuning
    assert tuning.int8_metric < 0 and tuning.metric >= 1 - 0.11
    assert [moved.layer for moved in tuning.moved] == ["down"] and 0 < tuning.share_of_macs <= 0.1
    assert tuning.after.output > tuning.before.output + 3


def test_float32_where_bfloat16_is_not_enough(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """The metric allows no bfloat16; and a CPU without instructions for it is not asked to try."""
    inner = closeness(model)

    def validate(module: nn.Module) -> float:
        return 0.0 if any(x.dtype == torch.bfloat16 for x in module.state_dict().values()) else inner(module)

    monkeypatch.setattr(cpu, "has_bf16", lambda: True)
    tuning = tuned(model, validate=validate, max_drop=0.05).tuning
    assert {moved.dtype for moved in tuning.moved} == {"float32"} and tuning.metric >= 0.95
    tried = [step.what for step in tuning.steps]
    assert "4 in bfloat16" in tried and "1 in float32" in tried
    monkeypatch.setattr(cpu, "has_bf16", lambda: False)
    tuning = tuned(model, validate=validate, max_drop=0.05).tuning
    assert {moved.dtype for moved in tuning.moved} == {"float32"} and not any("bf" in s.what for s in tuning.steps)


def test_most_harm_for_its_time_first(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two layers that do harm the one that costs less is moved first, and the rest of the ladder has times."""
    times = iter([({"depthwise": 10.0, "wide": 10.0}, 50.0), ({"depthwise": 5010.0, "wide": 10.1}, 9e4)])
    monkeypatch.setattr(costs, "microseconds", lambda *arguments: next(times))
    monkeypatch.setattr(cpu, "has_bf16", lambda: False)
    tuning = tuned(model, validate=closeness(model), max_drop=0.32, accuracy="bias").tuning
    names = [moved.layer for moved in tuning.moved]
    assert names.index("wide") < names.index("depthwise")
    wide = tuning.moved[names.index("wide")]
    assert wide.int8_microseconds == 10 and wide.microseconds == 10.1
    assert tuning.steps[0].milliseconds == 0.05 and max(step.milliseconds for step in tuning.steps) > 5


@pytest.mark.timed
@pytest.mark.skipif(not cpu.has_vnni(), reason="8 bits overflow without VNNI, and are float in compiled code")
def test_times_are_those_of_compiled_layers(model: nn.Module) -> None:
    tuning = tuned(model, validate=closeness(model), max_drop=0.32, accuracy="bias").tuning
    first = tuning.moved[0]
    assert first.layer == "depthwise" and first.int8_microseconds > 0 and first.microseconds > 0
    assert all(step.milliseconds > 0 for step in tuning.steps)


def test_reports_show_it(model: nn.Module) -> None:
    graph = tuned(model, validate=closeness(model), max_drop=0.32)
    report = inductor_x86q.explain(graph, (DATA[0],), drift=model)
    assert report.tuning == graph.tuning and Report.from_json(report.to_json()) == report
    before, after = graph.tuning.before, graph.tuning.after
    text, page = str(report), report.to_html()
    assert f"drift at the output: {before.output:.1f} dB before, {after.output:.1f} dB after" in text
    assert "depthwise" in text[text.index("within a budget") :] and HALF in text
    alone = {x.layer: x.alone for x in before.layers}["depthwise"]
    assert f"<td>depthwise<td>{alone:.1f} dB<td>not in int8" in page.replace("</td>", "").replace("</tr>", "")
    assert f"<td>depthwise</td><td>{HALF}</td>" in page


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
    with pytest.raises(BudgetError):
        tuned(model, validate=lambda module: float(module is model), max_drop=0.1)


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


def test_what_config_says_of_a_layer_gives_way(model: nn.Module) -> None:
    """A layer that config names is moved all the same, and data that can be read once is."""
    config = {"depthwise": "percentile:99.9", "": "minmax"}
    tuning = tuned(model, validate=closeness(model), max_drop=0.32, config=config, calibration=iter(DATA)).tuning
    assert tuning.moved[0].layer == "depthwise" and tuning.metric >= 0.68


def test_an_interrupt_keeps_what_was_found(model: nn.Module) -> None:
    inner, calls = closeness(model), []

    def validate(module: nn.Module) -> float:
        calls.append(module)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return inner(module) if len(calls) != 5 else 1.0  # with two layers moved

    with pytest.warns(UserWarning, match="interrupted"):
        graph = tuned(model, validate=lambda module: min(validate(module), 1.0), max_drop=1e-6)
    assert graph.tuning.metric == 1.0 and graph.tuning.interrupted and "interrupted" in str(graph.tuning)
    assert len(graph.tuning.moved) == 2
