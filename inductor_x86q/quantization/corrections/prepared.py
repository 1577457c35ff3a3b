"""A prepared graph as corrections see it: layers with their weights, and values in float and rounded side by side."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import fx

from inductor_x86q.graph import operators, qdq
from inductor_x86q.graph.layers import full
from inductor_x86q.graph.operators import Role, role
from inductor_x86q.quantization import rows, specs
from inductor_x86q.quantization.calibration import is_observer


@dataclasses.dataclass(frozen=True)
class Layer:
    """A convolution or linear whose activation and weight are observed; the weight is a parameter that only it reads."""

    node: fx.Node
    activation: fx.Node  # the observer
    weight: fx.Node  # the parameter
    observer: Any  # of the weight

    @property
    def bias(self) -> fx.Node | None:
        return qdq.schema_arguments(self.node)["bias"]

    @property
    def geometry(self) -> tuple[list[int], list[int], list[int], int]:
        """Of a convolution: stride, padding and dilation, a number for each dimension, and groups."""
        weight: Any = qdq.constant(self.weight)  # the observer in front of it has no shape that the node would know
        arguments = qdq.schema_arguments(self.node)
        sizes = (full(arguments[name], weight.dim() - 2) for name in ("stride", "padding", "dilation"))
        return (*sizes, arguments["groups"])  # type: ignore[return-value]

    @property
    def groups(self) -> int:
        return self.geometry[3] if role(self.node) is Role.CONVOLUTION else 1

    @property
    def source(self) -> Any:
        """The value that is observed."""
        return self.activation.args[0]


def layers(prepared: fx.GraphModule) -> Iterator[Layer]:
    names = [node.target for node in prepared.graph.nodes if node.op == "get_attr"]
    for node in prepared.graph.nodes:
        if role(node) not in (Role.CONVOLUTION, Role.LINEAR):
            continue
        if isinstance(qdq.schema_arguments(node).get("padding"), str):
            continue  # "same" is no number
        activation, observed = operators.factors(node)
        if not observer_of(prepared, activation) or not observer_of(prepared, observed):
            continue
        weight: Any = observed.args[0]
        if qdq.constant(weight) is not None and len(weight.users) == 1 and names.count(weight.target) == 1:
            yield Layer(node, activation, weight, observer_of(prepared, observed))


def observer_of(prepared: fx.GraphModule, node: Any) -> Any:
    """The observer that the node calls, None where it calls none."""
    if not isinstance(node, fx.Node) or node.op != "call_module":
        return None
    module = prepared.get_submodule(str(node.target))
    return module if is_observer(module) else None


def set_constant(prepared: fx.GraphModule, node: fx.Node, value: torch.Tensor) -> None:
    """Gives the graph a parameter of its own; that which it was exported with is the model's."""
    owner, _, name = str(node.target).rpartition(".")
    module = prepared.get_submodule(owner)
    if name in module._buffers:
        module._buffers[name] = value.detach().clone()
    else:
        setattr(module, name, torch.nn.Parameter(value.detach().clone(), requires_grad=False))


def set_bias(prepared: fx.GraphModule, layer: Layer, value: torch.Tensor) -> None:
    names = [node.target for node in prepared.graph.nodes if node.op == "get_attr"]
    if layer.bias is not None and names.count(layer.bias.target) == 1 and len(layer.bias.users) == 1:
        set_constant(prepared, layer.bias, value)
        return
    name = str(layer.weight.target).removesuffix("weight") + "bias"
    bias = qdq.store(prepared, name, value, layer.node)
    layer.node.update_arg(2, bias)


# --- both at once -----------------------------------------------------------------------------------------------------


