"""Attention written out as products and a softmax becomes the one operator that it is, for which there is a kernel."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import fx

from inductor_x86q.graph import qdq
from inductor_x86q.graph.attention import SPELLINGS
from inductor_x86q.graph.operators import RESHAPES
from inductor_x86q.inductor import fake_tensors

aten = torch.ops.aten

(SDPA,) = SPELLINGS
_PRODUCTS = (aten.matmul.default, aten.bmm.default)
_SOFTMAXES = (aten.softmax.int, aten._softmax.default)
# What may stand between softmax and value: nothing, in eval mode and in single precision.
_IDENTITIES = (aten.dropout.default, aten.to.dtype, aten.contiguous.default, aten.clone.default)
_FACTORS = {aten.mul.Tensor: lambda number: number, aten.div.Tensor: lambda number: 1 / number}


@dataclasses.dataclass(frozen=True)
class _Windows:
    """A mask for each of an image's windows, which are part of the batch, as shifted windows' attention has it."""

    mask: fx.Node
    images: Any  # the shape of scores in which the images are a dimension of their own
    batch: Any  # the shape in which they are not


@dataclasses.dataclass(frozen=True)
class _Scores:
    """query·key·scale + mask, the key with its rows last."""

    query: fx.Node
    key: fx.Node
    scale: float
    mask: fx.Node | None
    windows: _Windows | None = None


def join(graph_module: fx.GraphModule) -> None:
    """softmax(query·key·scale + mask)·value → scaled_dot_product_attention(query, key, value, mask, scale)

    Where nobody else looks at what the softmax gives. In float it differs by rounding only.
    """
    graph = graph_module.graph
    for node in graph.find_nodes(op="call_function", target=aten._assert_tensor_metadata.default):
        if qdq.operand(node).target in _SOFTMAXES:  # asserts the type that the operator is seen to have
            graph.erase_node(node)
    graph.eliminate_dead_code()  # such as the mean of all heads' weights
    for node in list(graph.nodes):
        if node.target not in _PRODUCTS or (scores := _scores(node)) is None:
            continue
        with graph.inserting_before(node):
            key = qdq.call(aten.transpose.int, scores.key, -2, -1, like=node)
            operands = (scores.query, key, qdq.operand(node, 1), _mask(scores, node))
            new = qdq.call(SDPA, *operands, like=node, scale=scores.scale)
        node.replace_all_uses_with(new)
        qdq.erase_dead(node)
    graph_module.recompile()


def _mask(scores: _Scores, like: fx.Node) -> fx.Node | None:
    """All that is added to the scores."""
    if scores.windows is None:
        return scores.mask
    mask = scores.windows.mask
    if scores.mask is not None:
        mask = qdq.call(aten.add.Tensor, mask, scores.mask, like=like)
    each = qdq.call(aten.expand.default, mask, scores.windows.images, like=like)
    return qdq.call(aten.reshape.default, each, scores.windows.batch, like=like)


def _scores(node: fx.Node) -> _Scores | None:
    """The scores whose softmax the product multiplies a value by; None where it does something else."""
    weights, value = (qdq.operand(node, position) for position in range(2))
    while weights.target in _IDENTITIES and qdq.only_user(weights) and not _is_dropping(weights):
        weights = qdq.operand(weights)
    if (
        weights.target not in _SOFTMAXES
        or not qdq.only_user(weights)
        or weights.args[1] not in (-1, _dimensions(weights) - 1)
    ):
        return None
    result, windows = _without_windows(qdq.operand(weights))
    mask: Any = None
    if result.target is aten.add.Tensor and qdq.only_user(result) and result.kwargs.get("alpha", 1) == 1:
        mask = result.args[1]
        result = qdq.operand(result)
    scale, product = _without_factor(result)
    found = _product(product, scale, mask)
    if found is None or not qdq.only_user(product):
        return None
    found = dataclasses.replace(found, windows=windows)
    return found if _fits(found, value, weights) else None


def _without_windows(node: fx.Node) -> tuple[fx.Node, _Windows | None]:
    """The scores that masks of windows are added to, in a view (images, windows, heads, rows, rows), and these."""
    chain = [node]
    for target in (RESHAPES, (aten.add.Tensor,), RESHAPES):
        if chain[-1].target not in target or chain[-1].kwargs or not qdq.only_user(chain[-1]):
            return node, None
        chain.append(qdq.operand(chain[-1]))
    joined, added, split, scores = chain
    mask: Any = added.args[1]
    shape = qdq.value(scores).shape
    is_plain = isinstance(mask, fx.Node) and qdq.value(added).dim() == 5 and qdq.value(split).dim() == 5
    if not is_plain or not fake_tensors.same_shape(qdq.value(joined).shape, shape):
        return node, None
    if not fake_tensors.same_shape(qdq.value(split).shape[-3:], shape[-3:]):
        return node, None
    return scores, _Windows(mask, split.args[1], joined.args[1])


def _product(node: fx.Node, scale: float, mask: Any) -> _Scores | None:
    if node.target in _PRODUCTS:
        query, key = (qdq.operand(node, position) for position in range(2))
    elif node.target is aten.baddbmm.default and not node.kwargs and mask is None and scale == 1:
        mask, query, key = (qdq.operand(node, position) for position in range(3))
    else:
        return None
    if not isinstance(mask, (fx.Node, type(None))):
        return None
    factor, query = _without_factor(query)
    return _Scores(query, key, scale * factor, mask)


def _without_factor(node: fx.Node) -> tuple[float, fx.Node]:
    """The number that the node multiplies something by, where nobody else reads the result, and what that is."""
    if node.target in _FACTORS and isinstance(node.args[1], (int, float)) and qdq.only_user(node):
        return float(_FACTORS[node.target](node.args[1])), qdq.operand(node)
    return 1.0, node


def _fits(found: _Scores, value: fx.Node, weights: fx.Node) -> bool:
    """Whether nothing is broadcast but the mask, and all is in single precision."""
    query, key, value_, result = (qdq.value(x) for x in (found.query, found.key, value, weights))
    tensors = (
        (query, key, value_, result) if found.mask is None else (query, key, value_, result, qdq.value(found.mask))
    )
    if any(x.dtype != torch.float32 for x in tensors) or query.dim() not in (3, 4):
        return False
    if found.windows is not None and found.mask is not None and qdq.value(found.mask).shape[:-3].numel() != 1:
        return False  # it differs from image to image
    batches = [x.shape[:-2] for x in (key, value_, result)]
    if not all(fake_tensors.same_shape(query.shape[:-2], batch) for batch in batches) or found.scale <= 0:
        return False
    return fake_tensors.same_shape(result.shape[-2:], (query.shape[-2], key.shape[-1]))  # a mask may have more rows


def _is_dropping(node: fx.Node) -> bool:
    """Whether it changes what passes through: a dropout while training, a cast to fewer bits."""
    if node.target is aten.dropout.default:
        return bool(node.args[2])
    return qdq.value(node).dtype != torch.float32


def _dimensions(node: fx.Node) -> int:
    return qdq.value(node).dim()
