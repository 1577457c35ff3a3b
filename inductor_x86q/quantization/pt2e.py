"""The front door: quantize, prepare_qat and convert, on torchao's PT2E steps."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import fx

from inductor_x86q.errors import NothingToQuantizeError, QuantizationError
from inductor_x86q.graph.origin import layer
from inductor_x86q.graph.quantized_graph import QuantizedGraph, side_by_side
from inductor_x86q.quantization import corrections, qat, torchao
from inductor_x86q.quantization.arguments import batch_size, checked, positional
from inductor_x86q.quantization.attention import quantize_attention
from inductor_x86q.quantization.attention_drift import NOTES, keep_float
from inductor_x86q.quantization.calibration import calibrate, finite_values_only, first_calls, is_observer, state_kept
from inductor_x86q.quantization.convert import (
    convert_to_bfloat16,
    fold_weights,
    freeze_parameters,
    left_out,
    quantize_per_token,
)
from inductor_x86q.quantization.data import Calls
from inductor_x86q.quantization.export import export
from inductor_x86q.quantization.quantizer import X86Quantizer

log = logging.getLogger(__name__)


def quantize(
    model: torch.nn.Module,
    example_inputs: tuple[Any, ...],
    *,
    kwargs: Mapping[str, Any] | None = None,
    calibration: Iterable[Any] | None = None,
    dynamic: bool | str = False,
    exclude: Iterable[str | type] = (),
    reduce_range: bool | None = None,
    dynamic_shapes: Any = None,
    config: Any = None,
    transform: Callable[[Any], Any] | None = None,
    max_batches: int | None = None,
    accuracy: str | Iterable[str] | None = None,
    embeddings: str | None = None,
    attention: str | None = None,
) -> QuantizedGraph:
    """Quantizes a model to int8 with torchao's PT2E steps and X86Quantizer.

    The result runs eagerly as the reference of what `torch.compile(result, backend="inductor_x86q")` computes. It
    takes any batch size where the model does.

    Args:
        model: a float32 module in eval mode, on the CPU. It is not changed.
        example_inputs: the positional arguments of one call, a tuple.
        kwargs: the call's arguments by name, e.g. what a tokenizer returns; `example_inputs` is () then as a rule. The
            result takes all of them by name, and by position in the example's order.
        calibration: calls to take the activations' ranges from: an iterable of tuples of positional arguments, a bare
            tensor counting as one argument, or of dictionaries of arguments by name; a DataLoader as it is, since what
            the model does not take, labels, is left out. Batches may differ in size from the example's. Required unless
            `dynamic`.
        dynamic: quantize linears only, those of recurrent layers too, and compute scale and zero point of each of their
            inputs from its values at every call. Needs no calibration, and suits transformers; convolutions stay float. "per_token" gives each
            row (along the last dimension) a scale of its own, which is more exact where rows differ in size; True is
            "per_tensor".
        exclude: what stays float: module names, glob patterns of them, or module types.
        reduce_range: 7 bits for each layer's input, or for its weight where that costs no kernel; CPUs without VNNI
            need it. None decides by this machine.
        dynamic_shapes: as of `torch.export.export`; None makes the batch dynamic where the model allows it. Examples of
            size 1 are fine; a warning names each dimension that the model fixes.
        config: how layers are quantized: a choice for all, or a dictionary from what selects layers to their choice.
            Select by a module's name, a glob pattern of names, a module type, an operator
            (`torch.ops.aten.linear.default`), or "" for the whole model; of several that match, the one that comes
            first in this list wins, and of two of a kind that of the inner module. A choice is an observer of the
            activations ("minmax", "histogram", "percentile:99.99", "mse", one of torchao or a QuantizationSpec), a mode
            ("static", "per_tensor" and "per_token" as of `dynamic`, "bfloat16", "float"), "per_channel" or "per_tensor" with
            weights in mind as `LayerConfig(weight=…)`, or a LayerConfig with several of these.
        transform: makes a call of each thing that `calibration` yields.
        max_batches: read no more of `calibration`.
        accuracy: what to correct with the calibration data, one or several of "ranges" (those of least squared error),
            "equalize" (channels between convolutions), "smooth" (channels in front of linears, as SmoothQuant),
            "rounding" (of weights, for the least error of each layer's output, as GPTQ) and "bias" (takes out the mean
            error of each channel); "best" tries each and keeps what helps. For dynamic layers the data may be given too.
        embeddings: "int8" keeps the tables of embeddings and embedding bags in int8, a quarter of their size, each row
            with a scale of its own; rows are dequantized when they are looked up.
        attention: "int8" computes it on int8 query, key and value, with the softmax's exponentials rounded to a byte;
            "float" does not. None is "int8" where that leaves 20 dB of signal to noise on the calibration data, or on the
            example where there is none, and `explain` says what it found elsewhere. With ranges computed at every call
            each query and key has a scale of its own, and each head's values.

    Raises:
        QuantizationError: the model is in train mode or has nothing to quantize, it does not take the example, there is
            no calibration data, or it holds NaN or infinity where a layer is named.
    """
    _check_model(model)
    args, named = checked(example_inputs, kwargs, QuantizationError)
    if dynamic not in (False, True, "per_tensor", "per_token"):
        raise QuantizationError(f"dynamic is {dynamic!r}: expected False, True, 'per_tensor' or 'per_token'")
    switches = corrections.switches(accuracy)
    if dynamic and config is None and not switches and calibration is not None:
        raise QuantizationError(
            "calibration was given with dynamic=True, which computes the ranges at every call: leave one of them out"
        )
    if not dynamic and config is None and calibration is None:
        raise QuantizationError(_NO_DATA)
    exported, any_batch = export(model, args, named, dynamic_shapes)
    fixed_batch = None if any_batch else batch_size((args, named))

    def prepared_for(given: Any) -> fx.GraphModule:
        quantizer = X86Quantizer(
            reduce_range=reduce_range,
            exclude=exclude,
            dynamic=dynamic,
            config=given,
            embeddings=embeddings,
            attention=attention,
        )
        # Preparing takes the exported graph over, and there may be several attempts.
        prepared = prepare(copy.deepcopy(exported) if switches else exported, quantizer)
        if calibration is None and quantizer.static:
            raise QuantizationError(f"{_NO_DATA}; {layer(quantizer.static[0])!r} is to be static")
        return prepared

    # Without data, one call in which the weights' observers see the weights.
    calls: Any = [positional(exported, args, named)] if calibration is None else calibration
    if isinstance(calls, Iterable) and not isinstance(calls, Mapping):
        calls = Calls(calls, (*args, *named.values()), transform, max_batches)

    def run(prepared: fx.GraphModule) -> None:
        with torch.no_grad(), finite_values_only(prepared), state_kept(prepared):
            calibrate(prepared, calls, fixed_batch)

    if not switches:
        prepared, kept = prepared_for(config), switches
        run(prepared)
    else:
        calls = list(calls)
        some = first_calls(exported, calls, fixed_batch, corrections.ROWS, corrections.VALUES)
        prepared, kept = corrections.corrected(prepared_for, run, some, switches, config, best=accuracy == "best")
    notes = []
    if attention is None:
        first = calls[:1] if isinstance(calls, list) else calls.first
        with state_kept(prepared):
            notes = keep_float(prepared, first_calls(prepared, first, fixed_batch, 1, 1))
    quantized = convert(prepared)
    quantized.meta[corrections.MADE], quantized.meta[NOTES] = kept, notes
    return quantized


_NO_DATA = (
    "no calibration data: pass calibration=[...], calls with typical inputs, e.g. calibration=[example_inputs], or "
    "dynamic=True to compute the ranges at every call"
)


def prepare_qat(
    model: torch.nn.Module,
    example_inputs: tuple[Any, ...],
    *,
    kwargs: Mapping[str, Any] | None = None,
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
        kwargs: the call's arguments by name.
        exclude: what stays float: module names, glob patterns of them, or module types.
        reduce_range: as of `quantize`.
        dynamic_shapes: as of `torch.export.export`; None makes the batch dynamic where the model allows it.

    Raises:
        QuantizationError: the model is in eval mode or has nothing to quantize, or does not take the example.

    Example:
        >>> prepared = inductor_x86q.prepare_qat(model.train(), (x,))
        >>> loss = prepared(x).square().mean()  # of your own training loop
        >>> loss.backward()
        >>> q = inductor_x86q.convert(prepared)
    """
    _check_model(model, training=True)
    args, named = checked(example_inputs, kwargs, QuantizationError)
    # Exported graphs share the parameters and statistics of what they were exported from.
    exported, _ = export(copy.deepcopy(model), args, named, dynamic_shapes)
    quantizer = X86Quantizer(reduce_range=reduce_range, exclude=exclude, is_qat=True)
    prepared = prepare(exported, quantizer, torchao.prepare_for_training)
    qat.drop_counters(prepared.graph)
    trainable = qat.TrainingGraph(prepared, prepared.graph)
    trainable.meta.update(prepared.meta)  # by which torchao knows it again when converting
    return trainable.train()


