"""Whose memory a value lives in, and whether it may be overwritten."""

from __future__ import annotations

from typing import Any, Literal

from torch import fx

from inductor_x86q.graph import operators, qdq
from inductor_x86q.graph.calls import is_call, read
from inductor_x86q.graph.reasons import No
from inductor_x86q.inductor import fake_tensors


def _lives_in(node: fx.Node) -> Any:
    """The argument whose memory the node's result is in; None where it has its own."""
    if node.op != "call_function":
        return None
    if operators.shares_memory(node):
        return node.args[0]
    binary = read(node).binary if is_call(node) else None
    return binary.other if binary is not None and binary.kind == "sum" else None


def base(node: fx.Node) -> fx.Node:
    """The node whose memory `node` lives in."""
    while (source := _lives_in(node)) is not None:
        node = source
    return node


def readers(node: fx.Node) -> set[fx.Node]:
    """Everything that reads the memory of `node`, views looked through."""
    found: set[fx.Node] = set()
    pending = [base(node)]
    while pending:
        current = pending.pop()
        for user in current.users:
            if _lives_in(user) is current:
                pending.append(user)
            if _lives_in(user) is not current or is_call(user):
                found.add(user)
    return found


def written(node: fx.Node) -> list[fx.Node]:
    """The arguments whose memory the operator that the node calls writes into, by its schema."""
    schema = getattr(node.target, "_schema", None)
    if node.op != "call_function" or schema is None or not schema.is_mutable:
        return []
    return [
        given
        for argument, given in zip(schema.arguments, node.args, strict=False)
        if isinstance(given, fx.Node) and argument.alias_info is not None and argument.alias_info.is_write
    ]


def is_variable(constant: fx.Node) -> bool:
    """Whether the graph writes into a parameter or buffer, itself or through a view of it."""
    pending = [node for node in constant.graph.find_nodes(op="get_attr") if node.target == constant.target]
    while pending:
        for user in (current := pending.pop()).users:
            if current in written(user):
                return True
            if operators.shares_memory(user):
                pending.append(user)
    return False


def is_overwritten(node: fx.Node) -> bool:
    """Whether an in-place sum writes into the memory of `node`."""
    return any(is_call(reader) and base(reader) is base(node) for reader in readers(node))


def may_overwrite(node: fx.Node, *, after: fx.Node) -> Literal[True] | No:
    """Whether an in-place sum at `after` may write into the memory of `node`.

    It may where that memory belongs to no input, constant or output of the graph, the value has no gaps in it, and
    everything else that reads it is done before: is needed to compute `after`. Graph order alone would not do, since
    later passes reorder nodes.
    """
    root = base(node)
    if root.op != "call_function":
        return No("it is an input or a constant", (root,))
    if not _is_dense(node):
        return No("it has gaps in its memory", (node,))
    needed = qdq.compute_ancestors(after)
    for reader in readers(node):
        # The dequantize in front of the addition goes away with it; what else reads through it must be done before.
        remaining = set(reader.users) - {after} if after in reader.users else {reader} - {after}
        if not remaining <= needed:
            return No("it is read later", tuple(sorted(remaining - needed)))
    return True


def _is_dense(node: fx.Node) -> bool:
    """Whether the value's elements lie side by side, each once: the library's sum refuses others when it runs."""
    value = qdq.value(node)
    dimensions = [
        pair for pair in zip(value.shape, value.stride(), strict=True) if not fake_tensors.known(pair[0] == 1)
    ]
    expected: Any = 1
    while dimensions:
        is_next = [fake_tensors.known(stride == expected) for _, stride in dimensions]
        if not any(is_next):
            return False
        size, _ = dimensions.pop(is_next.index(True))
        expected = expected * size
    return True
