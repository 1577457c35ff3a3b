"""Quantized graphs by other conventions than ours: the right numbers, in int8, or in float with a reason in the report."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from inductor_x86q import inspection, testing
from inductor_x86q.graph import operators
from inductor_x86q.graph.reasons import Reason
from inductor_x86q.inductor import uncompiled
from inductor_x86q.testing import QConv2d
from inductor_x86q.testing import quantize_dequantize as QD
from tests.models import Made, X, reasons

decomposed = torch.ops.quantized_decomposed
RANDOM = torch.Generator().manual_seed(6)
W = torch.randint(-60, 60, (48, 32), dtype=torch.int8, generator=RANDOM)
S = torch.rand(48, generator=RANDOM) * 0.01 + 0.001
Z = torch.zeros(48, dtype=torch.int64)


def weight(low: int = -128, high: int = 127, dtype: torch.dtype = torch.int8, **buffers: Any) -> Made:
    def function(m: Any, x: torch.Tensor) -> torch.Tensor:
        zero_points = m.z if "z" in buffers else None
        return nn.functional.linear(
            QD(x), decomposed.dequantize_per_channel(m.w, m.s, zero_points, 0, low, high, dtype)
        )

    return Made(function, **buffers)


def activation(*arguments: Any, **keywords: Any) -> Made:
    return Made(lambda m, x: m.fc(QD(x, *arguments, **keywords)))


def output(*arguments: Any, **keywords: Any) -> Made:
    return Made(lambda m, x: QD(m.fc(QD(x)), *arguments, **keywords))


NAN, INFINITY = float("nan"), float("inf")
FLOAT8 = {"dtype": torch.float8_e4m3fn, "quant_min": -448, "quant_max": 448}
ROWS, COLUMNS = torch.full((4, 1), 0.02), torch.full((32,), 0.02)

CONVENTIONS: dict[str, tuple[nn.Module, list[Reason]]] = {
    "scale NaN": (activation(NAN), [Reason.BAD_PARAMETERS]),
    "scale infinite": (activation(INFINITY), [Reason.BAD_PARAMETERS]),
    "scale negative": (activation(-0.02), [Reason.BAD_PARAMETERS]),
    "scale NaN at an output": (output(NAN), []),
    "scale negative at an output": (output(-0.02), []),
    "scale tiny": (activation(1e-42), []),
    "zero point outside the type": (activation(0.02, 300), [Reason.BAD_PARAMETERS]),
    "lower bound above the upper": (activation(quant_min=100, quant_max=20), []),
    "lower bound above the upper at an output": (output(quant_min=100, quant_max=20), []),
    "int16": (activation(0.02, 0, dtype=torch.int16, quant_min=-1000, quant_max=1000), [Reason.ACTIVATION_TYPE]),
    "int32": (activation(0.02, 0, dtype=torch.int32, quant_min=-1000, quant_max=1000), [Reason.ACTIVATION_TYPE]),
    "float8": (activation(0.02, 0, **FLOAT8), [Reason.ACTIVATION_TYPE]),
    "an activation with a scale a channel": (
        Made(lambda m, x: m.fc(decomposed.dequantize_per_channel(
            decomposed.quantize_per_channel(x, m.s, m.z, 1, 0, 127, torch.uint8), m.s, m.z, 1, 0, 127, torch.uint8)),
            s=COLUMNS, z=torch.full((32,), 60)), [Reason.ACTIVATION_TYPE]),
    "quantize and dequantize that differ": (
        Made(lambda m, x: m.fc(decomposed.dequantize_per_tensor(
            decomposed.quantize_per_tensor(x, 0.02, 60, 0, 127, torch.uint8), 0.03, 10, 0, 127, torch.uint8))), []),
    "tensors of type quint8": (
        Made(lambda m, x: m.fc(torch.dequantize(torch.quantize_per_tensor(x, 0.02, 60, torch.quint8)))),
        [Reason.ACTIVATION_NOT_QUANTIZED]),
    "fake quantize": (
        Made(lambda m, x: m.fc(torch.fake_quantize_per_tensor_affine(x, 0.02, 60, 0, 127))),
        [Reason.ACTIVATION_NOT_QUANTIZED]),
    "weight without zero points": (weight(w=W, s=S), []),
    "weight with a scale of 0": (weight(w=W, s=S * 0, z=Z), []),
    "weight with scale NaN": (weight(w=W, s=S * NAN, z=Z), [Reason.BAD_PARAMETERS]),
    "weight with negative scales": (weight(w=W, s=-S, z=Z), [Reason.BAD_PARAMETERS]),
    "weight in uint8": (
        weight(0, 255, torch.uint8, w=(W.int() + 100).to(torch.uint8), s=S, z=Z), [Reason.WEIGHT_TYPE]),
    "weight in int32": (weight(-128, 127, torch.int32, w=W.int(), s=S, z=Z), [Reason.WEIGHT_TYPE]),
    "weight in groups": (
        Made(lambda m, x: nn.functional.linear(QD(x), decomposed.dequantize_per_channel_group(
            m.w, m.s, m.z, -128, 127, torch.int8, 8, torch.float32)),
            w=W, s=torch.rand(48, 4) * 0.01, z=torch.zeros(48, 4, dtype=torch.int64)), [Reason.WEIGHT_NOT_QUANTIZED]),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize("name", CONVENTIONS)
def test_conventions(name: str) -> None:
    """The right numbers, in int8 where the list of reasons is empty and else in float for the reason named."""
    module, expected = CONVENTIONS[name]
    with torch.no_grad():
        reference = module(X)
    result, report = inspection.run_fused(module, (X,))
    assert reasons(report) == expected and len(report.fused) == (0 if expected else 1)
    torch.testing.assert_close(result, reference, equal_nan=True, rtol=1e-5, atol=1e-5 * _largest(reference))


def _largest(tensor: torch.Tensor) -> float:
    finite = tensor[tensor.isfinite()]
    return float(finite.abs().max()) if finite.numel() else 1.0


# What is legal and odd, of which a rule that forgets it gives other numbers or fails.
ODD: dict[str, nn.Module] = {
    "a negative scale, relu": Made(lambda m, x: torch.relu(QD(x, -0.02, 60))),
    "a negative scale, max pool": Made(lambda m, x: nn.functional.max_pool1d(QD(x, -0.02, 60), 2)),
    "a zero point above the range, relu": Made(lambda m, x: torch.relu(QD(x, 0.02, 300, quant_max=255))),
    "a zero point outside of 16 bits": Made(lambda m, x: QD(m.fc(QD(x)), 0.02, 100_000)),
    "a lower bound above the upper one": Made(lambda m, x: torch.clamp(m.fc(QD(x)), 1.0, 0.5)),
    "padding with infinity, max pool": Made(
        lambda m, x: nn.functional.max_pool1d(nn.functional.pad(QD(x), (1, 1), value=-math.inf), 2)
    ),
    "a cat of floats and integers": Made(lambda m, x: QD(torch.cat([torch.relu(x), (x > 0).long()], 1))),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_graphs(name: str) -> None:
    with torch.no_grad():
        reference = ODD[name](X)
    result, _ = inspection.run_fused(ODD[name], (X,))
    testing.assert_same(result, reference)


class All(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.graphs = nn.ModuleList(ODD.values())

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [graph(x) for graph in self.graphs]


def test_odd_graphs_compiled() -> None:
    testing.assert_close_to_reference(All(), (X,))


@pytest.mark.parametrize("rows", [(1,), (48,)], ids=["of the tensor", "of each output"])
def test_a_constant_weight_whose_scale_is_computed(rows: tuple[int, ...]) -> None:
    def product(m: Any, x: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        if len(s) == 1:
            weight = decomposed.dequantize_per_tensor(m.w, s, m.z[:1], -128, 127, torch.int8)
        else:
            weight = decomposed.dequantize_per_channel(m.w, s, m.z, 0, -128, 127, torch.int8)
        return nn.functional.linear(QD(x), weight)

    module, scale = Made(product, w=W, z=Z), torch.full(rows, 0.01)
    with torch.no_grad():
        reference = module(X, scale)
    done = testing.compile_once(module, (X, scale))
    assert not done.report.fused and len(done.report.missed) == 1
    testing.assert_same(done.outputs, reference)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (activation(0.0), "quantize_per_tensor in layer .* has a scale of 0: calibrate again"),
        (activation(quant_min=-5, quant_max=300), "the range -5 to 300, which torch.uint8 does not hold"),
    ],
    ids=["scale of 0", "range outside the type"],
)
def test_meaningless_parameters(module: nn.Module, message: str) -> None:
    with pytest.raises(Exception, match=message):
        inspection.run_fused(module, (X,))


def test_weight_is_an_argument() -> None:
    """Even where a module that was compiled before holds the very tensor: the next call may pass another."""

    def product(m: Any, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(QD(x), decomposed.dequantize_per_channel(w, m.s, m.z, 0, -128, 127, torch.int8))

    inspection.run_fused(weight(w=W, s=S, z=Z), (X,))
    module = Made(product, s=S, z=Z)
    report = inspection.explain(module, (X, W))
    assert reasons(report) == [Reason.WEIGHT_NOT_CONSTANT]
    run = torch.compile(module, backend=_uncompiled)
    with torch.no_grad():
        for w in (W, W.flip(0)):
            torch.testing.assert_close(run(X, w), module(X, w))


def _uncompiled(graph_module: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
    from inductor_x86q.backend import compile_graph, settings

    return compile_graph(graph_module, inputs, settings(None, None), inner_compile=uncompiled.run_uncompiled)


def test_kernel_refuses_at_run_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the tables promise what the library turns down, its error comes out; the process and the next call go on."""

    class Gelu(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = QConv2d(3, 16, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.gelu(self.conv(QD(x)))

    inputs = (torch.randn(1, 3, 5, 5),)
    with monkeypatch.context() as patch:
        patch.setattr(operators, "takes", lambda kernel, name, after_addition=False: name == "gelu")
        with pytest.raises(RuntimeError, match="gelu"):
            inspection.run_fused(Gelu(), inputs)
    torch._dynamo.reset()
    result, report = inspection.run_fused(Gelu(), inputs)
    assert report.fused[0].absorbed == ()
    with torch.no_grad():
        torch.testing.assert_close(result, Gelu()(*inputs))
