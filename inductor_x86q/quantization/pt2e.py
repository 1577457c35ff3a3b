"""The front door: export, prepare, calibrate, convert, on torchao's PT2E steps."""

from __future__ import annotations

import contextlib
import copy
import inspect
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from typing import Any

import torch
from torch import fx

from inductor_x86q import progress
from inductor_x86q.errors import QuantizationError
from inductor_x86q.graph import qdq
from inductor_x86q.graph.origin import layer
from inductor_x86q.graph.quantized_graph import QuantizedGraph, side_by_side
from inductor_x86q.quantization import qat, torchao
from inductor_x86q.quantization.quantizer import X86Quantizer

aten = torch.ops.aten

log = logging.getLogger(__name__)


def quantize(
    model: torch.nn.Module,
    example_inputs: tuple[Any, ...],
    *,
    calibration: Iterable[Any] | None = None,
    dynamic: bool | str = False,
    exclude: Iterable[str | type] = (),
    reduce_range: bool | None = None,
    dynamic_shapes: Any = None,
) -> QuantizedGraph:
    """Quantizes a model to int8 with torchao's PT2E steps and X86Quantizer.

    The result runs eagerly as the reference of what `torch.compile(result, backend="inductor_x86q")` computes. It
    takes any batch size where the model does.

    Args:
        model: a float32 module in eval mode, on the CPU. It is not changed.
        example_inputs: the positional arguments of one call, a tuple.
        calibration: calls to take the activations' ranges from: an iterable of tuples of positional arguments, a bare
            tensor counting as one argument. Batches may differ in size from the example's. Required unless `dynamic`.
        dynamic: quantize linears only, and compute scale and zero point of each of their inputs from its values at
            every call. Needs no calibration, and suits transformers; convolutions stay float. "per_token" gives each
            row (along the last dimension) a scale of its own, which is more exact where rows differ in size; True is
            "per_tensor".
        exclude: what stays float: module names, glob patterns of them, or module types.
        reduce_range: 7 bits for each layer's input, or for its weight where that costs no kernel; CPUs without VNNI
            need it. None decides by this machine.
        dynamic_shapes: as of `torch.export.export`; None makes the batch dynamic where the model allows it. Examples of
            size 1 are fine; a warning names each dimension that the model fixes.

    Raises:
        QuantizationError: the model is in train mode or has nothing to quantize, the inputs are no tuple, there is no
            calibration data, or it holds NaN or infinity where a layer is named.
    """
    _check_model(model)
    _check_inputs(example_inputs)
    if dynamic not in (False, True, "per_tensor", "per_token"):
        raise QuantizationError(f"dynamic is {dynamic!r}: expected False, True, 'per_tensor' or 'per_token'")
    if dynamic and calibration is not None:
        raise QuantizationError(
            "calibration was given with dynamic=True, which computes the ranges at every call: leave one of them out"
        )
    if not dynamic and calibration is None:
        raise QuantizationError(
            "no calibration data: pass calibration=[...], calls with typical inputs, e.g. calibration=[example_inputs], "
            "or dynamic=True to compute the ranges at every call"
        )
    exported, any_batch = _export(model, example_inputs, dynamic_shapes)
    quantizer = X86Quantizer(reduce_range=reduce_range, exclude=exclude, dynamic=bool(dynamic))
    prepared = _prepare(exported, quantizer)
    if calibration is None:
        calibration = [example_inputs]  # one call, in which the weights' observers see the weights
    with torch.no_grad(), _finite_values_only(prepared):
        _calibrate(prepared, calibration, None if any_batch else _batch_size(example_inputs))
    converted = convert(prepared)
    if dynamic == "per_token":
        _quantize_per_token(converted)
    return converted


