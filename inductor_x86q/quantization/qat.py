"""Training graphs: batch norm folded into the weight that training sees quantized, and folded for good afterwards.

Inference runs a layer with the batch norm behind it as one kernel whose weight is w·s, with s = γ/√(σ² + ε). Training
must round that weight, and still needs the statistics of the layer's own output:

    batch_norm(layer(x, fake_quantize(w·s)) · 1/s + bias)

s is made of the running variance, so that one pass forward is enough. Where s is 0 (γ that starts at 0), 1 stands in.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import fx

from inductor_x86q.graph import operators, qdq
from inductor_x86q.graph.operators import Role
from inductor_x86q.quantization import torchao

aten = torch.ops.aten

BATCH_NORM = aten.batch_norm.default
LINEAR = aten.linear.default


# --- before training --------------------------------------------------------------------------------------------------


def batch_norm_behind(layer: fx.Node) -> fx.Node | None:
    """The batch norm that inference can fold into the convolution or linear; None if there is none."""
    norm = qdq.only_user(layer)
    if norm is None or norm.target is not BATCH_NORM or norm.args[0] is not layer:
        return None
    if not all(value is None or qdq.constant(value) is not None for value in norm.args[1:5]):
        return None
    if norm.args[3] is None or norm.args[4] is None:
        return None  # no running statistics: inference normalizes by the batch's own
    if layer.target is LINEAR and qdq.value(layer).dim() != 2:
        return None  # its channels are not the linear's outputs
    return norm


def scale_weights(layers: dict[fx.Node, fx.Node]) -> None:
    """Rewrites each layer for training with the weight it will have once its batch norm is folded.

    Args:
        layers: of each annotated convolution or linear the batch norm behind it.
    """
    for layer, norm in layers.items():
        graph = layer.graph
        weight: Any = layer.args[1]
        bias: Any = layer.args[2] if len(layer.args) > 2 else None
        call = functools.partial(qdq.call, like=layer)
        with graph.inserting_before(layer):
            scale = _scale_nodes(call, norm)
            ones = [1] * (qdq.value(weight).dim() - 1)
            scaled = call(aten.mul.Tensor, weight, call(aten.reshape.default, scale, [-1, *ones]))
        layer.args = (layer.args[0], scaled, None, *layer.args[3:])
        annotation = layer.meta[torchao.ANNOTATION_KEY].input_qspec_map
        annotation[scaled] = annotation.pop(weight)
        channels = [1, -1] + [1] * (qdq.value(layer).dim() - 2)
        with graph.inserting_before(norm):
            inverse = call(aten.reciprocal.default, scale)  # a product's gradient is cheaper than a quotient's
            result = call(aten.mul.Tensor, layer, call(aten.reshape.default, inverse, channels))
            if bias is not None:
                result = call(aten.add.Tensor, result, call(aten.reshape.default, bias, channels))
        norm.replace_input_with(layer, result)


def _scale_nodes(call: Any, norm: fx.Node) -> fx.Node:
    _, gamma, _, _, variance, _, _, epsilon = norm.args[:8]
    deviation = call(aten.sqrt.default, call(aten.add.Scalar, variance, epsilon))
    scale = call(aten.reciprocal.default, deviation) if gamma is None else call(aten.div.Tensor, gamma, deviation)
    return call(aten.masked_fill.Scalar, scale, call(aten.eq.Scalar, scale, 0.0), 1.0)


def drop_counters(graph: fx.Graph) -> None:
    """Batch norms no longer count batches: nothing that an exported one does depends on it."""
    for node in list(graph.nodes):
        if node.target is aten.add_.Tensor and not node.users:
            source: Any = node.args[0]
            if source.op == "get_attr" and str(source.target).endswith("num_batches_tracked"):
                graph.erase_node(node)


# --- training and evaluating ------------------------------------------------------------------------------------------

# Arguments by which operators differ between training and inference, with their value in inference.
_INFERENCE = {"train": False, "training": False, "dropout_p": 0.0}


def set_training(graph: fx.Graph, mode: bool) -> None:
    """Puts the operators of a graph that was exported in train mode into train mode as exported, or inference."""
    for node in graph.nodes:
        schema = getattr(node.target, "_schema", None)
        for position, argument in enumerate(schema.arguments if schema else ()):
            if argument.name in _INFERENCE:
                _set_argument(node, position, argument.name, mode)


def _set_argument(node: fx.Node, position: int, name: str, mode: bool) -> None:
    by_position = position < len(node.args)
    if not by_position and name not in node.kwargs:
        return
    exported = node.meta.setdefault("x86q_training", {})
    exported.setdefault(name, node.args[position] if by_position else node.kwargs[name])
    value = exported[name] if mode else _INFERENCE[name]
    if by_position:
        node.update_arg(position, value)
    else:
        node.update_kwarg(name, value)


class TrainingGraph(fx.GraphModule):
    """What `prepare_qat` returns: a graph with fake quantization that `train()` and `eval()` switch.

    In eval mode the ranges of activations stay as they are; one that has met no data yet still takes them.
    """

    def train(self, mode: bool = True) -> TrainingGraph:
        if mode != self.training:
            for module in self.modules():
                if isinstance(module, torchao.FakeQuantize) and not module.is_per_channel:  # that is a weight's
                    _set_observing(module, mode)
        super().train(mode)
        set_training(self.graph, mode)
        self.recompile()
        return self


def _set_observing(module: Any, mode: bool) -> None:
    """Observers rest while evaluating; those that were switched off by the user stay off when training goes on."""
    if mode:
        if getattr(module, "_x86q_resting", False):
            module.enable_observer()
        module._x86q_resting = False
        return
    observer = module.activation_post_process
    has_range = observer.min_val.numel() and bool(torch.isfinite(observer.min_val).all())
    module._x86q_resting = bool(module.observer_enabled[0]) and bool(has_range)
    if module._x86q_resting:
        module.disable_observer()


# --- after training ---------------------------------------------------------------------------------------------------


def fold(module: fx.GraphModule) -> None:
    """Folds each batch norm that training saw folded into its layer's weight and bias; all else goes to inference.

    The weights' ranges are taken once more, from the weights as they are now, where their observers are on.
    """
    set_training(module.graph, False)
    drop_counters(module.graph)
    for norm in list(module.graph.nodes):
        layer = _trained_layer(norm) if norm.target is BATCH_NORM else None
        if layer is not None:
            _fold(module, layer, norm)
    module.graph.eliminate_dead_code()
    module.recompile()


def _trained_layer(norm: fx.Node) -> fx.Node | None:
    """The layer that `scale_weights` rewrote in front of this batch norm."""
    unscaled: Any = norm.args[0]
    if unscaled.target is aten.add.Tensor:
        unscaled = unscaled.args[0]
    if not _multiplies(unscaled) or len(unscaled.args[0].args) < 3:
        return None
    layer, inverse = unscaled.args
    scaled = _behind_fake_quantize(layer.args[1])
    if not _multiplies(scaled) or layer.args[2] is not None:
        return None
    # Both factors are views, of the scale and of its reciprocal.
    scale, source = scaled.args[1].args[0], inverse.args[0]
    is_inverse = isinstance(source, fx.Node) and source.target is aten.reciprocal.default and source.args[0] is scale
    return layer if is_inverse else None


def batch_norm(*arguments: Any) -> torch.Tensor:
    """Stands in for a batch norm that torchao shall leave alone."""
    return BATCH_NORM(*arguments)


def hide_batch_norms(graph: fx.Graph) -> None:
    """Renames the batch norms that stay, until `show_batch_norms`.

    Where there is one at all, torchao's converting looks for its own training form in every spelling, which takes it
    half a minute. That form divides in front of the batch norm; such ones keep their name.
    """
    for norm in graph.nodes:
        if norm.target is BATCH_NORM:
            source: Any = norm.args[0]
            before = [source, *source.all_input_nodes]
            if not any(node.target is aten.div.Tensor for node in before):
                norm.target = batch_norm


def hide_batch_norms_of_groups(graph: fx.Graph) -> None:
    """Renames those behind transposed convolutions of groups, until `show_batch_norms`: folding them fails in torch."""
    for norm in graph.nodes:
        layer: Any = norm.args[0] if norm.target is BATCH_NORM else None
        if operators.role(layer) is Role.TRANSPOSED_CONVOLUTION and qdq.schema_arguments(layer)["groups"] != 1:
            norm.target = batch_norm


def show_batch_norms(graph: fx.Graph) -> None:
    for norm in graph.nodes:
        if norm.target is batch_norm:
            norm.target = BATCH_NORM


def _multiplies(node: Any) -> bool:
    """Whether the node multiplies a tensor by a view of another."""
    if not isinstance(node, fx.Node) or node.target is not aten.mul.Tensor:
        return False
    second = node.args[1]
    return isinstance(node.args[0], fx.Node) and isinstance(second, fx.Node) and second.target is aten.reshape.default


def _behind_fake_quantize(weight: Any) -> Any:
    if isinstance(weight, fx.Node) and weight.op == "call_module":
        return weight.args[0]
    return weight


def _fold(module: fx.GraphModule, layer: fx.Node, norm: fx.Node) -> None:
    def value(argument: Any, default: float) -> torch.Tensor:
        found = qdq.constant(argument)
        return variance.new_full(variance.shape, default) if found is None else found.detach()

    def stored(argument: Any) -> torch.Tensor:
        found = qdq.constant(argument)
        assert found is not None, f"{argument} of {norm} is no constant"
        return found.detach()

    variance = stored(norm.args[4])
    gamma, beta, mean = value(norm.args[1], 1.0), value(norm.args[2], 0.0), value(norm.args[3], 0.0)
    before: Any = norm.args[0]
    bias = before.args[1].args[0] if before.target is aten.add.Tensor else None
    quantized: Any = layer.args[1]
    scaled: Any = _behind_fake_quantize(quantized)
    weight = scaled.args[0]
    tensor, epsilon = stored(weight), float(qdq.schema_arguments(norm)["eps"])

    scale = gamma / torch.sqrt(variance + epsilon)
    folded = tensor * scale.reshape(-1, *[1] * (tensor.dim() - 1))
    shift = beta + (value(bias, 0.0) - mean) * scale
    place = str(weight.target).removesuffix("weight") + "bias" if bias is None else str(bias.target)
    for node in (weight, bias):
        if node is not None and _is_only_reader(node):
            _delete(module, str(node.target))  # what is stored takes the name
    new_weight = qdq.store(module, str(weight.target), folded, quantized)
    new_bias = qdq.store(module, place, shift, layer)
    if quantized is scaled:
        layer.replace_input_with(scaled, new_weight)
    else:
        quantized.replace_input_with(scaled, new_weight)
        with torch.no_grad():
            module.get_submodule(quantized.target)(folded)
    layer.update_arg(2, new_bias)
    norm.replace_all_uses_with(layer)
    qdq.erase_dead(norm)


def _is_only_reader(node: fx.Node) -> bool:
    return sum(other.op == "get_attr" and other.target == node.target for other in node.graph.nodes) == 1


def _delete(module: fx.GraphModule, name: str) -> None:
    owner, _, last = name.rpartition(".")
    delattr(module.get_submodule(owner), last)
