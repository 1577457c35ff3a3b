"""What Inductor makes of a pool of int8 images: a kernel that takes as many channels at once as a register holds.

Inductor's own lowering of a max pool loads eight bytes at a time through masks; of an average pool it computes each element by
itself. The library's max pool takes 32 channels at once and the rest one by one, and is called through the dispatcher.
"""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Sequence
from typing import Any

import torch
from torch._inductor.lowering import register_lowering
from torch._inductor.virtualized import V

from inductor_x86q import cpu
from inductor_x86q.graph import qdq
from inductor_x86q.graph.library import AVERAGE_POOL, MAX_POOL
from inductor_x86q.inductor.lowering import cat
from inductor_x86q.inductor.lowering.placement import Pixels, contiguous, ints, pixels
from inductor_x86q.inductor.lowering.rows import compute
from inductor_x86q.kernels.epilogue import CPP_TYPES


@dataclasses.dataclass(frozen=True)
class _Reduction:
    """How a window's values become one, as C++ on vectors.

    Attributes:
        vector: the bytes of a `Vector` of values, of channels side by side.
        before: the statements in front of the window's first value.
        step: the statements for each `value`.
        after: the statements behind the last one of the `count`.
        result: a vector's name.
    """

    vector: int
    before: str
    step: str
    after: str
    result: str


def _vector(x: Any, widest: int) -> int:
    """The bytes that are taken at once of an image's channels, no more than there are."""
    channels = int(x.get_size()[1])
    return min(widest, 1 << channels.bit_length() - 1)


def _typedefs(names: dict[str, str], vector: int) -> str:
    return "\n".join(f"typedef {of} {name} __attribute__((vector_size({vector})));" for of, name in names.items())


def _max_pool(
    x: Any,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
) -> Any:
    lowest = torch.iinfo(x.get_dtype()).min
    before = f"Vector most = Vector{{}} + {lowest};"
    reduction = _Reduction(_vector(x, 64), before, "most = value > most ? value : most;", "", "most")
    return _lower(x, [kernel, stride, padding, dilation], reduction)


# So large that adding it to a number below 2**22 rounds that to an integer.
ROUNDING = 1.5 * 2**23


def _average_pool(
    x: Any,
    scale: float,
    zero_point: int,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    count_include_pad: bool,
    divisor: int | None,
    output_scale: float,
    output_zero_point: int,
    low: int,
    high: int,
    dtype: torch.dtype,
) -> Any:
    """The sum of a window in 16 bits, for values with even numbers and with odd ones; what is padding counts as zero point."""
    signed = x.get_dtype() == torch.int8
    if divisor is None and not count_include_pad:
        factor = f"{scale / output_scale!r}f / count"
    else:
        factor = f"{scale / output_scale / (divisor or kernel[0] * kernel[1])!r}f"
    least, most = (f"Reals{{}} + {bound - output_zero_point}.f" for bound in (low, high))
    vector = _vector(x, 4 * (cpu.int8_lanes() or 4))
    types = {"uint16_t": "Pairs", "uint32_t": "Fours", "int32_t": "Integers", "float": "Reals"}
    before = f"""\
{_typedefs(types, vector)}
Pairs both{{}}, odd{{}};
const auto quotient = [&](Fours sum) __attribute__((always_inline)) {{
    Reals real = __builtin_convertvector((Integers)sum, Reals) - float(count * {zero_point + 128 * signed});
    real *= {factor};
    real = real < {least} ? {least} : real;
    real = real > {most} ? {most} : real;
    // Adding so large a number leaves the integer in the lowest bits.
    const Integers rounded = (Integers)(real + {ROUNDING}f) - (Integers)(Reals{{}} + {ROUNDING}f);
    return (Fours)(rounded + {output_zero_point}) & 255;
}};"""
    step = f"""\
const Pairs pairs = (Pairs)value{" ^ 0x8080" if signed else ""};
both += pairs;
odd += pairs >> 8;"""
    result = """\
const auto first = (Fours)(both - (odd << 8)), second = (Fours)odd;
const auto quotients = quotient(first & 65535) | quotient(second & 65535) << 8 | quotient(first >> 16) << 16
    | quotient(second >> 16) << 24;"""
    reduction = _Reduction(vector, before, step, result, "quotients")
    return _lower(x, [kernel, stride, padding, (1, 1)], reduction)


