"""What a user asks for, layer by layer: how, with which observers, for the model, module names, types and operators."""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import fx

from inductor_x86q.errors import QuantizationError
from inductor_x86q.graph import operators
from inductor_x86q.graph.operators import Role
from inductor_x86q.graph.origin import layer as layer_of
from inductor_x86q.quantization import specs
from inductor_x86q.quantization.plan import UNQUANTIZED

MODES = ("static", "per_tensor", "per_token", "bfloat16", "float")
DYNAMIC = ("per_tensor", "per_token")
LAYER_OPERATORS = operators.targets(Role.CONVOLUTION, Role.LINEAR, Role.PRODUCT)

# What selects layers, the more general first. The later one wins; of two of a kind the one nearer to the layer.
_MODEL, _OPERATOR, _TYPE, _PATTERN, _NAME = range(5)


@dataclasses.dataclass(frozen=True)
class LayerConfig:
    """How layers are quantized; None leaves it to a more general selector.

    Args:
        mode: "static" (ranges from calibration), "per_tensor" or "per_token" (linears only: the range is computed at
            every call, of the whole input or of each row), "float", or "bfloat16": not in int8 either, but with inputs,
            weight and result rounded to bfloat16, for CPUs with instructions for it.
        activation: what finds the range of a static layer's input: "minmax", "histogram", "percentile:99.99", "mse",
            an observer of torchao or a QuantizationSpec of it.
        weight: "per_channel", "per_tensor", an observer of torchao or a QuantizationSpec of it.

    Example:
        >>> percentile = inductor_x86q.LayerConfig(activation="percentile:99.99")
        >>> config = {"": percentile, torch.nn.Linear: "float"}
        >>> q = inductor_x86q.quantize(model, (x,), calibration=batches, config=config)
        >>> len(inductor_x86q.explain(q, (x,)).fused)
        3
    """

    mode: str | None = None
    activation: Any = None
    weight: Any = None


def by_selector(given: Any) -> dict[Any, Any]:
    """What `quantize(config=…)` was given, a choice for the whole model under ""."""
    return {} if given is None else dict(given) if isinstance(given, Mapping) else {"": given}


class Config:
    """The choice of each layer, from what `quantize(config=…)` was given."""

    def __init__(self, given: Any, default: LayerConfig) -> None:
        self.default = default
        self.entries: list[tuple[Any, int, LayerConfig]] = []
        for selector, value in by_selector(given).items():
            self.entries.append((selector, _rank(selector), _parsed(value, selector)))
        for _, rank, entry in self.entries:
            if rank == _MODEL and default.mode in DYNAMIC and entry.mode not in (None, default.mode):
                raise QuantizationError(
                    f"dynamic asks for {default.mode!r} and config for {entry.mode!r}, both of the whole model: leave "
                    "one of them out"
                )

    @property
    def whole(self) -> LayerConfig:
        """What is said of the whole model."""
        return next((entry for _, rank, entry in self.entries if rank == _MODEL), self.default)

    def of(self, node: fx.Node) -> tuple[LayerConfig, dict[str, tuple[int, int]]]:
        """The layer's choice, and how specific that of each field is."""
        ranks: dict[str, tuple[int, int]] = {}
        chosen: dict[str, Any] = {
            field.name: getattr(self.default, field.name) for field in dataclasses.fields(self.default)
        }
        origin: dict[str, Any] = {}
        for selector, rank, entry in self.entries:
            depth = _depth(selector, rank, node)
            if depth is None:
                continue
            for field in dataclasses.fields(entry):
                value, key = getattr(entry, field.name), (rank, depth)
                if value is None or key < ranks.get(field.name, (_MODEL, -1)):
                    continue
                if key == ranks.get(field.name) and value != chosen[field.name]:
                    raise QuantizationError(
                        f"config says two things of layer {layer_of(node)!r}: {origin[field.name]!r} asks for "
                        f"{field.name} {_short(chosen[field.name])}, {selector!r} for {_short(value)}"
                    )
                ranks[field.name], chosen[field.name], origin[field.name] = key, value, selector
        return LayerConfig(**chosen), ranks

    def check(self, layers: Iterable[fx.Node], exclude: Iterable[str | type]) -> None:
        """Raises QuantizationError where a name matches no layer, or one says how to quantize what `exclude` leaves out."""
        nodes, rules = list(layers), list(exclude)
        left_out = [node for node in nodes if is_excluded(node, rules)]
        for selector, rank, _ in self.entries:
            if rank in (_NAME, _PATTERN):  # types and operators may be said of many models
                _check_matches("config", selector, nodes)
            for node in left_out:
                if rank == _NAME and _depth(selector, rank, node) == 0 and self.of(node)[0].mode != "float":
                    raise QuantizationError(f"layer {selector!r} is excluded, and config says how to quantize it")
        for rule in rules:
            if isinstance(rule, str):
                _check_matches("exclude", rule, nodes)


