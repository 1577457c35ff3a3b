"""What a q/dq graph may compute: an interval for each element, from the rounding errors along its way.

A fused kernel computes what the graph says, in other floating-point operations. Before a quantize that moves a value
by some units in the last place; where the value lies that near to a tie, either integer is right, and what follows may
see either. So the graph is run on intervals in double precision: each operator widens them by the error that single
precision may make there, and a quantize rounds both ends. What is not near a tie comes out as a single integer.

Where the graph computes in 16 bits it rounds each result, to 8 bits of mantissa in bfloat16 and 11 in float16. A kernel
that does several operators at once keeps more than that in between, so a result may be rounded or not: the interval
holds both, and everything between them.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from inductor_x86q.graph.operators import Role, targets

_q = torch.ops.quantized_decomposed

# Relative to the sum of the magnitudes of what is added up: scaling and bias of a product, and each of its terms, which
# are added to a bias that may be larger than all of them, or to each other in any order.
ACCUMULATION_ERROR = 1e-6
TERM_ERROR = 2.0**-24
# Relative to the result of a pointwise operator, and absolute for those that kernels approximate.
POINTWISE_ERROR = 3e-7
APPROXIMATION_ERROR = 2e-6

# Below the normal numbers of float32 kernels may flush to zero.
SMALLEST = torch.finfo(torch.float32).tiny


ROUNDED = (torch.bfloat16, torch.float16)


@dataclasses.dataclass
class Interval:
    """Every element lies between `low` and `high`, float64 tensors of one shape; integers are kept as floats too.

    `dtype` is the type that the graph itself has there.
    """

    low: torch.Tensor
    high: torch.Tensor
    dtype: torch.dtype = torch.float32

    @classmethod
    def exact(cls, tensor: torch.Tensor) -> Interval:
        return cls(tensor.double(), tensor.double(), tensor.dtype)

    @property
    def center(self) -> torch.Tensor:
        return (self.low + self.high) / 2

    @property
    def radius(self) -> torch.Tensor:
        return (self.high - self.low) / 2

    @property
    def magnitude(self) -> torch.Tensor:
        return torch.maximum(self.low.abs(), self.high.abs())

    @property
    def shape(self) -> torch.Size:
        return self.low.shape

    def excludes(self, value: torch.Tensor) -> torch.Tensor:
        """Which elements lie outside, or are no numbers."""
        return ~((self.low <= value.double()) & (value.double() <= self.high))

    def widened(self, error: torch.Tensor) -> Interval:
        error = error + SMALLEST
        return Interval(self.low - error, self.high + error, self.dtype)

    def of_type(self, dtype: torch.dtype) -> Interval:
        """The same values, and in 16 bits what they may be rounded to; rounding is monotone."""
        if dtype not in ROUNDED:
            return Interval(self.low, self.high, dtype)
        low, high = (end.to(dtype).double() for end in (self.low, self.high))
        return Interval(torch.minimum(self.low, low), torch.maximum(self.high, high), dtype)


def _interval(value: Any) -> Interval:
    return value if isinstance(value, Interval) else Interval.exact(torch.as_tensor(value))


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
        return _monotone  # what else has a row in the table of operators; one that is not monotone needs a rule
    raise NotImplementedError(f"no interval rule for {target}")


# --- rules ------------------------------------------------------------------------------------------------------------


def _getattr(target: Any, value: Any, name: str) -> Any:
    return getattr(_interval(value).low, name)


def _movement(target: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    """Puts elements of its tensors elsewhere: both ends move alike. A list of results is possible."""
    if isinstance(x, (list, tuple)) and any(isinstance(v, Interval) for v in x):
        lows, highs = [_interval(v).low for v in x], [_interval(v).high for v in x]
    elif not isinstance(x, Interval):
        return target(x, *args, **kwargs)
    else:
        lows, highs = x.low, x.high  # type: ignore[assignment]
    low, high = target(lows, *args, **kwargs), target(highs, *args, **kwargs)
    if isinstance(low, (tuple, list)):
        return [Interval(a, b) for a, b in zip(low, high, strict=True)]
    return Interval(low, high)


def _item(target: Any, value: Any, index: Any) -> Any:
    return _movement(target, value, index) if isinstance(value, Interval) else value[index]


def _monotone(target: Any, x: Interval, *args: Any, **kwargs: Any) -> Interval:
    result = Interval(target(x.low, *args, **kwargs), target(x.high, *args, **kwargs))
    return result.widened(APPROXIMATION_ERROR * result.magnitude.clamp(max=1.0) + POINTWISE_ERROR * result.magnitude)


def _exactly_monotone(target: Any, x: Interval, *args: Any, **kwargs: Any) -> Interval:
    """Picks one of its elements or a bound: the ends are exact, save for the rounding of the bound itself."""
    result = Interval(target(x.low, *args, **kwargs), target(x.high, *args, **kwargs))
    return result.widened(1e-7 * result.magnitude)


def _bounded_slope(target: Any, x: Interval, *args: Any, **kwargs: Any) -> Interval:
    """The slope of hardswish, silu, gelu and mish stays below 1.6 everywhere."""
    center = target(x.center, *args, **kwargs)
    return Interval(center, center).widened(1.6 * x.radius + APPROXIMATION_ERROR * x.magnitude)


def _absolute(target: Any, x: Interval) -> Interval:
    smallest = torch.where(
        (x.low <= 0) & (x.high >= 0), torch.zeros_like(x.low), torch.minimum(x.low.abs(), x.high.abs())
    )
    return Interval(smallest, x.magnitude)


def _negative(target: Any, x: Interval) -> Interval:
    return Interval(-x.high, -x.low)


def _addition(target: Any, x: Any, y: Any, *, alpha: float = 1.0) -> Interval:
    x, y = _interval(x), _interval(y)
    y = _product(operator.mul, y, alpha).of_type(y.dtype) if alpha != 1 else y
    return Interval(x.low + y.low, x.high + y.high).widened(POINTWISE_ERROR * (x.magnitude + y.magnitude))


def _subtraction(target: Any, x: Any, y: Any) -> Interval:
    return _addition(target, x, _negative(target, _interval(y)))


def _product(target: Any, x: Any, y: Any) -> Interval:
    x, y = _interval(x), _interval(y)
    result = _ends(x, y)
    return result.widened(POINTWISE_ERROR * result.magnitude)


def _average(target: Any, x: Interval, *args: Any, **kwargs: Any) -> Interval:
    magnitude = target(x.magnitude, *args, **kwargs).abs()
    low, high = target(x.low, *args, **kwargs), target(x.high, *args, **kwargs)
    # The sum may be rounded before it is divided: an error of the same size, relative to the result. In 16 bits some of
    # eager mode's pools round the partial sums too.
    partial = torch.finfo(x.dtype).eps if x.dtype in ROUNDED else 0.0
    return Interval(low, high).of_type(x.dtype).widened((ACCUMULATION_ERROR + partial) * magnitude)


def _weighted_sum(target: Any, x: Any, weight: Any, bias: Any = None, *args: Any, **kwargs: Any) -> Interval:
    """Convolution and linear."""
    shape = _interval(weight).shape
    terms = math.prod(shape) // max(shape[0], 1)
    return _bilinear(
        lambda a, b: target(a, b, None, *args, **kwargs), x, weight, _channels(target, bias, weight), terms
    )


def _transposed_convolution(target: Any, x: Any, weight: Any, bias: Any, stride: int, *geometry: Any) -> Interval:
    """In 16 bits eager mode rounds what each tap of the kernel contributes, and each sum of such contributions."""
    x, shape = _interval(x), _interval(weight).shape

    def multiply(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return target(a, b, None, stride, *geometry)

    terms = math.prod(shape) // max(shape[1], 1)
    result = _bilinear(multiply, x, weight, _channels(target, bias, weight), terms)
    if x.dtype not in ROUNDED:
        return result
    taps = math.prod(-(-size // stride) for size in shape[2:])
    return result.widened(
        (taps + 1) * torch.finfo(x.dtype).eps / 2 * multiply(x.magnitude, _interval(weight).magnitude)
    )


def _channels(target: Any, bias: Any, weight: Any) -> Any:
    """The bias in the shape in which it is added."""
    if bias is None or target is F.linear:
        return bias
    return _movement(torch.Tensor.reshape, _interval(bias), (-1, *[1] * (_interval(weight).low.dim() - 2)))


def _matrix_product(target: Any, x: Any, y: Any) -> Interval:
    return _bilinear(target, x, y, None, _interval(x).shape[-1])


def _matrix_product_and_sum(target: Any, bias: Any, x: Any, y: Any, *, alpha: float = 1, beta: float = 1) -> Interval:
    scaled = dataclasses.replace(_product(target, x, alpha), dtype=_interval(x).dtype)
    return _bilinear(torch.matmul, scaled, y, _product(target, bias, beta), _interval(x).shape[-1])


def _bilinear(multiply: Callable[..., torch.Tensor], x: Any, y: Any, bias: Any, terms: int) -> Interval:
    """A product whose elements are sums of so many terms."""
    x, y = _interval(x), _interval(y)
    center = multiply(x.center, y.center)
    magnitude = multiply(x.magnitude, y.magnitude)
    radius = multiply(x.radius, y.magnitude) + multiply(x.magnitude, y.radius)
    result = Interval(center - radius, center + radius)
    if bias is not None:
        result = result.of_type(x.dtype)  # a kernel may round the product before it adds
        added = _interval(bias)
        result = Interval(result.low + added.low, result.high + added.high)
        magnitude = magnitude + added.magnitude
    return result.widened((ACCUMULATION_ERROR + TERM_ERROR * terms) * magnitude)


def _attention(
    target: Any, query: Any, key: Any, value: Any, mask: None, is_causal: bool, scale: float | None
) -> Interval:
    """A score that may lie anywhere gives weights of which one is right; the result lies among the values all the same."""
    value, keys = _interval(value), _movement(torch.Tensor.transpose, _interval(key), -1, -2)
    scores = _product(target, _matrix_product(torch.matmul, query, keys), scale or value.shape[-1] ** -0.5)
    low, high = scores.low, scores.high
    if is_causal:
        hidden = torch.ones(low.shape[-2:], dtype=torch.bool).triu(1)
        low, high = (end.masked_fill(hidden, -math.inf) for end in (low, high))
    below = (low - high.amax(-1, keepdim=True), (high - low.amax(-1, keepdim=True)).clamp(max=0))
    least, most = (
        torch.round(255 * torch.exp(end) * (1 + sign * APPROXIMATION_ERROR))
        for end, sign in zip(below, (-1, 1), strict=True)
    )
    weights, doubt = (least + most) / 2, (most - least) / 2
    total, surely = weights.sum(-1, keepdim=True), least.sum(-1, keepdim=True).clamp(min=255)
    center = weights @ value.center / total
    apart = (value.center.unsqueeze(-3) - center.unsqueeze(-2)).abs()
    radius = ((doubt.unsqueeze(-1) * apart).sum(-2) + most @ value.radius) / surely
    error = (ACCUMULATION_ERROR + TERM_ERROR * low.shape[-1]) * (weights @ value.magnitude) / total
    ends = value.low.amin(-2, keepdim=True), value.high.amax(-2, keepdim=True)
    return Interval(*((center + sign * radius).clamp(*ends) for sign in (-1, 1))).widened(error)


def _quantize(
    target: Any, x: Interval, scale: Any, zero_point: Any, quant_min: int, quant_max: int, dtype: Any
) -> Interval:
    scale, zero_point = _number(scale), _number(zero_point).low
    value = _ends(x, Interval(1.0 / scale.high, 1.0 / scale.low))
    # Kernels add the zero point before they round.
    error = POINTWISE_ERROR * (value.magnitude + zero_point.abs())
    low, high = (
        (torch.round(v) + zero_point).clamp(quant_min, quant_max) for v in (value.low - error, value.high + error)
    )
    return Interval(low, high, dtype)


def _number(value: Any) -> Interval:
    """A scale or zero point."""
    return value if isinstance(value, Interval) else Interval.exact(torch.as_tensor(value, dtype=torch.float64))


def _ends(x: Interval, y: Interval) -> Interval:
    """The product, exactly."""
    ends = torch.stack(torch.broadcast_tensors(*(a * b for a in (x.low, x.high) for b in (y.low, y.high))))
    return Interval(ends.amin(0), ends.amax(0)) if ends.numel() else Interval(ends[0], ends[0])


def _cast(target: Any, x: Any, dtype: torch.dtype) -> Interval:
    return _interval(x).of_type(dtype)


def _dequantize(
    target: Any, x: Any, scale: Any, zero_point: Any, *rest: Any, out_dtype: torch.dtype | None = None
) -> Interval:
    x, zero_point = _interval(x), _number(zero_point).low
    result = _ends(Interval(x.low - zero_point, x.high - zero_point), _number(scale))
    # The scale is rounded to float32, then the product.
    return result.widened(POINTWISE_ERROR * result.magnitude).of_type(out_dtype or torch.float32)


def _dequantize_rows(target: Any, x: Any, scales: Any, zero_points: Any, *rest: Any) -> Interval:
    return _dequantize(target, x, scales, zero_points)


def _dequantize_channels(
    target: Any, x: torch.Tensor, *arguments: Any, out_dtype: torch.dtype = torch.float32
) -> Interval:
    """A weight's constant integers."""
    return Interval.exact(target(x, *arguments)).of_type(out_dtype)


