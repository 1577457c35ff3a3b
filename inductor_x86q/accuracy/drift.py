"""How far int8 drifts from float32, layer by layer: which layer costs the accuracy, and what excluding it would give.

The quantized graph is its own reference: with every quantize and dequantize skipped it computes in float32. Its weights
are kept in int8 alone, so what rounding them costs shows only against the float model that it was made from.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from inductor_x86q import progress
from inductor_x86q.errors import CompileError
from inductor_x86q.graph import operators, qdq
from inductor_x86q.graph.attention import ATTENTION
from inductor_x86q.graph.operators import Role
from inductor_x86q.graph.origin import layer as layer_of
from inductor_x86q.graph.quantized_graph import SEPARATOR, attribute_of
from inductor_x86q.quantization.arguments import checked, positional
from inductor_x86q.quantization.export import export
from inductor_x86q.quantization.pt2e import prepare
from inductor_x86q.quantization.quantizer import X86Quantizer
from inductor_x86q.report.model import Drift, LayerDrift

_SCALED = 2.0  # steps that a weight is off, as a root of the mean square, by which it is no rounding of the float one
# Layers are worth excluding when the noise of the output falls to half.
WORTH = 10 * math.log10(2)


def measure(
    quantized: torch.nn.Module,
    example_inputs: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
    float_model: torch.nn.Module | None = None,
) -> Drift:
    """Runs the graph once for each layer, eagerly.

    Args:
        quantized: what `quantize()` returned.
        float_model: what it was made from.

    Raises:
        CompileError: the model is no graph with q/dq nodes.
    """
    if not isinstance(quantized, fx.GraphModule):
        raise CompileError(
            f"drift is measured on a graph that quantize() returned, not on a {type(quantized).__name__}"
        )
    layers = [node for node in quantized.graph.nodes if is_layer(node)]
    if not layers:
        raise CompileError("drift: the model has no layer with quantized inputs or weights")
    args, named = checked(example_inputs, kwargs, CompileError)
    weights = _float_weights(quantized, args, named, float_model) if float_model is not None else {}
    inputs = positional(quantized, args, named)

    def run(rounded: Collection[fx.Node]) -> _Run:
        found = _Run(quantized, weights, frozenset(rounded))
        with torch.no_grad():
            found.run(*inputs)
        return found

    reference = run(())
    everything = run(layers)
    noises = {}
    with progress.task("measuring layers", total=len(layers)) as advance:
        for node in layers:
            noises[node] = _noise(run([node]).outputs, reference.outputs)
            advance()
    total = sum(noises.values()) or 1.0
    signal = _noise(reference.outputs)
    rows = []
    for node in sorted(layers, key=lambda node: -noises[node]):
        here = _ratio(_noise([reference.results[node]]), _noise([everything.results[node]], [reference.results[node]]))
        rows.append(
            LayerDrift(
                layer_of(node), operators.own_name(node), here, _ratio(signal, noises[node]), noises[node] / total
            )
        )
    with torch.no_grad():
        output = _ratio(signal, _noise(_tensors(quantized(*inputs)), reference.outputs))
    before = _ratio(signal, _noise(everything.outputs, reference.outputs))
    worst = sorted(layers, key=lambda node: -noises[node])[: max(1, len(layers) // 10)]
    for count in range(1, len(worst) + 1):
        after = _ratio(signal, _noise(run(set(layers) - set(worst[:count])).outputs, reference.outputs))
        if before is not None and (after is None or after - before >= WORTH):
            return Drift(output, tuple(rows), bool(weights), tuple(layer_of(node) for node in worst[:count]), after)
    return Drift(output, tuple(rows), bool(weights))


_LAYERS = (Role.CONVOLUTION, Role.TRANSPOSED_CONVOLUTION, Role.LINEAR, Role.PRODUCT, Role.ATTENTION)


class _Run(fx.Interpreter):
    """The graph in float32, save for the layers in `rounded`, which read what their q/dq nodes make of their operands."""

    def __init__(
        self, module: fx.GraphModule, weights: Mapping[str, torch.Tensor], rounded: frozenset[fx.Node]
    ) -> None:
        super().__init__(module, garbage_collect_values=False)
        self.weights, self.rounded = weights, rounded
        self.results: dict[fx.Node, torch.Tensor] = {}
        self.outputs: list[torch.Tensor] = []

    def run_node(self, node: fx.Node) -> Any:
        if qdq.is_quantize(node) and not qdq.is_constant(node):
            return self.env[qdq.operand(node)]
        if qdq.is_dequantize(node):
            return self._skipped(node)
        if node.target is ATTENTION and node not in self.rounded:
            self.results[node] = self._unrounded_attention(node)
            return self.results[node]
        if not is_layer(node):
            value = super().run_node(node)
            if node.op == "output":
                self.outputs = _tensors(value)
            return value
        values = self.env
        if node in self.rounded:
            self.env = {**values, **{x: self._rounded(x) for x in node.all_input_nodes if qdq.is_dequantize(x)}}
        self.results[node] = super().run_node(node)
        self.env = values
        return self.results[node]

    def _unrounded_attention(self, node: fx.Node) -> torch.Tensor:
        query, key, value, mask, is_causal, scale = self.fetch_args_kwargs_from_env(node)[0]
        attend = torch.nn.functional.scaled_dot_product_attention
        return attend(query, key, value, mask, is_causal=is_causal, scale=scale, enable_gqa=query.dim() > 3)

    def _skipped(self, node: fx.Node) -> Any:
        value = self.env[qdq.operand(node)]
        if value.is_floating_point():
            return value.to(qdq.out_dtype(node))
        name = _weight_name(node)
        return self.weights[name] if name is not None and name in self.weights else super().run_node(node)

    def _rounded(self, node: fx.Node) -> Any:
        quantize: Any = node.args[0]
        value = self.env[quantize]
        if qdq.is_quantize(quantize) and not qdq.is_constant(quantize):
            arguments, keywords = self.fetch_args_kwargs_from_env(quantize)
            value = quantize.target(*arguments, **keywords)
        arguments, keywords = self.fetch_args_kwargs_from_env(node)
        return value if value.is_floating_point() else qdq.evaluate(node, value, *arguments[1:], **keywords)


def is_layer(node: fx.Node) -> bool:
    """Whether the node is a convolution, linear, matrix product or attention that reads a dequantized operand."""
    return operators.role(node) in _LAYERS and any(qdq.is_dequantize(operand) for operand in node.all_input_nodes)


def _weight_name(node: fx.Node) -> str | None:
    """The float parameter that a dequantized weight was made from."""
    source: Any = node.args[0]
    return str(source.target).removesuffix("_int8") if source.op == "get_attr" else None


def _float_weights(
    quantized: fx.GraphModule, args: tuple[Any, ...], kwargs: dict[str, Any], float_model: torch.nn.Module
) -> dict[str, torch.Tensor]:
    """The weights before they were rounded, batch-norms folded in, by name; none where a correction has scaled some.

    Raises CompileError where the model is not the one that `quantized` was made from.
    """
    if not isinstance(float_model, torch.nn.Module):
        raise CompileError(f"drift is a {type(float_model).__name__}: expected True or the float model")
    exported, _ = export(float_model, args, kwargs, None)
    prepared = prepare(exported, X86Quantizer())
    parameters = {**dict(prepared.named_parameters(remove_duplicate=False)),
                  **dict(prepared.named_buffers(remove_duplicate=False))}  # fmt: skip
    by_attribute = {attribute_of(name): tensor for name, tensor in parameters.items()}
    found = {}
    for node in quantized.graph.nodes:
        name = _weight_name(node) if qdq.is_dequantize(node) else None
        if name is None:
            continue
        stored = qdq.constant(node.args[0])
        weight = by_attribute.get(attribute_of(name))
        if weight is None or stored is None or weight.shape != stored.shape:
            in_model = name.replace(SEPARATOR, ".")
            raise CompileError(f"drift: the float model has no weight {in_model!r} of the quantized one's shape")
        found[name] = weight.detach()
        if _is_scaled(node, found[name]):
            return {}
    return found


def _is_scaled(dequantize: fx.Node, weight: torch.Tensor) -> bool:
    """Whether a correction has multiplied the weight's channels, so that it goes with other activations than the model's."""
    parameters = qdq.qparams(dequantize)
    values = [x if isinstance(x, (int, float)) else qdq.constant(x) for x in (parameters.scale, parameters.zero_point)]
    scale, zero_point = (torch.as_tensor(x, dtype=torch.float64) for x in values)
    if parameters.axis is not None:
        shape = [1] * weight.dim()
        shape[parameters.axis] = -1
        scale, zero_point = scale.reshape(shape), zero_point.reshape(shape)
    steps = qdq.constant(dequantize.args[0]).double() - zero_point - weight.double() / scale  # type: ignore[union-attr]
    return bool(steps.square().mean().sqrt() > _SCALED)


def _tensors(value: Any) -> list[torch.Tensor]:
    leaves = torch.utils._pytree.tree_leaves(value)
    return [x for x in leaves if isinstance(x, torch.Tensor) and x.is_floating_point()]


def _noise(values: Sequence[torch.Tensor], reference: Sequence[torch.Tensor] | None = None) -> float:
    """The sum of squares, of the differences where there is a reference."""
    total = 0.0
    for position, value in enumerate(values):
        difference = value.double() - reference[position].double() if reference is not None else value.double()
        total += difference.square().sum().item()
    return total


def _ratio(signal: float, noise: float) -> float | None:
    """In dB; None where there is no noise."""
    if not noise:
        return None
    return 10 * math.log10(signal / noise) if signal else -math.inf