# --- what is given ----------------------------------------------------------------------------------------------------


def _parsed(value: Any, selector: Any) -> LayerConfig:
    """An entry in full: shorthands spelled out, what no kernel takes refused."""
    where = f"config of {_short(selector)}" if selector != "" else "config"
    if value is None or (isinstance(value, str) and value in MODES):
        return LayerConfig(mode="float" if value is None else value)
    if isinstance(value, str) and value in specs.WEIGHT_OBSERVERS:
        return LayerConfig(weight=value)
    entry = value if isinstance(value, LayerConfig) else LayerConfig(activation=value)
    if entry.mode is not None and entry.mode not in MODES:
        raise QuantizationError(f"{where}: mode {entry.mode!r}, expected one of {', '.join(map(repr, MODES))}")
    mode = entry.mode
    if entry.activation is not None:
        specs.check_activation(entry.activation, where)
        implied = "per_tensor" if specs.is_dynamic(entry.activation) else "static"
        # The range of a row can stand in for that of the whole: what is observed is the same.
        if mode not in (None, implied) and (mode, implied) != ("per_token", "per_tensor"):
            raise QuantizationError(
                f"{where}: mode {mode!r} and activation {_short(entry.activation)}, which is {implied!r}, contradict "
                "each other"
            )
        mode = mode or implied
    if entry.weight is not None:
        specs.check_weight(entry.weight, where)
    if entry.mode in UNQUANTIZED and (entry.activation is not None or entry.weight is not None):
        raise QuantizationError(f"{where}: mode {entry.mode!r}, and observers, which a float layer has not")
    return dataclasses.replace(entry, mode=mode)


def _rank(selector: Any) -> int:
    if isinstance(selector, str):
        return _MODEL if not selector else _PATTERN if any(x in selector for x in "*?[") else _NAME
    if isinstance(selector, type):
        return _TYPE
    if isinstance(selector, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        if not is_layer_operator(selector):
            raise QuantizationError(
                f"config: {selector} is no convolution or linear, and has nothing of its own to choose"
            )
        return _OPERATOR
    raise QuantizationError(
        f"config: {selector!r} selects nothing: expected a module's name, a glob pattern of names, a module type, an "
        "operator such as torch.ops.aten.linear.default, or '' for the whole model"
    )


def _check_matches(argument: str, selector: Any, nodes: list[fx.Node]) -> None:
    if any(_depth(selector, _NAME, node) is not None for node in nodes):
        return
    names = list(dict.fromkeys(layer_of(node) for node in nodes))
    close = difflib.get_close_matches(str(selector), names, n=3, cutoff=0.5) or names[:5]
    raise QuantizationError(
        f"{argument}: {_short(selector)} matches no convolution or linear of the model; some that it has: "
        + ", ".join(map(repr, close))
    )


def _depth(selector: Any, rank: int, node: fx.Node) -> int | None:
    """How near to the layer the module is that the selector matches, 0 the nearest and others below; None: it does not."""
    if rank == _MODEL:
        return 0
    if rank == _OPERATOR:
        overload: Any = node.target
        return 0 if selector in (overload, getattr(overload, "overloadpacket", None)) else None
    stack = module_stack(node)
    for distance, (path, kind) in enumerate(reversed(stack)):
        if is_module(selector, path, kind):
            return -distance
    return None


def is_layer_operator(operator: Any) -> bool:
    """Whether an operator, or one of its overloads, is a convolution, linear or product."""
    overloads = (
        [operator]
        if isinstance(operator, torch._ops.OpOverload)
        else [getattr(operator, name) for name in operator.overloads()]
    )
    return any(overload in LAYER_OPERATORS for overload in overloads)


def is_excluded(node: fx.Node, rules: Iterable[str | type]) -> bool:
    return any(is_module(rule, path, kind) for path, kind in module_stack(node) for rule in rules)


def is_module(rule: str | type, path: str, kind: Any) -> bool:
    """Whether a name, a glob pattern of names or a type is that of the module."""
    if isinstance(rule, str):
        return path == rule or fnmatch.fnmatchcase(path, rule)
    return kind in (f"{rule.__module__}.{rule.__qualname__}", rule)


def module_stack(node: fx.Node) -> list[tuple[str, Any]]:
    """Path and type of each module around the node, outermost first, spelled alike for both export modes."""
    found = []
    for path, kind in (node.meta.get("nn_module_stack") or {}).values():
        path = path.replace("L['self']", "").removeprefix("L__self__").removeprefix(".")
        found.append((path, kind))
    return found


def _short(value: Any) -> str:
    if isinstance(value, type):
        return value.__qualname__
    text = repr(value)
    return text if len(text) <= 100 else text[:97] + "..."