# These give a type of their own; constants go through them too.
_CONVERSIONS = frozenset({
    getattr, torch.Tensor.to, _q.quantize_per_tensor, _q.quantize_per_tensor.default, _q.dequantize_per_tensor,
    _q.dequantize_per_tensor.default, _q.dequantize_per_channel, _q.dequantize_per_channel.default,
    _q.quantize_per_token, _q.dequantize_per_token,
})  # fmt: skip

_RULES: tuple[tuple[frozenset[Any], Callable[..., Any]], ...] = (
    (frozenset({getattr}), _getattr),
    (frozenset({operator.getitem}), _item),
    (frozenset({torch.Tensor.to}), _cast),
    (frozenset({_q.quantize_per_tensor, _q.quantize_per_tensor.default, _q.quantize_per_token}), _quantize),
    (frozenset({_q.dequantize_per_token}), _dequantize_rows),
    (frozenset({_q.dequantize_per_tensor, _q.dequantize_per_tensor.default}), _dequantize),
    (frozenset({_q.dequantize_per_channel, _q.dequantize_per_channel.default}), _dequantize_channels),
    (frozenset({F.conv1d, F.conv2d, F.conv3d, F.linear}), _weighted_sum),
    (frozenset({F.conv_transpose2d}), _transposed_convolution),
    (frozenset({torch.mm, torch.bmm, torch.matmul}), _matrix_product),
    (frozenset({torch.addmm, torch.baddbmm}), _matrix_product_and_sum),
    (frozenset({torch.ops.inductor_x86q.attention}), _attention),
    (frozenset({operator.add, torch.add}), _addition),
    (frozenset({operator.sub}), _subtraction),
    (frozenset({operator.mul, torch.mul}), _product),
    (frozenset({torch.abs}), _absolute),
    (frozenset({torch.neg}), _negative),
    (frozenset({torch.relu, F.relu, F.hardtanh, F.relu6, torch.clamp, F.max_pool1d, F.max_pool2d, F.max_pool3d,
                F.adaptive_max_pool2d}), _exactly_monotone),
    (frozenset({torch.tanh, torch.sigmoid, F.hardsigmoid, F.leaky_relu, F.elu}), _monotone),
    (frozenset({F.hardswish, F.silu, F.gelu, F.mish}), _bounded_slope),
    (frozenset({F.avg_pool1d, F.avg_pool2d, F.avg_pool3d, F.adaptive_avg_pool1d, F.adaptive_avg_pool2d,
                F.adaptive_avg_pool3d, torch.mean}), _average),
    (frozenset({torch.cat, torch.stack, F.pad, F.interpolate, F.pixel_shuffle, F.pixel_unshuffle, F.channel_shuffle,
                torch.flip, torch.roll, torch.index_select, torch.split, torch.chunk, torch.unbind,
                torch.flatten, torch.Tensor.flatten, torch.Tensor.permute, torch.Tensor.transpose, torch.Tensor.reshape,
                torch.Tensor.unsqueeze, torch.Tensor.squeeze, torch.Tensor.repeat, torch.Tensor.expand,
                torch.Tensor.select, torch.Tensor.contiguous, torch.Tensor.clone, torch.full_like}), _movement),
)  # fmt: skip
