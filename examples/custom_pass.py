"""A pass of one's own: a factor between dequantize and a layer goes into the scale, and the layer becomes int8."""

from typing import Any

import torch

from inductor_x86q import No, Rule, explain, register_pass, testing
from inductor_x86q.graph import qdq


def find(node: torch.fx.Node) -> float | No:
    arguments: tuple[Any, ...] = node.args
    source, factor = arguments
    if not qdq.is_dequantize(source) or not qdq.qparams(source).is_static:
        return No("its input is not dequantized with a constant scale", (source,))
    return factor if isinstance(factor, (int, float)) and factor > 0 else No(f"{factor} is not a positive number")


def rewrite(node: torch.fx.Node, factor: float) -> torch.fx.Node:
    (source,) = node.all_input_nodes
    arguments: tuple[Any, ...] = source.args
    integers, scale, *others = arguments
    return qdq.call(source.target, integers, scale * factor, *others, like=source)


class Scaled(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = testing.QLinear(64, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.linear(testing.quantize_dequantize(x) * 0.125)
        return y


inputs = (torch.randn(16, 64),)
q = testing.qdq_graph(Scaled(), inputs)
print("without:", explain(q, inputs), sep="\n")
register_pass("propagate", Rule("factor into scale", (torch.ops.aten.mul.Tensor,), find, rewrite))
print("with:", report := explain(q, inputs), *report.passes, sep="\n")
testing.assert_close_to_reference(q, inputs, options={"strict": True})
