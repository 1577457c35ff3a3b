"""The channels stage: a channel shuffle between convolutions does not run, their weights take its order instead.

A convolution may read its input channels in any order, if its weight follows, and write its output channels in any
order, if everybody who reads them follows. So each reader of shuffled channels takes them from where they were
computed, as slices side by side, and each producer writes those next to each other that are read together.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from inductor_x86q.graph import qdq, weights
from inductor_x86q.graph.operators import RESHAPES, SPLITS, UNARIES, is_item
from inductor_x86q.graph.reasons import No
from inductor_x86q.passes.stage import Rule

aten = torch.ops.aten

CONVOLUTION = aten.convolution.default
GATHER = aten.index.Tensor
Channel = tuple[fx.Node, int]  # a tensor, and which of its channels


# --- what stands between the convolutions -----------------------------------------------------------------------------


def _channels(node: Any) -> int:
    return int(qdq.value(node).shape[1])


def _shuffle_start(node: fx.Node) -> tuple[fx.Node, int] | None:
    """What the node is a channel shuffle of, and by how many groups: view, transposition, (clone,) view."""
    if node.target not in RESHAPES:
        return None
    permuted: Any = node.args[0]
    if permuted.target is aten.clone.default:
        permuted = permuted.args[0]
    if permuted.target is not aten.permute.default or permuted.args[0].target not in RESHAPES:
        return None
    apart, source = permuted.args[0], permuted.args[0].args[0]
    rank = qdq.value(source).dim()
    swapped = [0, 2, 1, *range(3, rank + 1)]
    before, between, after = ([str(n) for n in qdq.value(x).shape] for x in (source, apart, node))
    # Sizes as text: those that are open have names, and comparing names adds no guard.
    if (
        rank < 3
        or permuted.args[1] != swapped
        or after != before
        or between[3:] != before[2:]
        or between[0] != before[0]
    ):
        return None
    return source, int(qdq.value(apart).shape[1])


def _shuffle_end(view: fx.Node) -> fx.Node | None:
    """The last node of the channel shuffle that begins with this view."""
    node: fx.Node | None = view
    for _ in range(3):
        node = qdq.only_user(node) if node else None
        if node is not None and node.target in RESHAPES:
            found = _shuffle_start(node)
            return node if found and found[0] is view.args[0] else None
    return None


def _along_channels(node: fx.Node) -> bool:
    """Whether a cat, split or slice works on dimension 1, a slice without gaps."""
    arguments = qdq.schema_arguments(node)
    return arguments.get("dim", 0) == 1 and arguments.get("step", 1) == 1


def _origins(node: fx.Node) -> list[Channel]:
    """Where each channel of the node was computed, looking through what only orders channels."""
    found: dict[fx.Node, list[Channel]] = {}
    pending = [node]
    while pending:
        current = pending[-1]
        ordered = _ordered_from(current) if current not in found else None
        parts, numbers = ordered or ([], [])
        missing = [part for part in parts if part not in found]
        if missing:
            pending += missing
            continue
        pending.pop()
        if ordered is not None:
            channels = [channel for part in parts for channel in found[part]]
            found[current] = [channels[number] for number in numbers]
        elif current not in found:
            found[current] = [(current, channel) for channel in range(_channels(current))]
    return found[node]


def _ordered_from(node: fx.Node) -> tuple[list[fx.Node], list[int]] | None:
    """The tensors whose channels the node only orders, and which of theirs, side by side, each of its own is."""
    shuffled = _shuffle_start(node)
    if shuffled:
        order = torch.arange(_channels(shuffled[0])).view(shuffled[1], -1).t().flatten()
        return [shuffled[0]], order.tolist()
    source: Any = node.args[0] if node.args else None
    if node.target is aten.cat.default and _along_channels(node):
        return source, list(range(_channels(node)))
    if node.target is aten.slice.Tensor and _along_channels(node):
        start = qdq.schema_arguments(node)["start"] or 0
        return [source], list(range(_channels(source)))[start:][: _channels(node)]
    if is_item(node) and source.target in SPLITS and _along_channels(source):
        start = sum(part.shape[1] for part in source.meta["val"][: node.args[1]])  # type: ignore[misc]
        return [source.args[0]], list(range(start, start + _channels(node)))
    gathered = _gathered(node)
    return None if gathered is None else ([source], gathered)


def _gathered(node: fx.Node) -> list[int] | None:
    """Which channels the node takes of its first argument, by their numbers; None where it does something else."""
    if node.target is not GATHER or len(node.args[1]) != 2 or node.args[1][0] is not None:  # type: ignore[arg-type, index]
        return None
    indices = qdq.constant(node.args[1][1])  # type: ignore[index]
    if indices is None or indices.dtype != torch.int64 or indices.dim() != 1:
        return None
    return (indices % _channels(node.args[0])).tolist()


def _orderings(node: fx.Node) -> set[fx.Node] | None:
    """All that orders the node's channels before a convolution reads them whose weight can follow; None where something
    else reads them too."""
    found = {node}
    pending = [node]
    while pending:
        for user in pending.pop().users:
            if qdq.is_dequantize(user) and all(_reader(x) and x.args[0] is user for x in user.users):
                continue
            end = _ordered_by(user)
            if end is None or not end.users:
                return None
            if end not in found:
                found.add(end)
                pending.append(end)
    return found


def _ordered_by(user: fx.Node) -> fx.Node | None:
    """The node that holds the channels after `user` ordered them; None where it does something else."""
    if user.target in RESHAPES:
        return _shuffle_end(user)
    if user.target in SPLITS or user.target in (aten.cat.default, aten.slice.Tensor):
        return user if _along_channels(user) else None
    return user if is_item(user) or _gathered(user) is not None else None


# --- the convolutions -------------------------------------------------------------------------------------------------


def _reader(node: fx.Node) -> bool:
    """Whether the node is a quantized convolution whose weight can follow another order of its input's channels."""
    if node.target is not CONVOLUTION or not qdq.is_dequantize(node.args[0]) or not qdq.has_constants(node):
        return False
    arguments = qdq.schema_arguments(node)
    return arguments["groups"] == 1 or (_is_depthwise(node) and _end(node) is not None)


