"""Whose memory a value lives in, and whether it may be overwritten."""

from __future__ import annotations

import torch
from torch import fx

from inductor_x86q import _torch, qgraph

aten = torch.ops.aten

# Operators whose result may share memory with their first argument, in eager mode or once Inductor has lowered them.
VIEWS = frozenset({
    aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.permute.default, aten.transpose.int,
    aten.t.default, aten.unsqueeze.default, aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims,
    aten.expand.default, aten.slice.Tensor, aten.select.int, aten.alias.default, aten.detach.default,
    aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.unbind.int, aten.as_strided.default,
    aten.diagonal.default, aten.unfold.default, aten.clone.default, aten.contiguous.default,
})  # fmt: skip


def _is_view(node: fx.Node) -> bool:
    # An indexed result of a list is a view of what the list is a view of. A clone is Inductor's to drop, so it counts.
    return node.target in VIEWS or getattr(node.target, "__name__", "") == "getitem"


def base(node: fx.Node) -> fx.Node:
    """The node whose memory `node` lives in."""
    while node.op == "call_function" and _is_view(node):
        node = node.args[0]  # type: ignore[assignment]
    from inductor_x86q.passes.fuse.call import is_call, read

    if is_call(node):
        binary = read(node).binary
        if binary is not None and binary.kind == "sum":
            return base(binary.other)
    return node


def readers(node: fx.Node) -> set[fx.Node]:
    """Everything that reads the memory of `node`, views looked through."""
    found: set[fx.Node] = set()
    seen: set[fx.Node] = set()
    pending = [base(node)]
    while pending:
        current = pending.pop()
        if current in seen:
            continue
        seen.add(current)
        for user in current.users:
            if user.op == "call_function" and (_is_view(user) or _sums_into(user, current)):
                pending.append(user)
                if _sums_into(user, current):
                    found.add(user)
            else:
                found.add(user)
    return found


def _sums_into(node: fx.Node, accumulator: fx.Node) -> bool:
    from inductor_x86q.passes.fuse.call import is_call, read

    if not is_call(node):
        return False
    binary = read(node).binary
    return binary is not None and binary.kind == "sum" and binary.other is accumulator


def may_overwrite(node: fx.Node, *, after: fx.Node) -> bool:
    """Whether an in-place sum at `after` may write into the memory of `node`.

    It may where that memory belongs to no input, constant or output of the graph, is not expanded, and everything
    else that reads it is done before: is needed to compute `after`. Graph order alone would not do, since later passes
    reorder nodes.
    """
    root = base(node)
    if root.op != "call_function" or not _is_dense(node):
        return False
    needed = qgraph.compute_ancestors(after)
    for reader in readers(node):
        # The dequantize in front of the addition goes away with it; what else reads through it must be done before.
        remaining = set(reader.users) - {after} if after in reader.users else {reader} - {after}
        if not remaining <= needed:
            return False
    return True


def _is_dense(node: fx.Node) -> bool:
    value = qgraph.value(node)
    sizes_and_strides = zip(value.shape, value.stride(), strict=True)
    return all(_torch.known(stride != 0) or _torch.known(size == 1) for size, stride in sizes_and_strides)
