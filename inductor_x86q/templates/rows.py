"""A kernel that computes an int8 image from others, a row of pixels after the other; threads share the rows."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from typing import Any

from torch._inductor import config, ir
from torch._inductor.codegen.cpp_template import CppTemplate
from torch._inductor.utils import IndentedBuffer, parallel_num_threads

from inductor_x86q.templates.images import Pixels, buffer, ints

# A thread more pays where it saves more than waking it costs, which is about the time in which one copies so many bytes.
BYTES_PER_THREAD = 32_768


def compute(
    layout: ir.Layout, images: Sequence[Pixels], bytes_: int, row: Callable[[Sequence[str]], str], part: Any = None
) -> Any:
    """The image that a kernel computes, in `part` of a larger one where there is one.

    Args:
        layout: of the result (n, c, h, w), whose rows lie at one distance from each other.
        images: what is read.
        bytes_: as long as how many bytes take to copy the kernel takes, about.
        row: gives the C++ of a row, from that of the addresses where image number `n` of each of `images` begins.
            It computes row `h`, from the address `to` on.
    """
    box = _RowKernel(layout, images, bytes_, row).generate().output_node()
    computed = buffer(box)
    computed.allow_epilogue_fusion = False
    if part is not None:
        computed.layout = ir.NonOwningLayout(part)
    return box


class _RowKernel(CppTemplate):
    def __init__(
        self, layout: ir.Layout, images: Sequence[Pixels], bytes_: int, row: Callable[[Sequence[str]], str]
    ) -> None:
        buffers = {image.buffer.get_name(): image.buffer for image in images}
        self._images, self._row, self._layout = images, row, layout
        self._threads = min(parallel_num_threads(), max(1, bytes_ // BYTES_PER_THREAD))
        super().__init__("x86q_rows", list(buffers.values()), layout, self._threads)

    def header(self) -> IndentedBuffer:
        lines = IndentedBuffer()
        lines.splice("#include <omp.h>\n\n#include <cstdint>\n#include <cstring>")
        if config.cpp.enable_kernel_profile:
            lines.writeline("#include <torch/csrc/inductor/aoti_runtime/utils.h>")
        return lines

    def render(  # type: ignore[override]
        self, kernel: Any, template_buffer_node: Any = None, epilogue_nodes: Any = None, **_: Any
    ) -> str:
        assert not epilogue_nodes
        if template_buffer_node is not None:
            self.output_node = template_buffer_node
        inputs = {f"x{number}": node for number, node in enumerate(self.input_nodes)}
        definition = kernel.def_kernel(inputs=inputs, outputs={"out": self.output_node})
        names = {node.get_name(): name for name, node in inputs.items()}
        starts = [f"{names[x.buffer.get_name()]} + {x.offset} + n * {x.strides[0]}" for x in self._images]
        threads = "omp_get_max_threads()" if config.cpp.dynamic_threads and self._threads > 1 else self._threads
        n, _c, h, _w = ints(self._layout.size)
        return f"""\
{self.header().getvalue()}
extern "C" {definition}
{{
    {kernel.maybe_codegen_profile() if template_buffer_node is not None else ""}
    #pragma omp parallel for num_threads({threads}) if ({self._threads} != 1)
    for (int64_t row = 0; row < {n * h}; ++row) {{
        const int64_t n = row / {h}, h = row % {h};
        auto* to = out + row * {int(self._layout.stride[2])};
{textwrap.indent(self._row(starts), " " * 8)}
    }}
}}
"""