def _is_depthwise(node: fx.Node) -> bool:
    arguments = qdq.schema_arguments(node)
    groups = arguments["groups"]
    return groups > 1 and groups == _channels(arguments["input"]) == _channels(node)


def _end(convolution: fx.Node) -> fx.Node | None:
    """The quantize behind a convolution and, perhaps, an activation."""
    user = qdq.only_user(convolution)
    if user is not None and user.target in UNARIES:
        user = qdq.only_user(user)
    return user if user is not None and user.target is qdq.QUANTIZE else None


def _producer(quantize: fx.Node) -> fx.Node | None:
    """The convolution that computes what the node quantizes, if it can write its channels in any order."""
    node: Any = quantize.args[0] if quantize.target is qdq.QUANTIZE else quantize
    if node.target in UNARIES:
        node = node.args[0]
    if node.target is not CONVOLUTION or _end(node) is not quantize or not qdq.has_constants(node):
        return None
    return node if qdq.schema_arguments(node)["groups"] == 1 else None


def _with_weights(node: fx.Node, x: Any, order: list[int], dimension: int) -> fx.Node:
    """The convolution on `x`, its weight's output channels (dimension 0) or input channels (1) in another order."""
    weight, bias = weights.read(node.args[1]), qdq.constant(node.args[2])
    assert weight is not None
    indices = torch.tensor(order)
    if dimension == 0 and bias is not None:
        bias = bias[indices]
    with node.graph.inserting_before(node):
        return weights.with_weight(node, x, weight.ordered(indices, dimension), bias)


# --- readers take channels from where they were computed --------------------------------------------------------------


def _find_shuffled_input(node: fx.Node) -> Any:
    """What to read of which tensor, and which channel of the present input each channel of the new one is."""
    if not _reader(node):
        return No("it is no quantized convolution of constant weights, whole or depthwise with a quantize behind it")
    integers: Any = node.args[0].args[0]  # type: ignore[union-attr]
    origins = _origins(integers)
    order = sorted(range(len(origins)), key=lambda i: origins[i])
    parts: dict[fx.Node, list[int]] = {}
    for i in order:
        parts.setdefault(origins[i][0], []).append(origins[i][1])
    if list(_pieces(integers)) == list(parts.items()):
        return No("it reads channels from where they are computed")
    shuffled = False
    for source, channels in parts.items():
        orderings = _orderings(source)
        # A tensor that is read whole stays as it is; of another, what is read must be written side by side.
        if orderings is None or (len(channels) < _channels(source) and _producer(source) is None):
            return No(f"the order of {source}'s channels matters to something else")
        shuffled |= any(_gathered(node) or _shuffle_start(node) for node in orderings)
    return (parts, order) if shuffled else No("no channel shuffle stands in front of it")


