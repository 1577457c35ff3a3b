"""A call of oneDNN as a kernel of ours would compute it, or why none does."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from inductor_x86q import _cpu
from inductor_x86q.passes.fuse.call import Call
from inductor_x86q.templates.convolution import ACTIVATIONS, CPP_TYPES, Convolution, Epilogue


def describe(
    layer: Call, image: Sequence[int], output: Sequence[int], kernel: Sequence[int], x_dtype: torch.dtype
) -> Convolution:
    """The convolution of an image (n, h, w, c) that gives `output`'s shape; a linear is one of 1×1 on its rows."""
    n, h, w, c = image
    geometry = [((1, 1), (0, 0), (1, 1), 1), layer.geometry][layer.family == "conv"]
    stride, padding, dilation, groups = geometry
    out_c = output[1] if layer.family == "conv" else output[-1]
    (kernel_h, kernel_w), pairs = kernel, [(int(a), int(b)) for a, b in (stride, padding, dilation)]
    return Convolution(
        *(n, h, w, c, out_c, (kernel_h, kernel_w), *pairs, groups),
        x_signed=x_dtype == torch.int8,
        fits_16=not _cpu.has_vnni(),
    )


def epilogue(layer: Call, other_dtype: torch.dtype | None) -> Epilogue:
    scalars = tuple(float(value) for value in layer.unary.scalars)
    return Epilogue(layer.output_dtype, layer.unary.name, scalars, other_dtype)


def obstacle(layer: Call, convolution: Convolution, other_dtype: torch.dtype | None) -> str:
    """Why no kernel of ours computes the layer; empty where one does."""
    if layer.output_dtype not in CPP_TYPES or other_dtype not in (None, *CPP_TYPES):
        return f"it gives {layer.output_dtype}" if layer.output_dtype not in CPP_TYPES else f"it adds {other_dtype}"
    if layer.unary.name not in ACTIVATIONS:
        return f"the activation {layer.unary.name}"
    if not all(math.isfinite(value) for value in layer.unary.scalars):
        return f"the activation {layer.unary.name} with infinite bounds"
    if convolution.groups > 1 and convolution.c == convolution.groups and not convolution.depthwise:
        return "a depthwise convolution with more than one output of a channel"
    if convolution.depthwise and convolution.c < _cpu.int8_lanes():
        return f"a depthwise convolution of {convolution.c} channels"
    if convolution.depthwise and layer.binary is not None:
        return "a depthwise convolution with an addition"
    return ""