def prepare_qat(
    model: torch.nn.Module,
    example_inputs: tuple[Any, ...],
    *,
    exclude: Iterable[str | type] = (),
    reduce_range: bool | None = None,
    dynamic_shapes: Any = None,
) -> qat.TrainingGraph:
    """Prepares a model for quantization-aware training: a graph that rounds as the int8 net will, to train as usual.

    Train the result in place of the model, then `convert()` it. It has parameters of its own, under the names they have
    in the model, in train mode; `train()` and `eval()` switch it. Batch norms behind convolutions and linears are
    folded into weights that training sees quantized. In eval mode the ranges of activations stay as they are.

    Args:
        model: a float32 module in train mode, on the CPU; batch norms in eval mode stay frozen. It is not changed.
        example_inputs: the positional arguments of one call, a tuple.
        exclude: what stays float: module names, glob patterns of them, or module types.
        reduce_range: as of `quantize`.
        dynamic_shapes: as of `torch.export.export`; None makes the batch dynamic where the model allows it.

    Raises:
        QuantizationError: the model is in eval mode or has nothing to quantize, or the inputs are no tuple.
    """
    _check_model(model, training=True)
    _check_inputs(example_inputs)
    # Exported graphs share the parameters and statistics of what they were exported from.
    exported, _ = _export(copy.deepcopy(model), example_inputs, dynamic_shapes)
    quantizer = X86Quantizer(reduce_range=reduce_range, exclude=exclude, is_qat=True)
    prepared = _prepare(exported, quantizer, torchao.prepare_for_training)
    qat.drop_counters(prepared.graph)
    trainable = qat.TrainingGraph(prepared, prepared.graph)
    trainable.meta.update(prepared.meta)  # by which torchao knows it again when converting
    return trainable.train()


def convert(prepared: fx.GraphModule) -> QuantizedGraph:
    """Turns a prepared and calibrated (or trained) graph into the q/dq graph that the backend compiles.

    Weights are stored in int8 under the names they had, their scales beside them; nothing requires grad. What
    `prepare_qat` returned is not changed, and can be trained further.
    """
    if not isinstance(prepared, fx.GraphModule):
        raise QuantizationError(
            f"prepared is a {type(prepared).__name__}: expected what prepare_qat() or prepare_pt2e() returned"
        )
    if isinstance(prepared, qat.TrainingGraph):
        prepared = copy.deepcopy(prepared)
    qat.fold(prepared)
    qat.hide_batch_norms(prepared.graph)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        converted = torchao.convert_pt2e(prepared, fold_quantize=False)
    torchao.forget_graphs()
    qat.show_batch_norms(converted.graph)
    _fold_weights(converted)
    _log_left_out(converted)
    quantized = side_by_side(converted)  # without what the graph does not read: the float weights above all
    _freeze_parameters(quantized)
    return quantized


# --- checks -----------------------------------------------------------------------------------------------------------


def _check_model(model: Any, training: bool = False) -> None:
    if not isinstance(model, torch.nn.Module):
        raise QuantizationError(f"model is a {type(model).__name__}: expected a torch.nn.Module")
    if training and not model.training:
        raise QuantizationError("the model is in eval mode: call model.train() before prepare_qat()")
    for name, module in model.named_modules():
        if module.training and not training:
            raise QuantizationError(
                f"{f'module {name!r}' if name else 'the model'} is in train mode: call model.eval() before quantizing, "
                "or prepare_qat() to train"
            )
    for name, tensor in model.named_parameters():
        if tensor.device.type != "cpu":
            raise QuantizationError(f"parameter {name!r} is on {tensor.device}: move the model to the CPU")


def _check_inputs(example_inputs: Any) -> None:
    if not isinstance(example_inputs, tuple):
        raise QuantizationError(
            f"example_inputs is a {type(example_inputs).__name__}: expected a tuple of positional arguments, "
            "e.g. (torch.randn(1, 3, 224, 224),)"
        )


# --- export -----------------------------------------------------------------------------------------------------------


def _export(
    model: torch.nn.Module, example_inputs: tuple[Any, ...], dynamic_shapes: Any
) -> tuple[fx.GraphModule, bool]:
    """The model's graph, and whether it takes any batch size."""
    # Training goes through the graph: grad mode is part of what is exported.
    with torch.set_grad_enabled(model.training):
        if dynamic_shapes is not None:
            return _export_as_asked(model, example_inputs, dynamic_shapes), True
        for inputs, shapes in _any_batch(example_inputs):
            try:
                exported = torch.export.export(model, inputs, dynamic_shapes=shapes)
            except Exception as error:  # whatever it is, the export with fixed shapes says it better
                log.debug("no export with a dynamic batch: %s", error)
                continue
            first = next(
                n
                for n in exported.graph.nodes
                if n.op == "placeholder" and n.name in exported.graph_signature.user_inputs
            )
            dynamic = not isinstance(first.meta["val"].shape[0], int) and _takes_other_batches(exported, example_inputs)
            if dynamic or _batch_size(inputs) == _batch_size(example_inputs):
                return exported.module(), dynamic  # type: ignore[return-value]
        return torch.export.export(model, example_inputs).module(), False  # type: ignore[return-value]


