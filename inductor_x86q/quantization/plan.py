"""The plan: which value of an exported graph gets quantized, decided on the structure of the graph.

It works backwards from the convolutions and linears. A value is wanted in int8 when one of them reads it, or when it
reaches one through operators that only move or combine values. Where a value comes out of an int8 kernel, everybody
reads its quantized form, since the kernel then writes int8; elsewhere only those edges are quantized that lead on to
int8, so that a float residual stream stays float.

Each question that is asked of a value is answered once, in the order of the graph: its cost grows with the graph's size
only, and nothing recurses.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from inductor_x86q.graph import aliasing, layers, operators, qdq
from inductor_x86q.graph.operators import Role, role
from inductor_x86q.inductor import fake_tensors
from inductor_x86q.quantization import qat
from inductor_x86q.quantization.attention import takes

aten = torch.ops.aten

# Quantize and dequantize pass through these exactly: result and tensors share their parameters.
SHARING = frozenset({
    Role.VIEW, Role.MOVEMENT, Role.SPLIT, Role.ITEM, Role.JOIN, Role.DROPOUT, Role.MAX_POOL,
})  # fmt: skip
# These compute in float between int8 tensors, in one generated kernel: int8 in, int8 out.
POINTWISE = frozenset({Role.ACTIVATION, Role.ADDITION, Role.POINTWISE})
_CONVOLUTIONS = frozenset({Role.CONVOLUTION, Role.TRANSPOSED_CONVOLUTION})
POOLS = frozenset({Role.AVERAGE_POOL, Role.MEAN})

UNQUANTIZED = ("bfloat16", "float")  # what a layer may compute in instead
# Where to quantize: at a value, for all its users, or on the edge from a value to one user.
Slot = fx.Node | tuple[fx.Node, fx.Node]


class Plan:
    """What to quantize.

    `compute`: each convolution and linear to quantize, with its activation and weight. `ends`: for each value inside
    a fused region, the region's last value, which is the only one of them that may be quantized; `starts` has for that
    one the operator and what the call does behind it. `wanted`: the values to quantize. `norms`: of each convolution
    and linear the batch norm that will be folded into it, while training.

    `attention`: each attention to quantize, with its query, key and value; `dynamic_attention`: those without observers.

    `dynamic`: linears of which only what they read is quantized, apart from all else: to know the range of a value,
    all of it has to be there, so that no kernel could write it in int8.
    """

    def __init__(
        self,
        graph: fx.Graph,
        mode: Callable[[fx.Node], str],
        *,
        attention: Callable[[fx.Node], str] = lambda node: "float",
        folds: bool = False,
    ) -> None:
        """`mode` says how a layer is quantized: "static", not at all ("float", "bfloat16"), or else dynamically; `attention`
        how an attention is."""
        self.nodes = list(graph.nodes)
        variables = {node for node in graph.find_nodes(op="get_attr") if aliasing.is_variable(node)}
        self._constants = qdq.constants(graph, variables)
        self.compute: dict[fx.Node, tuple[fx.Node, fx.Node]] = {}
        self.dynamic: dict[fx.Node, tuple[fx.Node, fx.Node]] = {}
        self.attention: dict[fx.Node, tuple[Any, ...]] = {}
        self.dynamic_attention: list[fx.Node] = []
        self.excluded: dict[fx.Node, None] = {}
        for node in self.nodes:
            if role(node) is Role.ATTENTION and self._attends(node) and (how := attention(node)) not in UNQUANTIZED:
                if how == "static":
                    self.attention[node] = node.args[:3]
                else:
                    self.dynamic_attention.append(node)
            layer = self._layer_operands(node)
            if layer is None or (folds and role(node) is Role.TRANSPOSED_CONVOLUTION):
                continue  # training knows no weights whose channels are not their first dimension
            how = mode(node)
            if how in UNQUANTIZED:
                self.excluded[node] = None
            else:
                (self.compute if how == "static" else self.dynamic)[node] = layer
        self.norms: dict[fx.Node, fx.Node] = {}
        for node in self.compute if folds else ():
            norm = qat.batch_norm_behind(node)
            if norm is not None:
                self.norms[node] = norm
        self.ends: dict[fx.Node, fx.Node] = {}
        self.ends.update((node, node) for node in self.attention)
        self.starts: dict[fx.Node, list[fx.Node]] = {}
        self._claimed: set[fx.Node] = set()
        for node in reversed(self.compute):  # the later of two convolutions takes the addition, as when fusing
            self._find_region(node)
        self._int8_sources: set[fx.Node] = set()
        for node in self.nodes:
            if self._can_be_int8(node):
                self._int8_sources.add(node)
        self.wanted: set[fx.Node] = set()
        self._leading: set[fx.Node] = set()
        for node in reversed(self.nodes):
            if self._is_wanted(node):
                self.wanted.add(node)
            if self._leads_to_int8(node):
                self._leading.add(node)
        self._slots: dict[fx.Node, list[Slot]] = {}

    # --- layers and what is computed with them ---

    def _layer_operands(self, node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
        """Activation and weight of a convolution or linear with a constant weight; None for any other node."""
        if role(node) not in (*_CONVOLUTIONS, Role.LINEAR, Role.PRODUCT):
            return None
        if node.target is aten.convolution.default and node.args[6]:
            return None  # transposed
        activation, weight = operators.factors(node)
        if not isinstance(activation, fx.Node) or not isinstance(weight, fx.Node):
            return None
        dimensions = weight.meta["val"].dim()
        if dimensions > 2 and role(node) is Role.PRODUCT and not _repeats_one_matrix(weight):
            return None
        if weight not in self._constants or activation in self._constants or not is_float(activation) or dimensions < 2:
            return None
        return activation, weight

    def _attends(self, node: fx.Node) -> bool:
        """Whether query, key and value are floats that are computed, and ours takes the operator."""
        return takes(node) and all(is_float(x) and x not in self._constants for x in node.all_input_nodes[:3])

    def _find_region(self, start: fx.Node) -> None:
        """What one call will compute: the operator with what its weight takes up, a batch norm or a constant factor;
        then an activation, or an addition with a relu behind it."""
        layer = [start, self.norms[start]] if start in self.norms else [start]
        user = qdq.only_user(layer[-1])
        if user is not None and self._is_factor(user, start):
            layer.append(user)
            user = qdq.only_user(user)
        behind = []
        if user is not None and role(user) is Role.ACTIVATION:
            behind.append(user)
        elif user is not None and user not in self._claimed and self._is_plain_addition(user):
            self._claimed.add(user)
            behind.append(user)
            user = qdq.only_user(user)
            if user is not None and operators.is_relu(user):
                behind.append(user)
        for node in (*layer, *behind):
            self.ends[node] = (*layer, *behind)[-1]
        self.starts[self.ends[start]] = [start, *behind]

    def _is_factor(self, node: fx.Node, layer: fx.Node) -> bool:
        """Whether the node multiplies the layer's result by a constant that the layer's weight can take up."""
        if node.target is not aten.mul.Tensor:
            return False
        # A tensor of one element is a number by the time the passes run, and stays where it is.
        factors = [x for x in node.all_input_nodes if x in self._constants and qdq.value(x).numel() > 1]
        return any(layers.is_channel_factor(factor, layer, operators.channels(layer)) for factor in factors)

    def _is_plain_addition(self, node: fx.Node) -> bool:
        """Whether the node adds two different float tensors of one shape, unscaled."""
        if role(node) is not Role.ADDITION or node.kwargs.get("alpha", 1) != 1:
            return False
        first, second = node.args[:2]
        if not isinstance(first, fx.Node) or not isinstance(second, fx.Node) or first is second:
            return False
        if not is_float(first) or not is_float(second) or first in self._constants or second in self._constants:
            return False
        return fake_tensors.same_shape(first.meta["val"].shape, second.meta["val"].shape)

    # --- what is wanted in int8 ---

    def _can_be_int8(self, value: fx.Node) -> bool:
        """Whether whatever makes the value can as well write int8: a call, a pool, or data moved from one of these."""
        if value in self.ends or role(value) in POOLS:
            return True
        if shares(value) or _is_list(value):
            return any(x in self._int8_sources for x in value.all_input_nodes)
        return False

    def _is_wanted(self, node: fx.Node) -> bool:
        if (
            not is_float(node)
            or self.ends.get(node, node) is not node
            or node in self._constants
            or _has_infinity(node)
        ):
            return False
        return any(self.passes_on(node, user) for user in node.users)

    def _leads_to_int8(self, node: fx.Node) -> bool:
        """Whether a generated kernel that computes `node` writes int8, perhaps after more of the same."""
        if node in self.wanted:
            return True
        return any(
            user in self._leading and role(user) in POINTWISE and user not in self._claimed for user in node.users
        )

    def passes_on(self, value: fx.Node, user: fx.Node) -> bool:
        """Whether `user` should read `value` in int8."""
        if user in self.compute:
            return self.compute[user][0] is value
        if user in self.attention:
            return value in self.attention[user]
        if shares(user):
            moves = role(user) is Role.JOIN or user.args[0] is value  # and does not look at its shape only
            return moves and self._results_wanted(user)
        if user in self._claimed:
            return self.ends[user] in self.wanted
        if value not in self._int8_sources:
            return False
        return user in self.wanted if role(user) in POOLS else role(user) in POINTWISE and user in self._leading

    def _results_wanted(self, node: fx.Node) -> bool:
        if is_float(node):
            return node in self.wanted
        return any(item in self.wanted for item in node.users)  # a list of results

    # --- how ---

    def clips(self, value: fx.Node) -> bool:
        """Whether whatever makes the value clips it to any range on the way: a generated kernel does, and a call that
        ends in nothing else than a clip. It need not where data is only moved: that shares its range with the source.
        """
        if value not in self.starts:
            return True
        start, *rest = self.starts[value]
        return operators.can_clip(start) and all(operators.is_clip(node) for node in rest)

    def slots(self, value: fx.Node) -> list[Slot]:
        """Where to quantize the value: at the node, for all its users, or only on the edges that lead to int8."""
        if value not in self._slots:
            edges: list[Slot] = [(value, user) for user in value.users if self.passes_on(value, user)]
            whole = len(edges) == len(value.users) or value in self._int8_sources
            # A dynamic layer rounds what it reads by itself, and once is enough; one that stays float is to read no rounding.
            apart = any(user in self.dynamic or user in self.excluded for user in value.users)
            self._slots[value] = [value] if whole and not apart else edges
        return self._slots[value]


def is_float(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.dtype == torch.float32


def shares(node: fx.Node) -> bool:
    """Whether the node only moves data, so that its result and its tensors share their parameters."""
    if role(node) is not Role.PAD:
        return role(node) in SHARING
    # The same where it fills with zeros: the zero point must be able to stand for 0, as it always does.
    arguments = qdq.schema_arguments(node)
    return arguments.get("mode", "constant") != "constant" or not arguments["value"]


def _has_infinity(node: fx.Node) -> bool:
    """Whether the node pads with what no integer stands for, as in front of a max pool."""
    if role(node) is not Role.PAD:
        return False
    fill = qdq.schema_arguments(node)["value"]
    return isinstance(fill, float) and not math.isfinite(fill)


def _repeats_one_matrix(weight: fx.Node) -> bool:
    """Whether a batch of matrices is one matrix, alone or expanded."""
    source: Any = weight.args[0] if weight.target is aten.expand.default else weight
    return source.meta["val"].shape.numel() == weight.meta["val"].shape[-2:].numel()


def _is_list(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), (list, tuple))