def _pieces(integers: fx.Node) -> Iterator[tuple[fx.Node, list[int]]]:
    """The tensors that stand side by side in this one, and which channels of each, by gather or slice."""
    pieces: Any = integers.args[0] if integers.target is aten.cat.default else [integers]
    for piece in pieces:
        direct = _gathered(piece) or piece.target is aten.slice.Tensor
        yield piece.args[0] if direct else piece, [channel for _, channel in _origins(piece)]


def _rewrite_shuffled_input(node: fx.Node, found: tuple[dict[fx.Node, list[int]], list[int]]) -> fx.Node:
    channels_of, order = found
    dequantize: Any = node.args[0]
    depthwise = _is_depthwise(node)
    parts = [_gather(source, channels, like=dequantize) for source, channels in channels_of.items()]
    joined = parts[0] if len(parts) == 1 else _reused(aten.cat.default, (parts, 1), parts[0], like=dequantize)
    x = qdq.call(dequantize.target, joined, *dequantize.args[1:], like=dequantize, **dequantize.kwargs)
    end = _end(node) if depthwise else None
    if end is not None:  # what a depthwise convolution reads in another order, it also writes so
        back = torch.tensor(order).argsort()
        end.replace_all_uses_with(ordered := _new_gather(end, back, like=end), lambda user: user is not ordered)
    return _with_weights(node, x, order, 0 if depthwise else 1)


def _gather(source: fx.Node, channels: list[int], *, like: fx.Node) -> fx.Node:
    """These channels of the tensor: itself, or a gather, the one that is there where there is one."""
    if channels == list(range(_channels(source))):
        return source
    for user in source.users:
        if _gathered(user) == channels:
            return user
    return _new_gather(source, torch.tensor(channels), like=like)


def _new_gather(source: fx.Node, channels: torch.Tensor, *, like: fx.Node) -> fx.Node:
    """A node behind `source` that takes these of its channels."""
    with source.graph.inserting_after(source):
        indices = qdq.new_constant(channels, like=like)
    with source.graph.inserting_after(indices):
        return qdq.call(GATHER, source, [None, indices], like=like)


def _reused(target: Any, arguments: tuple[Any, ...], operand: fx.Node, *, like: fx.Node) -> fx.Node:
    """A node that computes this, the one that is there where there is one."""
    for user in operand.users:
        if user.target is target and user.args == arguments:
            return user
    return qdq.call(target, *arguments, like=like)


# --- producers write together what is read together -------------------------------------------------------------------


def _find_gathered_output(node: fx.Node) -> Any:
    if _producer(node) is None:
        return No("it quantizes no convolution that can write its channels in any order")
    parts = [_gathered(user) for user in node.users]
    if not parts or None in parts:
        return No("something reads it whole")
    order = list(itertools.chain.from_iterable(parts))  # type: ignore[arg-type]
    if len(set(order)) != len(order):
        return No("its readers share channels")
    return order + sorted(set(range(_channels(node))) - set(order))


def _rewrite_gathered_output(node: fx.Node, order: list[int]) -> None:
    convolution = _producer(node)
    assert convolution is not None
    new = _with_weights(convolution, convolution.args[0], order, 0)
    convolution.replace_all_uses_with(new)
    qdq.erase_dead(convolution)
    start = 0
    for user in list(node.users):
        end = start + _channels(user)
        with node.graph.inserting_before(user):
            whole = end - start == _channels(node)
            part = node if whole else qdq.call(aten.slice.Tensor, node, 1, start, end, like=user)
        user.replace_all_uses_with(part)
        qdq.erase_dead(user)
        start = end


RULES = (
    Rule("convolution of shuffled channels", (CONVOLUTION,), _find_shuffled_input, _rewrite_shuffled_input),
    Rule("channels read together", (qdq.QUANTIZE,), _find_gathered_output, _rewrite_gathered_output),
)