def _export_as_asked(model: torch.nn.Module, example_inputs: tuple[Any, ...], dynamic_shapes: Any) -> fx.GraphModule:
    """The graph with the dimensions open that `dynamic_shapes` names; warns of those that the model fixes."""
    asked = _open_dimensions(model, example_inputs, dynamic_shapes)
    inputs = list(example_inputs)
    for position, dimension in asked:  # export takes a size of 1 to be fixed
        x = inputs[position]
        if x.shape[dimension] == 1:
            inputs[position] = torch.cat([x, x], dimension)
    try:
        exported = torch.export.export(model, tuple(inputs), dynamic_shapes=dynamic_shapes)
    except Exception as error:  # the example as it was given says better what is wrong
        log.debug("no export with sizes of 1 doubled: %s", error)
        exported = torch.export.export(model, example_inputs, dynamic_shapes=dynamic_shapes)
    values = {node.name: node.meta.get("val") for node in exported.graph.find_nodes(op="placeholder")}
    names = exported.graph_signature.user_inputs
    for position, dimension in asked if len(names) == len(inputs) else ():
        size = values[names[position]].shape[dimension]
        if isinstance(size, int):
            warnings.warn(
                f"dimension {dimension} of input {names[position]!r} was asked to be dynamic, and the model fixes it to "
                f"{size}: the graph takes no other size",
                stacklevel=4,
            )
    return exported.module()  # type: ignore[return-value]


def _open_dimensions(model: torch.nn.Module, inputs: tuple[Any, ...], dynamic_shapes: Any) -> list[tuple[int, int]]:
    """The dimensions that `dynamic_shapes` leaves open, as positions of tensors among `inputs` and dimensions of each."""
    if isinstance(dynamic_shapes, Mapping):
        parameters = list(inspect.signature(model.forward).parameters)[: len(inputs)]
        shapes = [dynamic_shapes.get(name) for name in parameters]
    else:
        shapes = list(dynamic_shapes) if isinstance(dynamic_shapes, (tuple, list)) else []
    found = []
    for position, (x, shape) in enumerate(zip(inputs, shapes, strict=False)):
        if isinstance(x, torch.Tensor) and shape is not None:
            sizes = shape.items() if isinstance(shape, Mapping) else enumerate(shape)
            fixed = (None, torch.export.Dim.STATIC)
            found += [(position, d) for d, size in sizes if size not in fixed and not isinstance(size, int)]
    return found


def _takes_other_batches(exported: Any, example_inputs: tuple[Any, ...]) -> bool:
    """Whether a program with an open batch runs on the example and on one row more.

    Export leaves a size open and guards it where a shape is written out in the model: view(4, 2, 8) of a batch of four.
    """
    module = copy.deepcopy(exported.module())  # in train mode a call changes the statistics of batch norms
    more = tuple(torch.cat([x, x[:1]]) for x in example_inputs)
    try:
        module(*example_inputs)
        module(*more)
    except Exception as error:  # a guard raises AssertionError, an operator whatever it likes
        log.debug("the batch stays fixed: %s", error)
        return False
    return True


