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
import math
import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

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


def interval(value: Any) -> Interval:
    return value if isinstance(value, Interval) else Interval.exact(torch.as_tensor(value))


# --- rules ------------------------------------------------------------------------------------------------------------


def attribute(target: Any, value: Any, name: str) -> Any:
    return getattr(interval(value).low, name)


def movement(target: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    """Puts elements of its tensors elsewhere: both ends move alike. A list of results is possible."""
    if isinstance(x, (list, tuple)) and any(isinstance(v, Interval) for v in x):
        lows, highs = [interval(v).low for v in x], [interval(v).high for v in x]
    elif not isinstance(x, Interval):
        return target(x, *args, **kwargs)
    else:
        lows, highs = x.low, x.high  # type: ignore[assignment]
    low, high = target(lows, *args, **kwargs), target(highs, *args, **kwargs)
    if isinstance(low, (tuple, list)):
        return [Interval(a, b) for a, b in zip(low, high, strict=True)]
    return Interval(low, high)


def item(target: Any, value: Any, index: Any) -> Any:
    return movement(target, value, index) if isinstance(value, Interval) else value[index]


def monotone(target: Any, x: Interval, *args: Any, **kwargs: Any) -> Interval:
    result = Interval(target(x.low, *args, **kwargs), target(x.high, *args, **kwargs))
    return result.widened(APPROXIMATION_ERROR * result.magnitude.clamp(max=1.0) + POINTWISE_ERROR * result.magnitude)


def exactly_monotone(target: Any, x: Interval, *args: Any, **kwargs: Any) -> Interval:
    """Picks one of its elements or a bound: the ends are exact, save for the rounding of the bound itself."""
    result = Interval(target(x.low, *args, **kwargs), target(x.high, *args, **kwargs))
    return result.widened(1e-7 * result.magnitude)


def bounded_slope(target: Any, x: Interval, *args: Any, **kwargs: Any) -> Interval:
    """The slope of hardswish, silu, gelu and mish stays below 1.6 everywhere."""
    center = target(x.center, *args, **kwargs)
    return Interval(center, center).widened(1.6 * x.radius + APPROXIMATION_ERROR * x.magnitude)


def absolute(target: Any, x: Interval) -> Interval:
    smallest = torch.where(
        (x.low <= 0) & (x.high >= 0), torch.zeros_like(x.low), torch.minimum(x.low.abs(), x.high.abs())
    )
    return Interval(smallest, x.magnitude)


def negative(target: Any, x: Interval) -> Interval:
    return Interval(-x.high, -x.low)


def addition(target: Any, x: Any, y: Any, *, alpha: float = 1.0) -> Interval:
    x, y = interval(x), interval(y)
    y = product(operator.mul, y, alpha).of_type(y.dtype) if alpha != 1 else y
    return Interval(x.low + y.low, x.high + y.high).widened(POINTWISE_ERROR * (x.magnitude + y.magnitude))


def subtraction(target: Any, x: Any, y: Any) -> Interval:
    return addition(target, x, negative(target, interval(y)))


def product(target: Any, x: Any, y: Any) -> Interval:
    x, y = interval(x), interval(y)
    result = _ends(x, y)
    return result.widened(POINTWISE_ERROR * result.magnitude)


def average(target: Any, x: Interval, *args: Any, **kwargs: Any) -> Interval:
    magnitude = target(x.magnitude, *args, **kwargs).abs()
    low, high = target(x.low, *args, **kwargs), target(x.high, *args, **kwargs)
    # The sum may be rounded before it is divided: an error of the same size, relative to the result. In 16 bits some of
    # eager mode's pools round the partial sums too.
    partial = torch.finfo(x.dtype).eps if x.dtype in ROUNDED else 0.0
    return Interval(low, high).of_type(x.dtype).widened((ACCUMULATION_ERROR + partial) * magnitude)


def weighted_sum(target: Any, x: Any, weight: Any, bias: Any = None, *args: Any, **kwargs: Any) -> Interval:
    """Convolution and linear."""
    shape = interval(weight).shape
    terms = math.prod(shape) // max(shape[0], 1)
    return _bilinear(
        lambda a, b: target(a, b, None, *args, **kwargs), x, weight, _channels(target, bias, weight), terms
    )


def transposed_convolution(target: Any, x: Any, weight: Any, bias: Any, stride: int, *geometry: Any) -> Interval:
    """In 16 bits eager mode rounds what each tap of the kernel contributes, and each sum of such contributions."""
    x, shape = interval(x), interval(weight).shape

    def multiply(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return target(a, b, None, stride, *geometry)

    terms = math.prod(shape) // max(shape[1], 1)
    result = _bilinear(multiply, x, weight, _channels(target, bias, weight), terms)
    if x.dtype not in ROUNDED:
        return result
    taps = math.prod(-(-size // stride) for size in shape[2:])
    return result.widened((taps + 1) * torch.finfo(x.dtype).eps / 2 * multiply(x.magnitude, interval(weight).magnitude))


def _channels(target: Any, bias: Any, weight: Any) -> Any:
    """The bias in the shape in which it is added."""
    if bias is None or target is F.linear:
        return bias
    return movement(torch.Tensor.reshape, interval(bias), (-1, *[1] * (interval(weight).low.dim() - 2)))


def matrix_product(target: Any, x: Any, y: Any) -> Interval:
    return _bilinear(target, x, y, None, interval(x).shape[-1])


def matrix_product_and_sum(target: Any, bias: Any, x: Any, y: Any, *, alpha: float = 1, beta: float = 1) -> Interval:
    scaled = dataclasses.replace(product(target, x, alpha), dtype=interval(x).dtype)
    return _bilinear(torch.matmul, scaled, y, product(target, bias, beta), interval(x).shape[-1])


def _bilinear(multiply: Callable[..., torch.Tensor], x: Any, y: Any, bias: Any, terms: int) -> Interval:
    """A product whose elements are sums of so many terms."""
    x, y = interval(x), interval(y)
    center = multiply(x.center, y.center)
    magnitude = multiply(x.magnitude, y.magnitude)
    radius = multiply(x.radius, y.magnitude) + multiply(x.magnitude, y.radius)
    result = Interval(center - radius, center + radius)
    if bias is not None:
        result = result.of_type(x.dtype)  # a kernel may round the product before it adds
        added = interval(bias)
        result = Interval(result.low + added.low, result.high + added.high)
        magnitude = magnitude + added.magnitude
    return result.widened((ACCUMULATION_ERROR + TERM_ERROR * terms) * magnitude)


def quantize(
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


def cast(target: Any, x: Any, dtype: torch.dtype) -> Interval:
    return interval(x).of_type(dtype)


def dequantize(
    target: Any, x: Any, scale: Any, zero_point: Any, *rest: Any, out_dtype: torch.dtype | None = None
) -> Interval:
    x, zero_point = interval(x), _number(zero_point).low
    result = _ends(Interval(x.low - zero_point, x.high - zero_point), _number(scale))
    # The scale is rounded to float32, then the product.
    return result.widened(POINTWISE_ERROR * result.magnitude).of_type(out_dtype or torch.float32)


def dequantize_rows(target: Any, x: Any, scales: Any, zero_points: Any, *rest: Any) -> Interval:
    return dequantize(target, x, scales, zero_points)


def dequantize_channels(
    target: Any, x: torch.Tensor, *arguments: Any, out_dtype: torch.dtype = torch.float32
) -> Interval:
    """A weight's constant integers."""
    return Interval.exact(target(x, *arguments)).of_type(out_dtype)
