"""Reports with the time that each kernel takes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from inductor_x86q import cpu, explain, testing
from inductor_x86q.errors import CompileError
from inductor_x86q.testing import QConv2d, qdq_graph, quantize_dequantize
from tests.test_report import INPUTS, Net

F = nn.functional


@pytest.fixture(scope="module")
def net() -> torch.fx.GraphModule:
    return qdq_graph(Net(), INPUTS)


def test_timing_covers_every_call(net: torch.fx.GraphModule) -> None:
    report = explain(net, INPUTS, timing=True, options={"kernels": "onednn"})
    names = [kernel.name for kernel in report.kernels]
    assert names.count("qconv") == 2
    assert names.count("qlinear") == 1
    assert all(kernel.microseconds > 0 for kernel in report.kernels)
    assert all(fusion.microseconds is not None for fusion in report.fused)
    by_layer = {kernel.layers[0]: kernel.microseconds for kernel in report.kernels if kernel.name.startswith("qconv")}
    assert by_layer == {f.layer: f.microseconds for f in report.fused if f.operator == "conv"}
    assert "µs" in str(report)
    assert report.microseconds == sum(kernel.microseconds for kernel in report.kernels)


@pytest.mark.skipif(not cpu.int8_lanes(), reason="kernels are generated for CPUs with AVX2")
def test_timing_of_generated_kernels() -> None:
    """What stands for a call in a later stage is timed as that call: generated kernels, and convolutions of lines.

    A layer's time is its own, not that of the quantize or the mean which lowering it put into memory.
    """

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.line = QConv2d(8, 8, 1), testing.QConv1d(8, 16, 3)
            self.head = testing.QLinear(16, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.line(quantize_dequantize(self.conv(quantize_dequantize(x)).flatten(2)))
            return self.head(quantize_dequantize(x.mean(2)))

    inputs = (torch.randn(2, 8, 4, 4),)
    report = explain(qdq_graph(Net(), inputs), inputs, timing=True, mode="max-autotune")
    assert [f.layer for f in report.fused] == ["conv", "line", "head"]
    assert all(fusion.microseconds is not None for fusion in report.fused)
    assert [sum(fusion.node in kernel.nodes for kernel in report.kernels) for fusion in report.fused] == [1, 1, 1]


def test_timing_needs_the_cpp_wrapper(net: torch.fx.GraphModule) -> None:
    with pytest.raises(CompileError, match="cpp_wrapper"):
        explain(net, INPUTS, timing=True, options={"cpp_wrapper": False})
