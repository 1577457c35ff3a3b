"""Attention: our operators for it, what they compute, and a typed view of the int8 one.

`inductor_x86q::attention` is what q/dq graphs hold where attention is int8: on dequantized query, key and value it computes
what the kernel does. It differs from `aten::scaled_dot_product_attention` by what the softmax gives: a score's weight, which is
the exponential of what it lies below the row's greatest, is rounded to a byte before it is divided by the row's sum of weights,
so that long rows lose no more than short ones. A row of which all is masked gives 0.

`inductor_x86q::int8_attention` is that between a dequantize of each operand and, perhaps, a quantize; `by_rows` has a scale for
each row of the query and of the key, and for each head of the value.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import fx

from inductor_x86q.graph import outputs
from inductor_x86q.graph.definitions import define

aten = torch.ops.aten

LEVELS = 255  # of a weight


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    is_causal: bool,
    scale: float | None,
) -> torch.Tensor:
    """Query, key and value are (..., heads, rows, width); queries may have a multiple of the heads. No scale is the usual one.

    The result lies in memory as (..., rows, heads, width), which is how the next linear reads it.
    """
    if query.dim() > 3 and query.shape[-3] != key.shape[-3]:
        each = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(each, -3), value.repeat_interleave(each, -3)
    scores = query @ key.transpose(-1, -2) * usual_scale(query, scale)
    if is_causal:
        queries, keys = (torch.arange(size, device=scores.device) for size in scores.shape[-2:])
        scores = scores.masked_fill(keys > queries.unsqueeze(1), -math.inf)
    if mask is not None:
        scores = scores.masked_fill(mask.logical_not(), -math.inf) if mask.dtype == torch.bool else scores + mask
    greatest = scores.amax(-1, keepdim=True).clamp(min=torch.finfo(scores.dtype).min)
    weights = torch.round(LEVELS * torch.exp(scores - greatest))
    result = weights @ value / weights.sum(-1, keepdim=True).clamp(min=1)
    return result.transpose(-3, -2).contiguous().transpose(-3, -2)


def usual_scale(query: torch.Tensor, scale: float | None) -> float:
    return 1 / math.sqrt(query.shape[-1]) if scale is None else scale


def _int8_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, *rest: Any
) -> torch.Tensor:
    grids, (is_causal, scale, _largest), output = rest[:6], rest[6:9], rest[9:]
    reals = [
        (x.float() - zero_point) * scales
        for x, scales, zero_point in zip((query, key, value), grids[::2], grids[1::2], strict=True)
    ]
    return outputs.rounded(attention(reals[0], reals[1], reals[2], mask, is_causal, scale), *output)


define(
    "attention(Tensor query, Tensor key, Tensor value, Tensor? mask, bool is_causal, float? scale) -> Tensor", attention
)
for _name, _scale in (("int8_attention", "float"), ("int8_attention.by_rows", "Tensor")):
    define(
        f"{_name}(Tensor query, Tensor key, Tensor value, Tensor? mask, {_scale} query_scale, int query_zero_point, "
        f"{_scale} key_scale, int key_zero_point, {_scale} value_scale, int value_zero_point, bool is_causal, float scale, "
        f"int largest, {outputs.SCHEMA}) -> Tensor",
        _int8_attention,
    )
ATTENTION = torch.ops.inductor_x86q.attention.default
INT8_ATTENTION = torch.ops.inductor_x86q.int8_attention.default
INT8_ATTENTION_BY_ROWS = torch.ops.inductor_x86q.int8_attention.by_rows
TARGETS = (INT8_ATTENTION, INT8_ATTENTION_BY_ROWS)
SPELLINGS = (aten.scaled_dot_product_attention.default,)


@dataclasses.dataclass(frozen=True)
class Attention:
    """A call of `int8_attention`: its arguments in order. Where it is by rows, the scales are tensors that are (..., heads, rows, 1),
    the value's (..., heads, 1, 1)."""

    query: Any
    key: Any
    value: Any
    mask: Any
    query_scale: Any
    query_zero_point: int
    key_scale: Any
    key_zero_point: int
    value_scale: Any
    value_zero_point: int
    is_causal: bool
    scale: float
    largest: int  # of the integers of query, key and value
    output_scale: float
    output_zero_point: int
    quant_min: int
    quant_max: int
    output_dtype: torch.dtype

    @property
    def is_by_rows(self) -> bool:
        return not isinstance(self.query_scale, float)

    @property
    def arguments(self) -> tuple[Any, ...]:
        return tuple(getattr(self, field.name) for field in dataclasses.fields(self))


def is_int8_attention(node: Any) -> bool:
    return isinstance(node, fx.Node) and node.target in TARGETS


def read(node: fx.Node) -> Attention:
    return Attention(*node.args)  # type: ignore[arg-type]
