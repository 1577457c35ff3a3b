"""What a regression suite imports: small q/dq graphs by hand, and assertions on code and numbers::

    from inductor_x86q import testing

    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = testing.QConv2d(8, 16, 3, padding=1)

        def forward(self, x):
            return torch.relu(self.conv(testing.quantize_dequantize(x, 0.02, 60)))

    def test_relu_is_fused():
        q, inputs = testing.qdq_graph(Block(), (torch.randn(1, 8, 8, 8),)), (torch.randn(1, 8, 8, 8),)
        testing.assert_fused(q, inputs, {"qconv": 1})
        testing.assert_close_to_reference(q, inputs)

Activations made here span 0 to 127: 8 bits overflow on CPUs without VNNI, and the passes then leave them in float.
"""

from __future__ import annotations

from inductor_x86q.inductor.cpp_text import kernel_calls, stable
from inductor_x86q.testing.code import (
    PINNED,
    Compiled,
    assert_expected_cpp,
    assert_fused,
    compile_once,
    float_calls,
    int8_calls,
    own_calls,
)
from inductor_x86q.testing.graphs import QConv1d, QConv2d, QConv3d, QLinear, qdq_graph, quantize_dequantize
from inductor_x86q.testing.numbers import assert_close_to_reference, assert_same, snr

__all__ = [
    "PINNED", "Compiled", "QConv1d", "QConv2d", "QConv3d", "QLinear", "assert_close_to_reference",
    "assert_expected_cpp", "assert_fused", "assert_same", "compile_once", "float_calls", "int8_calls", "kernel_calls",
    "own_calls", "qdq_graph", "quantize_dequantize", "snr", "stable",
]  # fmt: skip
