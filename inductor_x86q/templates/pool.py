"""What Inductor makes of a max pool of int8 images: a kernel that takes as many channels at once as a register holds.

Inductor's own lowering loads eight bytes at a time through masks. The library's pool takes 32 channels at once and the rest
one by one, and is called through the dispatcher.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch._inductor import ir
from torch._inductor.lowering import register_lowering
from torch._inductor.virtualized import V

from inductor_x86q import qgraph
from inductor_x86q.templates import cat
from inductor_x86q.templates.convolution import CPP_TYPES
from inductor_x86q.templates.images import Pixels, contiguous, ints, pixels
from inductor_x86q.templates.operators import MAX_POOL
from inductor_x86q.templates.rows import compute

VECTOR = 64  # bytes of the widest registers; compilers take them apart where there are none


def _lower(
    x: Any,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
) -> Any:
    image = pixels(x, "conv")
    value, part = qgraph.value(V.graph.current_node), cat.place(V.graph.current_node)
    layout = contiguous(ints(value.shape), value.dtype, "conv", part)
    windows = list(zip(kernel, stride, padding, dilation, strict=True))
    # A vector of the window is read in a fraction of the time in which one is copied from memory.
    bytes_ = value.numel() * kernel[0] * kernel[1] // 4
    return compute(layout, [image], bytes_, lambda starts: _row(image, starts[0], layout, windows), part)


def _row(image: Pixels, start: str, layout: ir.Layout, windows: Sequence[tuple[int, ...]]) -> str:
    """The last channels are taken together with some before, computed twice, instead of being fewer."""
    _, height, width, c = image.sizes
    (rows, down, top, apart), (columns, right, left, aside) = windows
    vector = min(VECTOR, 1 << c.bit_length() - 1)
    _, row, pixel = image.strides
    lowest = torch.iinfo(layout.dtype).min
    return f"""\
typedef {CPP_TYPES[layout.dtype]} Vector __attribute__((vector_size({vector})));
const auto* from = {start};
const int64_t y = h * {down} - {top};
// Takes the rows and columns of the window that lie in the image; all of them, as constants, unless it is at an edge.
const auto maximum = [&](int64_t x, int64_t top, int64_t bottom, int64_t left, int64_t right) __attribute__((always_inline)) {{
    for (int64_t c = 0; c < {c}; c += {vector}) {{
        if (c + {vector} > {c}) c = {c - vector};
        Vector most = Vector{{}} + {lowest};
        for (int64_t i = top; i < bottom; ++i) {{
            for (int64_t j = left; j < right; ++j) {{
                Vector value;
                std::memcpy(&value, from + (y + i * {apart}) * {row} + (x + j * {aside}) * {pixel} + c, {vector});
                most = value > most ? value : most;
            }}
        }}
        std::memcpy(to + c, &most, {vector});
    }}
}};
const auto first = [](int64_t at, int64_t step) {{ return at < 0 ? (step - 1 - at) / step : 0; }};
const auto end = [](int64_t at, int64_t step, int64_t size, int64_t count) {{
    const int64_t fitting = at < size ? (size - at + step - 1) / step : 0;
    return fitting < count ? fitting : count;
}};
const int64_t top = first(y, {apart}), bottom = end(y, {apart}, {height}, {rows});
for (int64_t w = 0; w < {int(layout.size[3])}; ++w, to += {int(layout.stride[3])}) {{
    const int64_t x = w * {right} - {left}, left = first(x, {aside}), right = end(x, {aside}, {width}, {columns});
    if (bottom - top == {rows} && right - left == {columns}) {{
        maximum(x, 0, {rows}, 0, {columns});
    }} else {{
        maximum(x, top, bottom, left, right);
    }}
}}"""


register_lowering(MAX_POOL, type_promotion_kind=None)(_lower)
