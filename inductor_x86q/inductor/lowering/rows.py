"""A kernel that computes an int8 image from others, a row of pixels after the other; threads share the rows."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from typing import Any

from torch._inductor import ir

from inductor_x86q.inductor.lowering.placement import Pixels, ints
from inductor_x86q.inductor.lowering.template import Template, computed

# A thread more pays where it saves more than waking it costs, which is about the time in which one copies so many bytes.
BYTES_PER_THREAD = 32_768


def compute(
    layout: ir.Layout,
    images: Sequence[Pixels],
    bytes_: int,
    row: Callable[[Sequence[str]], str],
    part: ir.ReinterpretView | None,
) -> Any:
    """The image that a kernel computes.

    Args:
        layout: of the result (n, c, h, w), whose rows lie at one distance from each other.
        images: what is read.
        bytes_: as long as how many bytes take to copy the kernel takes, about.
        row: gives the C++ of a row, from that of the addresses where image number `n` of each of `images` begins.
            It computes row `h`, from the address `to` on.
        part: the part of a larger image that the result is, if any.
    """
    return computed(_Rows(layout, images, bytes_, row).generate().output_node(), part)


class _Rows(Template):
    def __init__(
        self, layout: ir.Layout, images: Sequence[Pixels], bytes_: int, row: Callable[[Sequence[str]], str]
    ) -> None:
        buffers = {image.buffer.get_name(): image.buffer for image in images}
        inputs = {f"x{number}": read for number, read in enumerate(buffers.values())}
        self._images, self._row, self._layout = images, row, layout
        super().__init__("x86q_rows", inputs, layout, bytes_, BYTES_PER_THREAD)

    def shared(self) -> Sequence[str]:
        return ("#include <omp.h>\n\n#include <cstdint>\n#include <cstring>\n",)

    def body(self, name: str) -> str:
        n, _c, h, _w = ints(self._layout.size)
        starts = [f"{self.address(image)} + n * {image.strides[0]}" for image in self._images]
        return f"""\
#pragma omp parallel for num_threads({self.threads or "omp_get_max_threads()"}) if ({self.threads} != 1)
for (int64_t row = 0; row < {n * h}; ++row) {{
    const int64_t n = row / {h}, h = row % {h};
    auto* to = out + row * {int(self._layout.stride[2])};
{textwrap.indent(self._row(starts), "    ")}
}}"""
