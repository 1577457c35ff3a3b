"""The rules by which each operator is run on intervals, and a whole graph on them."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from inductor_x86q.graph.operators import Role, targets
from tests.fuzz import intervals as i
from tests.fuzz import sequences
from tests.fuzz.intervals import Interval

_q = torch.ops.quantized_decomposed


def bounds(model: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> list[Interval]:
    """The interval of each output of `model`, a module of the operators in the tables below.

    Raises:
        NotImplementedError: the graph has an operator that is not in the tables.
    """
    tracer = fx.Tracer()
    tracer.proxy_buffer_attributes = True  # else what is computed of constants alone would run while tracing
    traced = fx.GraphModule(model, tracer.trace(model))
    results = _IntervalInterpreter(traced).run(*(Interval.exact(x) for x in inputs))
    return list(results) if isinstance(results, (tuple, list)) else [results]


class _IntervalInterpreter(fx.Interpreter):
    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        operands = _operands((args, kwargs))
        if target in _CONVERSIONS:
            return rule(target)(target, *args, **kwargs)
        if not any(isinstance(operand, Interval) for operand in operands):
            return target(*args, **kwargs)
        return _typed(rule(target)(target, *args, **kwargs), _promoted(operands))

    def call_method(self, target: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self.call_function(getattr(torch.Tensor, target), args, kwargs)


def _operands(value: Any) -> list[Interval | torch.Tensor]:
    if isinstance(value, (tuple, list)):
        return [operand for v in value for operand in _operands(v)]
    if isinstance(value, dict):
        return _operands(list(value.values()))
    return [value] if isinstance(value, (Interval, torch.Tensor)) else []


def _promoted(operands: list[Interval | torch.Tensor]) -> torch.dtype:
    """The type of a result: torch's rule for tensors of at least one dimension; an index has no say in it."""
    found = [operand.dtype for operand in operands if operand.dtype != torch.int64]
    return functools.reduce(torch.promote_types, found)


def _typed(result: Any, dtype: torch.dtype) -> Any:
    if isinstance(result, (tuple, list)):
        return [_typed(part, dtype) for part in result]
    return result.of_type(dtype) if isinstance(result, Interval) else result


def rule(target: Any) -> Callable[..., Any]:
    """How to run `target` on intervals."""
    for known, found in _RULES:
        if target in known:
            return found
    if target in targets(Role.ACTIVATION):
        return i.monotone  # what else has a row in the table of operators; one that is not monotone needs a rule
    raise NotImplementedError(f"no interval rule for {target}")


# These give a type of their own; constants go through them too.
_CONVERSIONS = frozenset({
    getattr, torch.Tensor.to, _q.quantize_per_tensor, _q.quantize_per_tensor.default, _q.dequantize_per_tensor,
    _q.dequantize_per_tensor.default, _q.dequantize_per_channel, _q.dequantize_per_channel.default,
    _q.quantize_per_token, _q.dequantize_per_token,
})  # fmt: skip

_RULES: tuple[tuple[frozenset[Any], Callable[..., Any]], ...] = (
    (frozenset({getattr}), i.attribute),
    (frozenset({operator.getitem}), i.item),
    (frozenset({torch.Tensor.to}), i.cast),
    (frozenset({_q.quantize_per_tensor, _q.quantize_per_tensor.default, _q.quantize_per_token}), i.quantize),
    (frozenset({_q.dequantize_per_token}), i.dequantize_rows),
    (frozenset({_q.dequantize_per_tensor, _q.dequantize_per_tensor.default}), i.dequantize),
    (frozenset({_q.dequantize_per_channel, _q.dequantize_per_channel.default}), i.dequantize_channels),
    (frozenset({F.conv1d, F.conv2d, F.conv3d, F.linear}), i.weighted_sum),
    (frozenset({F.conv_transpose2d}), i.transposed_convolution),
    (frozenset({torch.mm, torch.bmm, torch.matmul}), i.matrix_product),
    (frozenset({torch.addmm, torch.baddbmm}), i.matrix_product_and_sum),
    (frozenset({torch.ops.inductor_x86q.attention}), sequences.attention),
    (frozenset({torch.ops.inductor_x86q.recurrence}), sequences.recurrence),
    (frozenset({operator.add, torch.add}), i.addition),
    (frozenset({operator.sub}), i.subtraction),
    (frozenset({operator.mul, torch.mul}), i.product),
    (frozenset({torch.abs}), i.absolute),
    (frozenset({torch.neg}), i.negative),
    (frozenset({torch.relu, F.relu, F.hardtanh, F.relu6, torch.clamp, F.max_pool1d, F.max_pool2d, F.max_pool3d,
                F.adaptive_max_pool2d}), i.exactly_monotone),
    (frozenset({torch.tanh, torch.sigmoid, F.hardsigmoid, F.leaky_relu, F.elu}), i.monotone),
    (frozenset({F.hardswish, F.silu, F.gelu, F.mish}), i.bounded_slope),
    (frozenset({F.avg_pool1d, F.avg_pool2d, F.avg_pool3d, F.adaptive_avg_pool1d, F.adaptive_avg_pool2d,
                F.adaptive_avg_pool3d, torch.mean}), i.average),
    (frozenset({torch.cat, torch.stack, F.pad, F.interpolate, F.pixel_shuffle, F.pixel_unshuffle, F.channel_shuffle,
                torch.flip, torch.roll, torch.index_select, torch.split, torch.chunk, torch.unbind,
                torch.flatten, torch.Tensor.flatten, torch.Tensor.permute, torch.Tensor.transpose, torch.Tensor.reshape,
                torch.Tensor.unsqueeze, torch.Tensor.squeeze, torch.Tensor.repeat, torch.Tensor.expand,
                torch.Tensor.select, torch.Tensor.contiguous, torch.Tensor.clone, torch.full_like}), i.movement),
)  # fmt: skip
