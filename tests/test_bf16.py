"""int8 under autocast to bfloat16: types of the fused calls and what stands between them, with and without bf16 kernels.

On a CPU without bf16 instructions oneDNN's reference kernels give bf16, slowly: they make up for it here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

from inductor_x86q import cpu, testing
from inductor_x86q.backend import compile_graph, settings
from inductor_x86q.graph.calls import is_call, read
from inductor_x86q.inductor import dynamo, uncompiled
from inductor_x86q.report import Report
from inductor_x86q.testing import QConv2d, QLinear, quantize_dequantize

QD = quantize_dequantize
CONVERT = torch.ops.prims.convert_element_type.default
BF16, FP32, U8 = torch.bfloat16, torch.float32, torch.uint8


class Net(nn.Module):
    """A residual block with pointwise operators between int8 regions, and a head that reads it flattened."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv, self.last = QConv2d(8, 8, 3, padding=1), QConv2d(8, 8, 3, padding=1), QConv2d(8, 8, 1)
        self.fc, self.head = QLinear(8 * 36, 16), QLinear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.stem(QD(x)))
        y = self.conv(QD(x, 0.02, 0)) + x  # the other operand is bf16
        y = F.max_pool2d(torch.sin(y), 1)
        z = F.hardswish(self.last(QD(y)))
        z = self.fc(QD(z).flatten(1))
        return z + self.head(QD(F.gelu(z)))


class Mixed(nn.Module):
    """A residual stream that stays float32."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = QLinear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.fc(QD(x))


IMAGE, ROWS = (torch.randn(2, 8, 6, 6).contiguous(memory_format=torch.channels_last),), (torch.randn(4, 16),)


def fused(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[list[Any], list[Any], Report]:
    """Under autocast: what the calls give and what values are converted to after fusing, and the report.

    The fused graph, run without compiling it, is held against the q/dq graph under the same autocast.
    """
    report = Report([], [], [])
    types: list[Any] = []
    conversions: list[Any] = []
    q = testing.qdq_graph(module, inputs)

    def observe(stage: str, graph: fx.Graph) -> None:
        if stage == "fuse: output types":
            types.extend(read(node).output_dtype for node in graph.nodes if is_call(node))
            conversions.extend(node.args[1] for node in graph.nodes if node.target is CONVERT)

    def backend(graph_module: fx.GraphModule, arguments: list[Any]) -> Callable[..., Any]:
        return compile_graph(graph_module, arguments, settings(None, None), on_report=report.extend, observe=observe,
                             inner_compile=uncompiled.run_uncompiled)  # fmt: skip

    with torch.no_grad(), torch.autocast("cpu", BF16):
        testing.assert_same(dynamo.compile_fresh(q, backend)(*inputs), q(*inputs), min_snr=30)
    return types, conversions, report


def test_bf16_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not quantized is bf16, between calls and pointwise operators alike: nothing is converted."""
    monkeypatch.setattr(cpu, "has_bf16", lambda: True)
    types, conversions, report = fused(Net(), IMAGE)
    assert types == [BF16, BF16, U8, BF16, BF16]
    assert conversions == []
    assert [fusion.absorbed for fusion in report.fused] == [
        ("relu",),
        ("add",),
        ("hardswish", "quantize"),
        (),
        ("add",),
    ]
    assert not report.missed and not report.notes


def test_no_bf16_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls give float32; it is rounded to bf16 where the model has it so, and nowhere widened again."""
    monkeypatch.setattr(cpu, "has_bf16", lambda: False)
    types, conversions, report = fused(Net(), IMAGE)
    assert types == [FP32, FP32, U8, FP32, FP32]
    assert set(conversions) == {BF16}
    assert [fusion.absorbed for fusion in report.fused] == [
        ("relu",),
        ("add",),
        ("hardswish", "quantize"),
        (),
        ("add",),
    ]
    (note,) = report.notes
    assert "no bf16 instructions: stem, conv, fc, head give float32" in note and note in str(report)
    assert not report.missed


@pytest.mark.parametrize("has_bf16", [False, True])
def test_addition_to_a_float32_stream(monkeypatch: pytest.MonkeyPatch, has_bf16: bool) -> None:
    monkeypatch.setattr(cpu, "has_bf16", lambda: has_bf16)
    types, conversions, report = fused(Mixed(), ROWS)
    assert (types, conversions) == ([FP32], [])
    assert report.fused[0].kernel == "onednn.qlinear_pointwise.binary"


def test_compiled() -> None:
    """As this CPU has it: real kernels, real numbers."""
    with torch.autocast("cpu", BF16):
        q = testing.qdq_graph(Net(), IMAGE)
        compiled = testing.assert_close_to_reference(q, IMAGE, options={"kernels": "onednn"}, min_snr=30)
    assert testing.int8_calls(compiled.code) == {"qconv": 2, "qconv.binary": 1, "qlinear": 1, "qlinear.binary": 1}
    assert compiled.outputs.dtype == BF16
    assert bool(compiled.report.notes) != cpu.has_bf16()
