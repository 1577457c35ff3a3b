"""Operators that only move elements, so that quantize and dequantize commute with them exactly."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

aten = torch.ops.aten
prims = torch.ops.prims

RESHAPES = (aten.view.default, aten.reshape.default)

# Operators that only say otherwise where the elements of their first argument are.
VIEWS = frozenset({
    *RESHAPES, aten.permute.default, aten.unsqueeze.default, aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims,
    aten.expand.default, aten.slice.Tensor, aten.select.int, aten.alias.default, aten.unfold.default,
})  # fmt: skip

# Each takes its tensor first and puts elements of it, and nothing else, into its result.
MOVEMENTS = VIEWS | {
    aten.clone.default, aten.flip.default, prims.rev.default, aten.repeat.default, aten.index.Tensor, aten._unsafe_index.Tensor,
    aten.index_select.default, aten.roll.default, aten.pixel_shuffle.default, aten.pixel_unshuffle.default,
    aten.upsample_nearest1d.default, aten.upsample_nearest2d.default, aten.upsample_nearest2d.vec,
    aten.upsample_nearest3d.default,
}  # fmt: skip

# The same with a list of results.
SPLITS = frozenset({
    aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.unbind.int, aten.tensor_split.sections,
})  # fmt: skip

# Max pools, the last two of windows too large for Inductor's own; each gives the maxima and their positions.
MAX_POOL = torch.ops.prims._low_memory_max_pool_with_offsets.default
LARGE_MAX_POOLS = (aten.max_pool2d_with_indices.default, aten.max_pool3d_with_indices.default)
MAX_POOLS = (MAX_POOL, *LARGE_MAX_POOLS)

# Each takes a list of tensors.
JOINS = frozenset({aten.cat.default, aten.stack.default})


def is_movement(node: Any) -> bool:
    return isinstance(node, fx.Node) and node.target in MOVEMENTS


def is_item(node: Any) -> bool:
    """Whether the node picks one result of a list."""
    return isinstance(node, fx.Node) and node.target is operator.getitem
