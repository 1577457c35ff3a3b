"""A call of oneDNN as a kernel of ours would compute it, or why none does."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from inductor_x86q import cpu
from inductor_x86q.graph.calls import Call
from inductor_x86q.kernels.convolution import ACTIVATIONS, CPP_TYPES, Convolution, Epilogue

# Convolutions take images of so few channels as they come, pixels or planes: their bytes are copied anyhow, and the copy takes
# planes in a fraction of the time in which Inductor turns them into pixels.
FEW_CHANNELS = 4


def describe(
    layer: Call, image: Sequence[int], output: Sequence[int], kernel: Sequence[int], x_dtype: torch.dtype
) -> Convolution:
    """The convolution of an image (n, h, w, c) that gives `output`'s shape; a linear is one of 1×1 on its rows."""
    n, h, w, c = image
    is_conv = layer.family == "conv"
    stride, padding, dilation, groups = layer.geometry if is_conv else ((1, 1), (0, 0), (1, 1), 1)
    out_c = output[1] if is_conv else output[-1]
    return Convolution(
        n=n,
        h=h,
        w=w,
        c=c,
        out_c=out_c,
        kernel=_pair(kernel),
        stride=_pair(stride),
        padding=_pair(padding),
        dilation=_pair(dilation),
        groups=groups,
        lanes=lanes(c, vectors=4) if groups == c > 1 else lanes(out_c // groups),
        x_signed=x_dtype == torch.int8,
        fits_16=not cpu.has_vnni(),
    )


def lanes(channels: int, vectors: int = 1) -> int:
    """How wide vectors are best for so many neighbouring output channels, which a kernel takes in so many `vectors`.

    The widest, unless narrow ones leave less of them empty at no more cost. Where a wide instruction is run as two halves
    it costs as much as two narrow ones, but for what it saves in decoding.
    """
    widest = cpu.int8_lanes()
    narrow, wide = (math.ceil(channels / (width * vectors)) for width in (8, 16))
    return min(widest, 8) if narrow <= (1.7 if cpu.halves_512() else 1) * wide else widest


def _pair(values: Sequence[int]) -> tuple[int, int]:
    vertical, horizontal = values
    return int(vertical), int(horizontal)


def epilogue(layer: Call, other_dtype: torch.dtype | None) -> Epilogue:
    return Epilogue(layer.output_dtype, layer.unary.name, other_dtype)


def obstacle(layer: Call, convolution: Convolution, other_dtype: torch.dtype | None) -> str:
    """Why no kernel of ours computes the layer; empty where one does."""
    for dtype, what in ((layer.output_dtype, "an output"), (other_dtype, "an addition")):
        if dtype is not None and dtype not in CPP_TYPES:
            return f"{what} of {dtype}"
    if layer.unary.name not in ACTIVATIONS:
        return f"the activation {layer.unary.name}"
    if convolution.groups > 1 and convolution.c == convolution.groups and not convolution.depthwise:
        return "a depthwise convolution with more than one output of a channel"
    if convolution.depthwise and layer.binary is not None:
        return "a depthwise convolution with an addition"
    return ""
