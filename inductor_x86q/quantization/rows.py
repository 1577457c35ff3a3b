"""Rows that are rounded without an observer, each symmetric, by its largest value: of weights, and of values at every call."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from inductor_x86q.graph import qdq
from inductor_x86q.graph.qdq import SMALLEST_SCALE

aten = torch.ops.aten

BITS = "x86q_row_bits"  # in the `meta` of an attention whose query, key and value have scales of their own: their bits


def rounded(weight: torch.Tensor, largest: int) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 of `-largest` to `largest`, and the scales (…, 1) of the rows of (…, row)."""
    scale = (weight.abs().amax(-1, keepdim=True) / largest).clamp(min=SMALLEST_SCALE)
    return (weight / scale).round().clamp(-largest, largest).to(torch.int8), scale


def quantize_dequantize(x: fx.Node, low: int, high: int, *, like: fx.Node, by_matrix: bool = False) -> fx.Node:
    """Nodes that round each row of (…, rows, row) to uint8 of `low` to `high`, with the middle of these as its zero point.

    Args:
        by_matrix: all rows of a matrix have one scale.
    """
    middle = (low + high + 1) // 2

    def call(target: Any, *arguments: Any, **keywords: Any) -> fx.Node:
        new = like.graph.call_function(target, arguments, keywords)
        qdq.copy_origin(new, like)
        return new

    # Scaled first, a row's largest value is its scale: one loop finds that, the next one quantizes the row.
    steps = call(aten.mul.Tensor, call(aten.abs.default, x), 1 / (high - middle))
    scales = call(aten.amax.default, call(aten.clamp_min.default, steps, SMALLEST_SCALE), [-1], True)
    if by_matrix:
        scales = call(aten.expand_as.default, call(aten.amax.default, scales, [-2], True), scales)
    arguments = (scales, call(aten.full_like.default, scales, middle), low, high, torch.uint8)
    integers = call(qdq.QUANTIZE_TOKEN, x, *arguments)
    return call(qdq.DEQUANTIZE_TOKEN, integers, *arguments, output_dtype=torch.float32)


def fake_quantized(x: torch.Tensor, low: int, high: int, *, by_matrix: bool = False) -> torch.Tensor:
    """What these nodes compute."""
    middle = (low + high + 1) // 2
    steps = (x.abs() * (1 / (high - middle))).clamp_min(SMALLEST_SCALE)
    scales = steps.amax([-2, -1] if by_matrix else [-1], keepdim=True)
    return ((x * scales.reciprocal() + middle).round().clamp(low, high) - middle) * scales