class Lockstep:
    """Runs a calibrated graph on several calls at once, node by node: in float, and rounded as int8 will be.

    `at` is called before each layer, with the values of what it reads known, and may change its weight and bias.
    """

    def __init__(self, prepared: fx.GraphModule, calls: Sequence[tuple[Any, ...]]) -> None:
        self.prepared, self.calls = prepared, calls
        self.float: dict[fx.Node, list[Any]] = {}
        self.rounded: dict[fx.Node, list[Any]] = {}

    @torch.no_grad()
    def run(self, at: Callable[[fx.Node, Lockstep], None] = lambda node, run: None, *, rounding: bool = True) -> None:
        """Without `rounding` the rounded values are the float ones, of observers that have met no data yet."""
        nodes = list(self.prepared.graph.nodes)
        constants = qdq.constants(self.prepared.graph)
        last = {used: node for node in nodes for used in node.all_input_nodes}
        inputs = [iter(self.prepared.graph.process_inputs(*call)) for call in self.calls]
        for node in nodes:
            if node.op == "placeholder":
                self.float[node] = self.rounded[node] = [next(values) for values in inputs]
            elif node.op == "output":
                self.outputs = [self._tensors(values, node) for values in (self.float, self.rounded)]
            else:
                self.float[node] = self._evaluate(node, self.float, node in constants, exact=True)
                at(node, self)
                exact = self.float[node]
                self.rounded[node] = (
                    self._evaluate(node, self.rounded, node in constants, exact=False) if rounding else exact
                )
            for used in {x for x in node.all_input_nodes if last.get(x) is node}:
                if used not in constants:
                    self.float.pop(used), self.rounded.pop(used)

    @property
    def signal_to_noise(self) -> float:
        """Of the rounded outputs, in dB."""
        exact, rounded = self.outputs
        signal = sum(float(x.double().square().sum()) for x in exact)
        noise = sum(float((x.double() - y.double()).square().sum()) for x, y in zip(exact, rounded, strict=True))
        return 10 * math.log10(signal / noise) if signal and noise else (math.inf if signal else -math.inf)

    def recompute(self, node: fx.Node) -> list[Any]:
        """The rounded value of a node once more."""
        return self._evaluate(node, self.rounded, False, exact=False)

    def reread(self, layer: Layer) -> None:
        """Takes the layer's weight as it is now for the rounded values."""
        weight: Any = qdq.constant(layer.weight)
        observed: Any = layer.node.args[1]
        self.rounded[observed] = [fake_quantize(layer.observer, weight)] * len(self.calls)

    def _evaluate(self, node: fx.Node, values: dict[fx.Node, list[Any]], constant: bool, *, exact: bool) -> list[Any]:
        count = len(self.calls)
        if not exact and self._is_exact_still(node):
            return self.float[node]
        if node.op == "get_attr" and not exact and node in self.float:
            return self.float[node]
        run = functools.partial(self._call, node, values, exact=exact)
        return [run(0)] * count if constant else [run(number) for number in range(count)]

    def _is_exact_still(self, node: fx.Node) -> bool:
        """Whether nothing that the node reads is rounded."""
        if node.op == "get_attr" or observer_of(self.prepared, node) or node not in self.float:
            return False
        return all(x in self.rounded and self.rounded[x] is self.float[x] for x in node.all_input_nodes)

    def _call(self, node: fx.Node, values: dict[fx.Node, list[Any]], number: int, *, exact: bool) -> Any:
        if node.op == "get_attr":
            return fx.Interpreter(self.prepared).fetch_attr(str(node.target))
        arguments: Any
        arguments, keywords = fx.map_arg((node.args, node.kwargs), lambda used: self._value(used, values, number))
        observer = observer_of(self.prepared, node)
        if observer is not None:
            granularity = next((user.meta.get(specs.GRANULARITY) for user in node.users), None)
            return arguments[0] if exact else fake_quantize(observer, arguments[0], granularity == "per_token")
        if node.op == "call_module":
            return self.prepared.get_submodule(str(node.target))(*arguments, **keywords)
        if node.op == "call_method":
            return getattr(arguments[0], str(node.target))(*arguments[1:], **keywords)
        return node.target(*arguments, **keywords)  # type: ignore[operator]

    def _value(self, used: fx.Node, values: dict[fx.Node, list[Any]], number: int) -> Any:
        if used not in values and used.op == "get_attr":  # a bias that a correction has added
            return qdq.constant(used)
        return values[used][number]

    def _tensors(self, values: dict[fx.Node, list[Any]], output: fx.Node) -> list[torch.Tensor]:
        leaves = [node for node in output.all_input_nodes]
        found = [value for node in leaves for value in values[node] if isinstance(value, torch.Tensor)]
        return [value for value in found if value.is_floating_point()]


def fake_quantize(observer: Any, x: torch.Tensor, per_token: bool = False) -> torch.Tensor:
    """The values that int8 stands for."""
    if not x.is_floating_point():
        return x
    low, high = observer.quant_min, observer.quant_max
    if getattr(observer, "is_dynamic", False):
        if per_token:
            return rows.fake_quantized(x, low, high)
        smallest, largest = min(0.0, float(x.min())), max(0.0, float(x.max()))
        scale_of_all = max((largest - smallest) / (high - low), observer.eps)
        zero = min(max(low - round(smallest / scale_of_all), low), high)
        return torch.fake_quantize_per_tensor_affine(x, scale_of_all, zero, low, high)
    scale, zero_point = parameters(observer)
    if scale.numel() > 1 or observer.qscheme == torch.per_channel_symmetric:
        return torch.fake_quantize_per_channel_affine(x, scale, zero_point.int(), observer.ch_axis, low, high)
    return torch.fake_quantize_per_tensor_affine(x, float(scale), int(zero_point), low, high)


def parameters(observer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero point, found once: a histogram is searched for them."""
    if not hasattr(observer, "_x86q_parameters"):
        observer._x86q_parameters = observer.calculate_qparams()
    return observer._x86q_parameters
