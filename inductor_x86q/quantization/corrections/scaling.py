"""Channels of one range: scales move from an activation into the weights that read it, and out of what computes it.

Per-tensor activations lose the channels that are small beside others, while a weight's channels have scales of their own. As
in SmoothQuant a factor is in between: the root of the activation's largest value over the weights'. A depthwise convolution
takes the whole range, for each of its channels is a channel of its weight.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import fx

from inductor_x86q.graph import operators, qdq
from inductor_x86q.graph.operators import Role, role
from inductor_x86q.quantization import specs
from inductor_x86q.quantization.corrections.prepared import Layer, Lockstep, layers, observer_of, set_bias, set_constant
from inductor_x86q.quantization.plan import shares

aten = torch.ops.aten

# f(s·x) = s·f(x) for s > 0, channel by channel.
_HOMOGENEOUS = (aten.relu.default, aten.relu_.default, aten.leaky_relu.default, aten.leaky_relu_.default)
_ROLES = (Role.DROPOUT, Role.MAX_POOL, Role.AVERAGE_POOL)
_LARGEST_FACTOR = 1e5
_HEADROOM = 1.25  # a relu6 clips a scaled channel no lower than this much above its largest value


def equalize(prepared: fx.GraphModule, calls: Sequence[tuple[Any, ...]]) -> int:
    """Between convolutions. Returns how many values it scaled."""
    return _scale(prepared, calls, Role.CONVOLUTION)


def smooth(prepared: fx.GraphModule, calls: Sequence[tuple[Any, ...]]) -> int:
    """In front of linears. Returns how many values it scaled."""
    return _scale(prepared, calls, Role.LINEAR)


def _scale(prepared: fx.GraphModule, calls: Sequence[tuple[Any, ...]], kind: Role) -> int:
    found = {layer.node: layer for layer in layers(prepared)}
    readers: dict[fx.Node, list[Layer]] = {}
    for layer in found.values():
        if role(layer.node) is kind and (layer.groups == 1 or _is_depthwise(layer)):
            readers.setdefault(layer.source, []).append(layer)
    ways = {value: way for value, group in readers.items() if (way := _way(prepared, value, group, found)) is not None}
    largest: dict[fx.Node, torch.Tensor] = {}

    def at(node: fx.Node, run: Lockstep) -> None:
        if node in ways:
            axis = 1 if kind is Role.CONVOLUTION else -1
            for x in run.float[node]:
                others = [d for d in range(x.dim()) if d != axis % x.dim()]
                here = x.abs().amax(others)
                largest[node] = torch.maximum(largest[node], here) if node in largest else here

    Lockstep(prepared, calls).run(at, rounding=False)
    for value, way in ways.items():
        factors = _factors(largest[value], readers[value])
        if isinstance(way, Layer) and (top := _top(prepared, value, way)) < math.inf:
            factors = _below(top, factors, largest[value])
        _divide(prepared, value, way, readers[value], factors)
        for layer in readers[value]:
            weight: Any = qdq.constant(layer.weight)
            shape = [-1] + [1] * (weight.dim() - 1) if _is_depthwise(layer) else [1, -1] + [1] * (weight.dim() - 2)
            set_constant(prepared, layer.weight, weight.detach() * factors.reshape(shape))
    prepared.graph.lint()
    prepared.recompile()
    return len(ways)


def _way(prepared: fx.GraphModule, value: fx.Node, group: list[Layer], found: dict[fx.Node, Layer]) -> Any:
    """What divides the value: a layer or norm that computes it, a new multiplication (the string), or None."""
    observers = {layer.activation for layer in group}
    if any(user not in found or found[user] not in group for observer in observers for user in observer.users):
        return None
    if set(value.users) == observers:
        for source in _upwards(prepared, value):
            if source in found:
                channels = qdq.constant(found[source].weight).shape[0]  # type: ignore[union-attr]
                return found[source] if channels == _channels(group[0]) else None
            if source.target is aten.layer_norm.default and qdq.constant(source.args[2]) is not None:
                is_last = len(source.args[1]) == 1  # type: ignore[arg-type]
                return source if is_last and _is_own(source) else "multiply"
    # A generated kernel computes or quantizes the value, and multiplies on the way.
    by_generated = value.target is aten.layer_norm.default or all(
        layer.node.meta.get(specs.GRANULARITY) for layer in group
    )
    return "multiply" if by_generated and role(group[0].node) is Role.LINEAR else None


def _upwards(prepared: fx.GraphModule, value: fx.Node) -> Iterator[fx.Node]:
    """The value, and what it is computed of as long as a factor of a channel passes through and nobody else reads it."""
    source: Any = value
    while len(source.users) == 1 or source is value:
        yield source
        passes = source.target in _HOMOGENEOUS or role(source) in _ROLES or observer_of(prepared, source)
        passes = passes or (role(source) is Role.PAD and shares(source)) or _clip(source) is not None
        if not passes or not isinstance(source.args[0], fx.Node):
            return
        source = source.args[0]


def _clip(node: fx.Node) -> float | None:
    """Where an activation that gives 0 for all below 0 ends, as a relu6 does at 6; None for any other node."""
    if not operators.is_clip(node):
        return None
    arguments = qdq.schema_arguments(node)
    low, top = (arguments.get(f"{end}_val", arguments.get(end)) for end in ("min", "max"))
    if "relu6" in operators.own_name(node):
        low, top = 0, 6
    return float(top) if low == 0 and isinstance(top, (int, float)) and top > 0 else None


def _top(prepared: fx.GraphModule, value: fx.Node, way: Layer) -> float:
    between = itertools.takewhile(lambda source: source is not way.node, _upwards(prepared, value))
    return min((top for source in between if (top := _clip(source)) is not None), default=math.inf)


def _below(top: float, factors: torch.Tensor, largest: torch.Tensor) -> torch.Tensor:
    """Factors for channels that are clipped at `top` whatever their factor: none is clipped below what it reaches.

    A channel that reaches the top keeps its factor of 1; the smaller ones grow towards it.
    """
    return torch.maximum(factors / factors.max(), _HEADROOM * largest / top).clamp(1 / _LARGEST_FACTOR, 1)


def _is_own(norm: fx.Node) -> bool:
    arguments: Any = norm.args
    targets = [node.target for node in norm.graph.nodes if node.op == "get_attr"]
    return all(targets.count(x.target) == 1 and len(x.users) == 1 for x in arguments[2:4] if x is not None)


def _channels(layer: Layer) -> int:
    weight: Any = qdq.constant(layer.weight)
    return weight.shape[0] if _is_depthwise(layer) else weight.shape[1]


def _is_depthwise(layer: Layer) -> bool:
    weight: Any = qdq.constant(layer.weight)
    return layer.groups > 1 and layer.groups == weight.shape[0] and weight.shape[1] == 1


def _factors(largest: torch.Tensor, group: list[Layer]) -> torch.Tensor:
    if all(_is_depthwise(layer) for layer in group):
        factors = largest
    else:
        weights = []
        for layer in group:
            weight: Any = qdq.constant(layer.weight)
            by_channel = weight.detach().abs().transpose(0, 0 if _is_depthwise(layer) else 1)
            weights.append(by_channel.flatten(1).amax(1))
        of_weights = torch.stack(weights).amax(0)
        factors = torch.where(of_weights > 0, largest.sqrt() / of_weights.clamp(min=1e-12).sqrt(), 1.0)
    usable = factors[(largest > 0) & torch.isfinite(factors)]
    if not usable.numel():
        return torch.ones_like(largest)
    factors = factors / usable.log().mean().exp()
    return torch.where(largest > 0, factors, 1.0).clamp(1 / _LARGEST_FACTOR, _LARGEST_FACTOR)


def _divide(prepared: fx.GraphModule, value: fx.Node, way: Any, group: list[Layer], factors: torch.Tensor) -> None:
    if isinstance(way, Layer):
        weight: Any = qdq.constant(way.weight)
        set_constant(prepared, way.weight, weight.detach() / factors.reshape([-1] + [1] * (weight.dim() - 1)))
        bias = qdq.constant(way.bias)
        if bias is not None:
            set_bias(prepared, way, bias.detach() / factors)
    elif isinstance(way, fx.Node):
        for argument in way.args[2:4]:
            tensor = qdq.constant(argument)
            if tensor is not None:
                set_constant(prepared, argument, tensor.detach() / factors)  # type: ignore[arg-type]
    else:
        graph = prepared.graph
        with graph.inserting_after(value):
            scale = qdq.store(prepared, f"{value.name}_smoothing", 1 / factors, value.next)
        with graph.inserting_after(scale):
            product = graph.call_function(aten.mul.Tensor, (value, scale))
        qdq.copy_origin(product, value)
        for observer in {layer.activation for layer in group}:
            observer.replace_input_with(value, product)
