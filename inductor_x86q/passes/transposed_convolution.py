"""A transposed convolution of int8 becomes an ordinary one of stride 1, whose channels are the phases of its outputs.

With a stride s the outputs q·s + r of one phase r read the inputs by the same taps, shifted with q: a convolution each.
All of them together are one convolution with s times as many channels, which are put side by side behind it, as a pixel
shuffle does. Where phases differ in which inputs they read, its window spans those of all, with zeros for the others.
"""

from __future__ import annotations

import dataclasses
import itertools
import math

import torch
from torch import fx

from inductor_x86q.graph import layers, operators, qdq, weights
from inductor_x86q.graph.operators import Role
from inductor_x86q.graph.reasons import No
from inductor_x86q.graph.weights import Weight
from inductor_x86q.passes.stage import Rule

aten = torch.ops.aten


@dataclasses.dataclass(frozen=True)
class _Dimension:
    """Along one dimension of the image: which tap each phase has at each place of the common window, and what is cut off."""

    taps: list[dict[int, int]]  # of each phase: place in the window to tap
    window: int
    padding: int
    before: int  # how many results of the convolution are too many on either side
    after: int
    rest: int  # how many of the last outputs side by side are too many


@dataclasses.dataclass(frozen=True)
class _Found:
    weight: Weight
    dimensions: list[_Dimension]


