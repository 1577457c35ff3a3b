"""What Inductor makes of a cat of int8 images: each is computed at its place in the result, or copied there, all at once.

Inductor itself calls eager mode's cat, which takes longer than the convolutions around it. Beside what `lowering` relies on,
this relies on `ConcatKernel`, a buffer that nothing computes: its inputs have a `NonOwningLayout`, a view of it. Such a
layout has Inductor allocate the whole before the part, and keeps it from handing the part's memory on; the whole's it
hands on after the last operator that reads it under its name, so that who reads a part must have done so by then.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch._inductor import ir
from torch._inductor.lowering import register_lowering
from torch._inductor.virtualized import V

from inductor_x86q.graph import aliasing, qdq
from inductor_x86q.graph.library import CAT
from inductor_x86q.inductor.lowering.placement import Pixels, buffer, contiguous, ints, pixels
from inductor_x86q.inductor.lowering.rows import compute


def place(node: fx.Node) -> ir.ReinterpretView | None:
    """The part of a cat's result that is the node's value; None where the value needs memory of its own.

    It may lie there if all else that reads it is done before the cat is: is needed to compute the cat.
    """
    for cat in node.users:
        images: Any = cat.args[0] if cat.target is CAT else []
        if images.count(node) == 1 and aliasing.readers(node) - {cat} <= qdq.compute_ancestors(cat):
            start = sum(_channels(image) for image in images[: images.index(node)])
            return _part(_result(cat), start, _channels(node))
    return None


def _channels(node: fx.Node) -> int:
    return int(qdq.value(node).shape[1])


def _part(whole: ir.StorageBox, start: int, channels: int) -> ir.ReinterpretView:
    n, _, h, w = ints(whole.get_size())
    sizes, strides = [n, channels, h, w], ints(whole.get_stride())
    layout = ir.FixedLayout(torch.device("cpu"), whole.get_dtype(), sizes, strides, offset=start)
    return ir.ReinterpretView(data=whole, layout=layout)


def _result(cat: fx.Node) -> ir.StorageBox:
    """The buffer of a cat's result, made when the first of its parts asks for it; itself in that of another cat it may be."""
    results: dict[fx.Node, ir.StorageBox] = V.graph.__dict__.setdefault("_x86q_cats", {})
    if cat not in results:
        value, around = qdq.value(cat), place(cat)
        own = contiguous(ints(value.shape), value.dtype, "conv")
        kernel = ir.ConcatKernel(name=None, layout=own if around is None else ir.NonOwningLayout(around), inputs=[])
        kernel.name = V.graph.register_buffer(kernel)
        results[cat] = ir.StorageBox(kernel)
    return results[cat]


def _lower(images: Sequence[Any]) -> Any:
    cat: Any = V.graph.current_node
    whole = _result(cat)
    kernel: Any = whole.data
    copied = []
    start = 0
    for image, node in zip(images, cat.args[0], strict=True):
        image.realize()
        if in_place := _in_place(image, node, whole):
            kernel.inputs.append(in_place)
        else:
            copied.append((pixels(image, "conv"), start))
        start += _channels(node)
    if copied:
        kernel.inputs.append(_copies(whole, copied))
    V.graph.register_operation(kernel)
    return ir.TensorBox(whole)


def _in_place(image: Any, node: fx.Node, whole: ir.StorageBox) -> Any:
    """The buffer of an image that is computed where it belongs, or now will be; None where it has to be copied."""
    if not isinstance(image.data, ir.StorageBox):
        return None
    layout = buffer(image).layout
    if isinstance(layout, ir.NonOwningLayout):
        return buffer(image) if layout.view.data is whole else None
    part = place(node)  # which may be in another cat
    if part is None or part.data is not whole or not ir.ConcatKernel.can_realize_into_without_copy(image):
        return None
    return ir.ConcatKernel.realize_into(image, part)


def _copies(whole: ir.StorageBox, copied: Sequence[tuple[Pixels, int]]) -> Any:
    """The kernel that copies images to where they lie in another: from which of its channels on."""
    view = _part(whole, 0, int(whole.get_size()[1]))
    layout = view.get_layout()
    n, _, h, w = ints(layout.size)

    def row(starts: Sequence[str]) -> str:
        begin, copy = [], []
        for number, ((x, channel), start) in enumerate(zip(copied, starts, strict=True)):
            begin.append(f"const auto* from{number} = {start} + h * {x.strides[1]};")
            copy.append(f"    std::memcpy(to + {channel}, from{number}, {x.sizes[3]});")
            copy.append(f"    from{number} += {x.strides[2]};")
        loop = f"for (int64_t w = 0; w < {w}; ++w, to += {int(layout.stride[3])}) {{"
        return "\n".join([*begin, loop, *copy, "}"])

    bytes_ = sum(n * h * w * x.sizes[3] for x, _ in copied)
    return buffer(compute(layout, [x for x, _ in copied], bytes_, row, view))


register_lowering(CAT, type_promotion_kind=None)(_lower)