def convert(prepared: fx.GraphModule) -> QuantizedGraph:
    """Turns a prepared and calibrated (or trained) graph into the q/dq graph that the backend compiles.

    Weights are stored in int8 under the names they had, their scales beside them; nothing requires grad. What
    `prepare_qat` returned is not changed, and can be trained further.

    Example:
        >>> from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e
        >>> exported = torch.export.export(model, (x,)).module()
        >>> prepared = prepare_pt2e(exported, inductor_x86q.X86Quantizer())
        >>> outputs = [prepared(x) for _ in range(3)]  # calibrates
        >>> q = inductor_x86q.convert(prepared)
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
    quantize_per_token(converted)
    quantize_attention(converted)
    fold_weights(converted)
    convert_to_bfloat16(converted)
    if left := left_out(converted):
        log.info("not quantized, stays float: %s", ", ".join(left))
    quantized = side_by_side(converted)  # without what the graph does not read: the float weights above all
    freeze_parameters(quantized)
    return quantized


def prepare(
    exported: fx.GraphModule, quantizer: X86Quantizer, step: Callable[..., fx.GraphModule] = torchao.prepare_pt2e
) -> fx.GraphModule:
    """The graph with an observer at each value that the quantizer annotates; `step` is torchao's."""
    qat.hide_batch_norms_of_groups(exported.graph)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        prepared = step(exported, quantizer)
    qat.show_batch_norms(prepared.graph)
    prepared.recompile()
    if not quantizer.rewritten and not any(is_observer(module) for module in prepared.modules()):
        excluded = ", ".join(layer(node) for node in quantizer.excluded)
        raise NothingToQuantizeError(
            "there is nothing to quantize: the model has no convolution or linear with a constant weight"
            + (f" that is not excluded ({excluded})" if excluded else "")
        )
    return prepared


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