def _lower(x: Any, windows: Sequence[Sequence[int]], reduction: _Reduction) -> Any:
    image = pixels(x, "conv")
    value, part = qdq.value(V.graph.current_node), cat.place(V.graph.current_node)
    layout = contiguous(ints(value.shape), value.dtype, "conv", part)
    # A vector of the window is read in a fraction of the time in which one is copied from memory.
    bytes_ = value.numel() * windows[0][0] * windows[0][1] * 16 // reduction.vector
    kernel = _Windows(image, layout, list(zip(*windows, strict=True)), reduction)
    return compute(layout, [image], bytes_, lambda starts: kernel.row(starts[0]), part)


@dataclasses.dataclass(frozen=True)
class _Windows:
    """The windows of an image, each a kernel size, a stride, a padding and a dilation in both dimensions."""

    image: Pixels
    layout: Any  # of the result
    windows: Sequence[tuple[int, ...]]
    reduction: _Reduction

    def row(self, start: str) -> str:
        """The last channels are taken together with some before, computed twice, instead of being fewer."""
        _, height, width, c = self.image.sizes
        (rows, down, top, apart), (columns, right, left, aside) = self.windows
        vector = self.reduction.vector
        _, row, pixel = self.image.strides
        return f"""\
{_typedefs({CPP_TYPES[self.image.box.get_dtype()]: "Vector"}, vector)}
const auto* from = {start};
const int64_t y = h * {down} - {top};
// Takes the rows and columns of the window that lie in the image; all of them, as constants, unless it is at an edge.
const auto pool = [&](int64_t x, int64_t top, int64_t bottom, int64_t left, int64_t right) __attribute__((always_inline)) {{
    const int64_t count = (bottom - top) * (right - left);
    for (int64_t c = 0; c < {c}; c += {vector}) {{
        if (c + {vector} > {c}) c = {c - vector};
{textwrap.indent(self.reduction.before, " " * 8)}
        for (int64_t i = top; i < bottom; ++i) {{
            for (int64_t j = left; j < right; ++j) {{
                Vector value;
                std::memcpy(&value, from + (y + i * {apart}) * {row} + (x + j * {aside}) * {pixel} + c, {vector});
{textwrap.indent(self.reduction.step, " " * 16)}
            }}
        }}
{textwrap.indent(self.reduction.after, " " * 8)}
        std::memcpy(to + c, &{self.reduction.result}, {vector});
    }}
}};
const auto first = [](int64_t at, int64_t step) {{ return at < 0 ? (step - 1 - at) / step : 0; }};
const auto end = [](int64_t at, int64_t step, int64_t size, int64_t count) {{
    const int64_t fitting = at < size ? (size - at + step - 1) / step : 0;
    return fitting < count ? fitting : count;
}};
const int64_t top = first(y, {apart}), bottom = end(y, {apart}, {height}, {rows});
for (int64_t w = 0; w < {int(self.layout.size[3])}; ++w, to += {int(self.layout.stride[3])}) {{
    const int64_t x = w * {right} - {left}, left = first(x, {aside}), right = end(x, {aside}, {width}, {columns});
    if (bottom - top == {rows} && right - left == {columns}) {{
        pool(x, 0, {rows}, 0, {columns});
    }} else {{
        pool(x, top, bottom, left, right);
    }}
}}"""


register_lowering(MAX_POOL, type_promotion_kind=None)(_max_pool)
register_lowering(AVERAGE_POOL, type_promotion_kind=None)(_average_pool)
