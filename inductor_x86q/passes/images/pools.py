"""Pools of int8 images, part of the images stage: a maximum of integers, or their sum, where that rounds as the reals do."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import fx

from inductor_x86q.graph import layers, qdq
from inductor_x86q.graph.library import AVERAGE_POOL, MAX_POOL, POOL
from inductor_x86q.graph.reasons import No
from inductor_x86q.passes.images.image import call, have_sizes
from inductor_x86q.passes.stage import Rule

aten = torch.ops.aten


def _find_max(node: fx.Node) -> fx.Node | No:
    x = qdq.operand(node)
    return x if have_sizes(qdq.value(x), qdq.value(node)) else No("a size is not known when compiling, or is 0")


def _rewrite_max(node: fx.Node, x: fx.Node) -> fx.Node:
    from inductor_x86q.inductor.lowering import pool  # noqa: F401  registers with Inductor, which is slow to import

    return call(MAX_POOL, x, *node.args[1:], like=node)


# --- averages ---------------------------------------------------------------------------------------------------------

FEWEST_CHANNELS = 4  # which are summed up side by side, in a number each
LARGEST_WINDOW = 128  # of which a sum fits into 16 bits
LARGEST_ZERO_POINT = 1024  # up to which single precision loses little of a sum
# How many of the possible sums may lie at a tie. The order of float additions decides there, and the kernel has none.
TIES = 0.01


@dataclasses.dataclass(frozen=True)
class _Window:
    """What a pool takes averages of, in the order of our operator's arguments; a number for each dimension."""

    kernel: list[int]
    stride: list[int]
    padding: list[int]
    count_include_pad: bool
    divisor: int | None


def _find_average(node: fx.Node) -> _Window | No:
    pool = qdq.operand(node)
    if pool.target is not aten.avg_pool2d.default or any(user.target is not qdq.QUANTIZE for user in pool.users):
        return No("it quantizes no average pool, or one whose reals are read too", (pool,))
    x = qdq.operand(pool)
    if not qdq.is_dequantize(x) or qdq.value(pool).dtype != torch.float32:
        return No("the pool does not read an int8 image", (x,))
    before, after = qdq.qparams(x), qdq.qparams(node)
    if not all(p.is_static and p.axis is None and p.dtype in qdq.INT8_TYPES for p in (before, after)):
        return No("the scales are not numbers, or the types not int8")
    image, result = qdq.value(x), qdq.value(node)
    if image.dim() != 4 or not have_sizes(image, result):
        return No("a size is not known when compiling, or is 0, or there is no batch dimension")
    if image.shape[1] < FEWEST_CHANNELS:
        return No("it has very few channels")
    arguments = qdq.schema_arguments(pool)
    kernel, stride, padding = (layers.full(arguments[name], 2) for name in ("kernel_size", "stride", "padding"))
    window = _Window(kernel, stride or kernel, padding, arguments["count_include_pad"], arguments["divisor_override"])
    if math.prod(window.kernel) > LARGEST_WINDOW:
        return No("its window is so large that sums may not fit into 16 bits")
    sizes = zip(result.shape[2:], window.stride, window.kernel, image.shape[2:], window.padding, strict=True)
    if arguments["ceil_mode"] and any(
        (size - 1) * step + width > whole + 2 * around for size, step, width, whole, around in sizes
    ):
        return No("its last windows reach beyond the padding")
    return _checked(before, after, window)


def _checked(before: qdq.QParams, after: qdq.QParams, window: _Window) -> _Window | No:
    if max(abs(before.zero_point), abs(after.zero_point)) > LARGEST_ZERO_POINT or after.quant_min > after.quant_max:
        return No("a zero point is far outside of the type's range, or the range empty")
    if window.divisor == 0 or not after.scale or not 1e-30 < abs(before.scale / after.scale) < 1e30:
        return No("the divisor is 0, or a scale, or the scales lie very far apart")
    area, (rows, columns) = math.prod(window.kernel), window.kernel
    counts = {i * j for i in range(1, rows + 1) for j in range(1, columns + 1)}
    if window.divisor is not None or window.count_include_pad or not any(window.padding):
        counts = {window.divisor or area}
    if any(_ties(before, after, area, count) > TIES for count in counts):
        return No("many of its results lie between two integers, where the order of float additions decides")
    return window


def _ties(before: qdq.QParams, after: qdq.QParams, window: int, count: int) -> float:
    """Which part of the possible sums of a window gives a quotient so near to a tie that rounding decides."""
    whole = torch.iinfo(before.dtype)
    low, high = (window * (value - before.zero_point) for value in (whole.min, whole.max))
    quotients = torch.arange(min(low, 0), max(high, 0) + 1, dtype=torch.float64) * (before.scale / after.scale / count)
    distances = (quotients - quotients.floor() - 0.5).abs()
    saturated = (quotients < after.quant_min - after.zero_point) | (quotients > after.quant_max - after.zero_point)
    near = (distances < 2**-20 * quotients.abs().clamp_min(1)) & ~saturated
    return int(near.sum()) / max(int((~saturated).sum()), 1)


def _rewrite_average(node: fx.Node, window: _Window) -> fx.Node:
    from inductor_x86q.inductor.lowering import pool  # noqa: F401  registers with Inductor, which is slow to import

    x = qdq.operand(qdq.operand(node))
    before, after = qdq.qparams(x), qdq.qparams(node)
    arguments = (before.scale, before.zero_point, *dataclasses.astuple(window), *after.arguments())
    return call(AVERAGE_POOL, x.args[0], *arguments, like=node)


RULES = (
    Rule("max pool of images", (POOL,), _find_max, _rewrite_max),
    Rule("average pool of images", (qdq.QUANTIZE,), _find_average, _rewrite_average),
)
