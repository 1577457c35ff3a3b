"""Max pool on uint8 tensors becomes the library's int8 pool, which the images stage makes one of ours where sizes are known.

Inductor's own lowering of an integer pool loads 8 bytes at a time through masks: 8.0 ms for 1×64×112×112, kernel 3, stride
2, where the library's takes 0.07 and ours 0.01; of 24 channels, which are no multiple of 32, the library's takes 0.5.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from inductor_x86q.graph import qdq
from inductor_x86q.graph.library import POOL
from inductor_x86q.graph.operators import MAX_POOLS, is_item
from inductor_x86q.graph.reasons import No
from inductor_x86q.passes.stage import Rule

aten = torch.ops.aten


def accepts(pool: fx.Node, integers: Any) -> bool | No:
    """Whether the library has the kernel for this max pool, of these integers."""
    x = qdq.value(integers)
    if x.dtype != torch.uint8:
        return No(f"its input is {x.dtype}, and the library's pool takes torch.uint8 only")
    if x.dim() not in (4, 5) or any(not isinstance(size, int) for size in x.shape[1:]):
        return No("its input has no batch dimension, or a size is not known when compiling")
    if not all(is_item(user) and user.args[1] == 0 for user in pool.users):
        return No("the positions of the maxima are used")
    return True


def _find(node: fx.Node) -> Any:
    return accepts(node, node.args[0])


def _rewrite(node: fx.Node, found: bool) -> None:
    x, *sizes, ceil_mode = qdq.schema_arguments(node).values()
    spatial = qdq.value(x).dim() - 2
    kernel, stride, padding, dilation = (qdq.full(values, spatial) for values in sizes)
    stride = stride or kernel
    parameters: list[Any] = list(zip(kernel, stride, padding, dilation, strict=True))
    pool = _pool_2d if spatial == 2 else _pool_3d
    new = pool(node, x, parameters, ceil_mode)
    for item in list(node.users):
        item.replace_all_uses_with(new)
        node.graph.erase_node(item)
    qdq.erase_dead(node)


def _pool_2d(like: fx.Node, x: Any, parameters: list[tuple[int, ...]], ceil_mode: Any) -> fx.Node:
    if set(parameters) == {(1, 1, 0, 1)}:
        return x
    arguments = [list(values) for values in zip(*parameters, strict=True)]
    return qdq.call(POOL, x, *arguments, bool(ceil_mode), like=like)


def _pool_3d(like: fx.Node, x: Any, parameters: list[tuple[int, ...]], ceil_mode: Any) -> fx.Node:
    """A maximum over a box is a maximum over frames of the maxima over images. Channels stay innermost throughout."""

    def reordered(node: fx.Node, order: list[int]) -> fx.Node:
        return qdq.call(aten.permute.default, node, order, like=like)

    def reshaped(node: fx.Node, shape: list[Any]) -> fx.Node:
        return qdq.call(aten.reshape.default, node, shape, like=like)

    _, channels, frames, height, width = qdq.value(x).shape
    images = reshaped(reordered(x, [0, 2, 3, 4, 1]), [-1, height, width, channels])
    pooled = _pool_2d(like, reordered(images, [0, 3, 1, 2]), parameters[1:], ceil_mode)
    height, width = qdq.value(pooled).shape[2:]
    columns = reshaped(reordered(pooled, [0, 2, 3, 1]), [-1, frames, height * width, channels])
    pooled = _pool_2d(like, reordered(columns, [0, 3, 1, 2]), [parameters[0], (1, 1, 0, 1)], ceil_mode)
    frames = qdq.value(pooled).shape[2]
    boxes = reshaped(reordered(pooled, [0, 2, 3, 1]), [-1, frames, height, width, channels])
    return reordered(boxes, [0, 4, 1, 2, 3])


RULES = (Rule("max pool", MAX_POOLS, _find, _rewrite),)
