"""Tensors in Inductor's hands as images of pixels: where each lies, and in which buffer."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch._inductor import ir
from torch._inductor.virtualized import V


@dataclasses.dataclass(frozen=True)
class Pixels:
    """A tensor as images of pixels: its sizes n, h, w, c and the strides of an image, a row, a pixel and a channel.

    What is not known when compiling is Inductor's expression of it.
    """

    box: Any
    sizes: tuple[Any, ...]
    strides: tuple[Any, Any, Any]
    channel: Any = 1
    planes: Any = 1  # of an image, and their stride
    plane: Any = 0

    @property
    def buffer(self) -> Any:
        return buffer(self.box)

    @property
    def offset(self) -> Any:
        (offset,) = ints([self.box.get_layout().offset])
        return offset

    @property
    def is_even(self) -> bool:
        """Whether all pixels lie at one distance from each other."""
        _, h, w, _ = self.sizes
        image, row, pixel = self.strides
        plane_is_even = self.planes == 1 or _equal(self.plane, h * row)
        return _equal(row, w * pixel) and plane_is_even and _equal(image, self.planes * h * row)


def pixels(box: Any, family: str, *, even: bool = False) -> Pixels:
    """The pixels of an image, or of one line, which a linear's rows are.

    An image whose channels lie apart is copied; so is one whose pixels lie at several distances, if they are to be
    `even`. Nothing less would do: channels innermost is all that Inductor can be asked for, and it takes gaps for that.
    """
    if family == "linear":
        box.realize()  # once, not again behind each view of it
        box = laid_out(box, ir.ExternKernel.require_contiguous)
        *rows, c = ints(box.get_size()) or [1]
        return Pixels(box, (1, 1, math.prod(rows), c), (math.prod(rows) * c, math.prod(rows) * c, c))
    three = len(box.get_size()) == 5
    channels_last = ir.ExternKernel.require_channels_last_3d if three else ir.ExternKernel.require_channels_last
    found = image(laid_out(box, channels_last))
    if found.channel != 1 or (even and not found.is_even):
        found = image(channels_last(ir.ExternKernel.copy_input(box)))
    return found


def laid_out(box: Any, require: Callable[[Any], Any]) -> Any:
    """What `require` gives; a view of one single element it leaves as it is, without strides, and that is copied."""
    found = require(box)
    return found if found.maybe_get_layout() is not None else require(ir.ExternKernel.copy_input(box))


def image(box: Any) -> Pixels:
    """The pixels of a tensor (n, c, h, w), or (n, c, d, h, w)."""
    stride = ints(box.get_stride())
    n, c, *depth, h, w = ints(box.get_size())
    planes = depth[0] if depth else 1
    # A stride along one single element means nothing, whatever it says.
    channel = stride[1] if c > 1 else 1
    pixel = c if _equal(w, 1) else stride[-1]
    row = w * pixel if _equal(h, 1) else stride[-2]
    plane = h * row if _equal(planes, 1) else stride[2]
    first = planes * plane if _equal(n, 1) else stride[0]
    return Pixels(box, (n, h, w, c), (first, row, pixel), channel, planes, plane)


def _equal(a: Any, b: Any) -> bool:
    """Whether two sizes are, whatever those are that are not known when compiling."""
    return bool(a == b) if isinstance(a, int) and isinstance(b, int) else V.graph.sizevars.statically_known_equals(a, b)


def contiguous(
    size: list[int], dtype: torch.dtype, family: str, part: ir.ReinterpretView | None = None
) -> ir.FixedLayout:
    """The layout of images pixel by pixel, or of a linear's rows; that of `part` of a larger image where there is one."""
    order = list(reversed(range(len(size))))
    if family == "conv":  # channels innermost
        order = [order[0], 0, *order[1:-1]]
    stride = ir.FlexibleLayout.stride_ordered(size, order) if part is None else ints(part.get_stride())
    return ir.FixedLayout(torch.device("cpu"), dtype, size, stride)


def buffer(box: Any) -> Any:
    """The buffer in which a tensor lies."""
    node = box.data
    while isinstance(node, (ir.StorageBox, ir.BaseView)):
        node = node.data
    return node


def ints(values: Any) -> list[Any]:
    """Sizes or strides: numbers, but for what is not known when compiling, which is Inductor's expression of it."""
    return [int(value) if value.is_number else value for value in ir.convert_shape_to_inductor(values)]