def _any_batch(example_inputs: tuple[Any, ...]) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Inputs and shapes to export with so that the first dimension of all inputs stays open, if they agree on it."""
    if _batch_size(example_inputs) is None:
        return
    inputs = example_inputs
    if _batch_size(inputs) == 1:  # export takes a size of 1 to be fixed
        inputs = tuple(torch.cat([x, x]) for x in inputs)
    yield inputs, tuple({0: torch.export.Dim.AUTO} for _ in inputs)


def _batch_size(inputs: Sequence[Any]) -> int | None:
    """The size of the first dimension of all inputs; None where they have none in common."""
    if not inputs or not all(isinstance(x, torch.Tensor) and x.dim() for x in inputs):
        return None
    sizes = {x.shape[0] for x in inputs}
    return sizes.pop() if len(sizes) == 1 else None


# --- prepare and calibrate --------------------------------------------------------------------------------------------


def _prepare(
    exported: fx.GraphModule, quantizer: X86Quantizer, prepare: Callable[..., fx.GraphModule] = torchao.prepare_pt2e
) -> fx.GraphModule:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        prepared = prepare(exported, quantizer)
    if not any(_is_observer(module) for module in prepared.modules()):
        excluded = ", ".join(layer(node) for node in quantizer.excluded)
        raise QuantizationError(
            "there is nothing to quantize: the model has no convolution or linear with a constant weight"
            + (f" that is not excluded ({excluded})" if excluded else "")
        )
    return prepared


def _is_observer(module: torch.nn.Module) -> bool:
    return hasattr(module, "calculate_qparams")


@contextlib.contextmanager
def _finite_values_only(prepared: fx.GraphModule) -> Iterator[None]:
    """Within this context an observer that sees NaN or infinity raises QuantizationError with the layer's name."""
    hooks = []
    for node in prepared.graph.nodes:
        if node.op != "call_module" or not _is_observer(prepared.get_submodule(node.target)):
            continue
        source = node.args[0]
        name = f"input {source.name!r}" if source.op == "placeholder" else f"the output of {layer(source)!r}"

        def check(module: torch.nn.Module, arguments: tuple[Any, ...], name: str = name) -> None:
            # NaN and infinity both reach the extremes, which take a fraction of the time of isfinite on every element.
            if arguments[0].numel() and not all(torch.isfinite(bound) for bound in torch.aminmax(arguments[0])):
                raise QuantizationError(f"calibration met NaN or infinity in {name}: check the data and the weights")

        hooks.append(prepared.get_submodule(node.target).register_forward_pre_hook(check))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _calibrate(prepared: fx.GraphModule, calibration: Iterable[Any], fixed_batch: int | None) -> None:
    """Runs all calls; where the graph takes one batch size only, cuts and pads batches to it."""
    if not isinstance(calibration, Iterable):
        raise QuantizationError(
            f"calibration is a {type(calibration).__name__}: expected an iterable of calls, each a tuple of arguments"
        )
    count = 0
    for call in _progress(calibration):
        inputs = call if isinstance(call, tuple) else tuple(call) if isinstance(call, list) else (call,)
        try:
            for part in _fitted(inputs, fixed_batch):
                prepared(*part)
        except QuantizationError:
            raise
        except Exception as error:  # whatever the model, or the guards of its export, raise
            got = ", ".join(str(tuple(x.shape)) if isinstance(x, torch.Tensor) else type(x).__name__ for x in inputs)
            reason = next(iter(str(error).splitlines()), "")
            raise QuantizationError(
                f"calibration call {count} does not fit the model: ({got}): {type(error).__name__}: {reason[:300]}"
            ) from error
        count += 1
    if not count:
        raise QuantizationError("no calibration data: the iterable was empty")


def _fitted(inputs: tuple[Any, ...], fixed_batch: int | None) -> Iterator[tuple[Any, ...]]:
    size = _batch_size(inputs)
    if fixed_batch is None or size is None or size == fixed_batch:
        yield inputs
        return
    for start in range(0, size, fixed_batch):
        part = [x[start : start + fixed_batch] for x in inputs]
        missing = fixed_batch - part[0].shape[0]
        # Rows that stand twice in a batch do not change the range, and hardly the histogram.
        yield tuple(x[torch.arange(fixed_batch) % (fixed_batch - missing)] for x in part)


def _progress(calls: Iterable[Any]) -> Iterator[Any]:
    """The calls one by one, with progress on a terminal."""
    with progress.task("calibrating", len(calls) if isinstance(calls, Sized) else None) as advance:
        for call in calls:
            yield call
            advance()


# --- convert ----------------------------------------------------------------------------------------------------------


