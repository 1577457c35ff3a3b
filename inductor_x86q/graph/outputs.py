"""The output of our operators with a kernel of their own: float32, or integers, as the last five of their arguments say."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from inductor_x86q.graph import qdq
from inductor_x86q.graph.qdq import QParams

# In the `meta` of such an operator: its kernel, as the finish stage chooses it.
KERNEL = "x86q_kernel"
SCHEMA = "float output_scale, int output_zero_point, int quant_min, int quant_max, ScalarType dtype"
FLOAT32 = QParams(1.0, 0, 0, 0, torch.float32)
_COUNT = len(FLOAT32.arguments())


def rounded(x: torch.Tensor, *output: Any) -> torch.Tensor:
    """What an operator gives of its float result."""
    if output[-1].is_floating_point:
        return x
    found: torch.Tensor = qdq.QUANTIZE(x, *output)
    return found


def read(node: fx.Node) -> QParams:
    """How a node's output is quantized; no more than the type means anything where it is float."""
    arguments: Any = node.args
    return QParams(*arguments[-_COUNT:])


def write(node: fx.Node, output: QParams) -> None:
    """Gives a node another output; what stands for its value is the caller's to change."""
    node.args = (*node.args[:-_COUNT], *output.arguments())