def _dimension(taps: int, stride: int, padding: int, dilation: int, more: int) -> _Dimension:
    """What output q·stride + phase reads: input q + (phase + padding - tap·dilation) / stride, where that is an integer."""
    reads = [
        {
            (phase + padding - tap * dilation) // stride: tap
            for tap in range(taps)
            if not (phase + padding - tap * dilation) % stride
        }
        for phase in range(stride)
    ]
    places = [place for phase in reads for place in phase]
    first, last = min(places), max(places)
    # There are inputs·stride + surplus outputs, which are inputs + extra of each phase, less the rest.
    surplus = dilation * (taps - 1) + more + 1 - 2 * padding - stride
    extra = -(-surplus // stride)
    pad = max(-first, extra + last, 0)
    return _Dimension(
        taps=[{place - first: tap for place, tap in phase.items()} for phase in reads],
        window=last - first + 1,
        padding=pad,
        before=pad + first,
        after=pad - last - extra,
        rest=extra * stride - surplus,
    )


def _find(node: fx.Node) -> _Found | No:
    arguments = qdq.schema_arguments(node)
    x, bias = arguments["input"], arguments["bias"]
    weight = weights.read(arguments["weight"])
    if not arguments["transposed"] or not qdq.is_dequantize(x) or weight is None:
        return No("it is no transposed convolution of a dequantized input and a quantized weight")
    if weight.axis != 1 and not weight.has_one_grid:
        return No("its weight is quantized along another dimension than that of its outputs")
    if qdq.qparams(x).dtype != torch.uint8 or weight.dtype != torch.int8 or weight.zero_point.count_nonzero():
        return No("no kernel takes its types or its weight's zero points")
    if bias is not None and qdq.constant(bias) is None:
        return No("its bias is computed at run time")
    image = qdq.value(x).shape[2:]
    if len(image) + 2 != weight.integers.dim() or not all(isinstance(size, int) and size for size in image):
        return No("its image's size is not known when compiling")
    more = layers.full(arguments["output_padding"], len(image))
    stride, padding, dilation = (layers.full(arguments[name], len(image)) for name in ("stride", "padding", "dilation"))
    sizes = (weight.integers.shape[2:], stride, padding, dilation, more)
    dimensions = [_dimension(*numbers) for numbers in zip(*sizes, strict=True)]
    if any(dimension.padding >= dimension.window for dimension in dimensions):
        return No("some of its outputs may read padding only, which the kernels get wrong")
    return _Found(weight, dimensions)


def _phases(weight: Weight, dimensions: list[_Dimension], groups: int) -> Weight:
    """The weight of the convolution: (inputs, outputs, *taps) of each group to (outputs·phases, inputs, *window)."""
    inputs, outputs, *taps = weight.integers.shape
    grouped = weight.integers.view(groups, inputs // groups, outputs, *taps).transpose(1, 2)
    flat = grouped.reshape(groups * outputs, inputs // groups, *taps)
    strides = [len(dimension.taps) for dimension in dimensions]
    found = flat.new_zeros(len(flat), *strides, inputs // groups, *(dimension.window for dimension in dimensions))
    for phase in itertools.product(*map(range, strides)):
        reads = [dimension.taps[number].items() for dimension, number in zip(dimensions, phase, strict=True)]
        for chosen in itertools.product(*reads):
            places, read = zip(*chosen, strict=True)
            found[(slice(None), *phase, slice(None), *places)] = flat[(slice(None), slice(None), *read)]

    def of_each_channel(tensor: torch.Tensor) -> torch.Tensor:
        one_each = tensor[:1].expand(outputs) if weight.axis != 1 else tensor
        return one_each.repeat(groups).repeat_interleave(math.prod(strides))

    return dataclasses.replace(
        weight,
        integers=found.flatten(0, len(strides)),
        scale=of_each_channel(weight.scale),
        zero_point=of_each_channel(weight.zero_point),
        axis=0,
    )


def _rewrite(node: fx.Node, found: _Found) -> fx.Node | None:
    """The convolution with all phases, the activation behind it, then the movement that puts the phases side by side."""
    weight, dimensions = found.weight, found.dimensions
    arguments = qdq.schema_arguments(node)
    groups, bias = arguments["groups"], qdq.constant(arguments["bias"])
    strides = [len(dimension.taps) for dimension in dimensions]
    operands = (
        arguments["input"],
        weights.emit(_phases(weight, dimensions, groups), like=node),
        None if bias is None else qdq.new_constant(bias.detach().repeat_interleave(math.prod(strides)), like=node),
    )
    ones, padding = [1] * len(dimensions), [dimension.padding for dimension in dimensions]
    geometry = (ones, padding, ones, False, [0] * len(dimensions), groups)
    new = qdq.call(aten.convolution.default, *operands, *geometry, like=node)
    user, replaced = qdq.only_user(node), node
    if user is not None and operators.role(user) is Role.ACTIVATION:  # one phase's elements are as good as another's
        new, replaced = qdq.call(user.target, new, *user.args[1:], like=user, **user.kwargs), user
    new = _side_by_side(new, dimensions, strides, like=node)
    if replaced is node:
        return new
    replaced.replace_all_uses_with(new)
    qdq.erase_dead(replaced)
    return None


def _side_by_side(x: fx.Node, dimensions: list[_Dimension], strides: list[int], *, like: fx.Node) -> fx.Node:
    """(batch, channels·phases, *image) to (batch, channels, *image·strides), without what is too many."""
    for axis, dimension in enumerate(dimensions, 2):
        x = _cut(x, axis, dimension.before, dimension.after, like=like)
    if math.prod(strides) == 1:
        return x
    count, (_, channels, *image) = len(strides), qdq.value(x).shape
    outputs = channels // math.prod(strides)
    x = qdq.call(aten.reshape.default, x, [-1, outputs, *strides, *image], like=like)
    pairs = itertools.chain.from_iterable((2 + count + n, 2 + n) for n in range(count))
    x = qdq.call(aten.permute.default, x, [0, 1, *pairs], like=like)
    sizes = [size * stride for size, stride in zip(image, strides, strict=True)]
    x = qdq.call(aten.reshape.default, x, [-1, outputs, *sizes], like=like)
    for axis, dimension in enumerate(dimensions, 2):
        x = _cut(x, axis, 0, dimension.rest, like=like)
    return x


def _cut(x: fx.Node, axis: int, before: int, after: int, *, like: fx.Node) -> fx.Node:
    if not before and not after:
        return x
    return qdq.call(aten.slice.Tensor, x, axis, before, qdq.value(x).shape[axis] - after, like=like)


RULES = (Rule("transposed convolution", (aten.convolution.default,), _find, _rewrite),)