def _fold_weights(converted: fx.GraphModule) -> None:
    """Stores each weight in int8 under its own name, with `_scale` and `_zero_point` beside it, and drops the float one."""
    graph = converted.graph
    for node in list(graph.nodes):
        if not qdq.is_quantize(node) or not qdq.is_constant(node):
            continue
        name = _weight_name(node)
        values: dict[fx.Node, Any] = {}
        with torch.no_grad():
            integers = _evaluate(converted, node, values)
        parameters = qdq.qparams(node)
        stored = {f"{name}_int8": integers}
        for suffix, value in (("scale", parameters.scale), ("zero_point", parameters.zero_point)):
            if isinstance(value, fx.Node):
                stored[f"{name}_{suffix}"] = values[value]
        nodes = {key: qdq.store(converted, key, tensor, node) for key, tensor in stored.items()}
        for dequantize in list(node.users):
            for old, suffix in ((parameters.scale, "scale"), (parameters.zero_point, "zero_point")):
                if isinstance(old, fx.Node):
                    dequantize.replace_input_with(old, nodes[f"{name}_{suffix}"])
        node.replace_all_uses_with(nodes[f"{name}_int8"])
        qdq.erase_dead(node)
    graph.eliminate_dead_code()
    converted.recompile()


def _quantize_per_token(converted: fx.GraphModule) -> None:
    """Gives each row of a dynamically quantized input its own scale, symmetric around the middle of the range."""
    graph = converted.graph
    for node in list(graph.nodes):
        if node.target is not qdq.DEQUANTIZE_TENSOR:
            continue
        quantize: Any = node.args[0]
        parameters = qdq.qparams(node)
        x, low, high = quantize.args[0], parameters.quant_min, parameters.quant_max
        middle = (low + high + 1) // 2

        def call(target: Any, *arguments: Any, like: fx.Node = node, **keywords: Any) -> fx.Node:
            new = graph.call_function(target, arguments, keywords)
            qdq.copy_origin(new, like)
            return new

        with graph.inserting_before(node):
            largest = call(aten.amax.default, call(aten.abs.default, x), [-1], True)
            scales = call(aten.clamp_min.default, call(aten.div.Tensor, largest, high - middle), _SMALLEST_SCALE)
            zero_points = call(aten.full_like.default, scales, middle)
            arguments = (scales, zero_points, low, high, parameters.dtype)
            integers = call(qdq.QUANTIZE_TOKEN, x, *arguments)
            new = call(qdq.DEQUANTIZE_TOKEN, integers, *arguments, output_dtype=torch.float32)
        node.replace_all_uses_with(new)
        qdq.erase_dead(node)
    converted.recompile()


_SMALLEST_SCALE = 2.0**-24  # of a row of zeros


def _freeze_parameters(quantized: QuantizedGraph) -> None:
    """Gives the graph parameters of its own, without gradients: those that it was exported with are the model's."""
    own: dict[int, torch.nn.Parameter] = {}
    for name, parameter in list(quantized.named_parameters(remove_duplicate=False)):
        if id(parameter) not in own:
            own[id(parameter)] = torch.nn.Parameter(parameter.detach().clone(), requires_grad=False)
        setattr(quantized, name, own[id(parameter)])


def _weight_name(node: fx.Node) -> str:
    while node.op != "get_attr":
        node = node.all_input_nodes[0]
    return str(node.target)


def _evaluate(module: fx.GraphModule, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    if node not in values:
        if node.op == "get_attr":
            values[node] = qdq.constant(node)
        else:
            arguments = fx.map_arg((node.args, node.kwargs), lambda n: _evaluate(module, n, values))
            values[node] = node.target(*arguments[0], **arguments[1])  # type: ignore[operator]
    return values[node]


def _log_left_out(converted: fx.GraphModule) -> None:
    """Says which convolutions, linears and matrix products stay float."""
    left = left_out(converted)
    if left:
        log.info("not quantized, stays float: %s", ", ".join(left))


def _operands(node: fx.Node) -> list[fx.Node]:
    """The tensors that the node multiplies: the bias, first or last, is not one of them."""
    tensors = [argument for argument in node.args if isinstance(argument, fx.Node)]
    return tensors[1:3] if str(node.target).startswith(("aten.addmm", "aten.baddbmm")) else tensors[:2]


_PRODUCTS = ("conv", "linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "scaled_dot_product", "lstm", "gru")


def left_out(converted: fx.GraphModule) -> list[str]:
    """The layers of a q/dq graph that compute products in float."""
    names = []
    for node in converted.graph.nodes:
        operator = str(node.target).removeprefix("aten.").split(".")[0]
        is_product = node.op == "call_function" and operator.startswith(_PRODUCTS)
        if is_product and not all(qdq.is_dequantize(operand) for operand in _operands(node)):
            names.append(f"{layer(node)} ({operator})")
    return names
