"""How a value is observed and rounded: torchao's specifications for activations and weights, and where they are kept."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import torch
from torch import fx

from inductor_x86q.errors import QuantizationError
from inductor_x86q.quantization import torchao
from inductor_x86q.quantization.observers import MeanSquaredErrorObserver, PercentileObserver
from inductor_x86q.quantization.plan import Slot

_SMALLEST_SCALE = 2**-12  # below it, the kernels' products of scales lose bits
ACTIVATION_OBSERVERS = {
    "minmax": torchao.MinMaxObserver, "histogram": torchao.HistogramObserver, "mse": MeanSquaredErrorObserver,
}  # fmt: skip
GRANULARITY = "x86q_granularity"  # in a dynamic layer's `meta`: "per_tensor" or "per_token"
IN_BFLOAT16 = "x86q_in_bfloat16"  # in the `meta` of a layer that stays float: whether it computes in bfloat16
WEIGHT_OBSERVERS = ("per_channel", "per_tensor")
_PERCENTILE = re.compile(r"percentile:(\d+(?:\.\d+)?)")


# Training rounds by the very parameters that converting reads from the observers. FusedMovingAvgObsFakeQuantize does not:
# its kernel takes another scale for symmetric ranges than its observer.
def activation(bits: int, *, is_qat: bool, chosen: Any = None) -> torchao.QuantizationSpec:
    """Of a static value; `chosen` is what the user gave: None, a shorthand, an observer or a specification."""
    high = 2**bits - 1
    if isinstance(chosen, torchao.QuantizationSpec):
        low = chosen.quant_min if chosen.quant_min is not None else 0
        top = chosen.quant_max if chosen.quant_max is not None else 255
        if high < 255:  # what the CPU needs holds for every specification
            low, top = 0, min(top, high)
        return dataclasses.replace(chosen, quant_min=low, quant_max=top)
    if is_qat:
        observer = torchao.FakeQuantize.with_args(observer=torchao.MovingAverageMinMaxObserver, eps=_SMALLEST_SCALE)
    elif isinstance(chosen, str):
        observer = _activation_observer(chosen)
    else:
        observer = chosen or torchao.HistogramObserver.with_args(eps=_SMALLEST_SCALE)
    return torchao.QuantizationSpec(torch.uint8, observer, 0, high, torch.per_tensor_affine)


def dynamic_activation(bits: int, chosen: torchao.QuantizationSpec | None = None) -> torchao.QuantizationSpec:
    observer = torchao.PlaceholderObserver.with_args(eps=_SMALLEST_SCALE)
    high = 2**bits - 1
    if chosen is not None:
        high = min(high, high if chosen.quant_max is None else chosen.quant_max)
    return torchao.QuantizationSpec(torch.uint8, observer, 0, high, torch.per_tensor_affine, is_dynamic=True)


def weight(bits: int, axis: int, *, is_qat: bool, chosen: Any = None) -> torchao.QuantizationSpec:
    bound = 2 ** (bits - 1)
    if isinstance(chosen, torchao.QuantizationSpec):
        low = max(-bound, -bound if chosen.quant_min is None else chosen.quant_min)
        top = min(bound - 1, bound - 1 if chosen.quant_max is None else chosen.quant_max)
        per_channel = chosen.qscheme == torch.per_channel_symmetric
        return dataclasses.replace(chosen, quant_min=low, quant_max=top, ch_axis=axis if per_channel else None)
    if is_qat:
        # No average over steps: the range that counts is that of the weight as it is.
        observer = torchao.FakeQuantize.with_args(
            observer=torchao.MovingAveragePerChannelMinMaxObserver, averaging_constant=1.0, eps=_SMALLEST_SCALE
        )
    elif chosen in (None, "per_channel"):
        observer = torchao.PerChannelMinMaxObserver.with_args(eps=_SMALLEST_SCALE)
    else:
        observer = torchao.MinMaxObserver.with_args(eps=_SMALLEST_SCALE) if chosen == "per_tensor" else chosen
        if "PerChannel" not in _class_of(observer).__name__:
            return torchao.QuantizationSpec(torch.int8, observer, -bound, bound - 1, torch.per_tensor_symmetric)
    return torchao.QuantizationSpec(torch.int8, observer, -bound, bound - 1, torch.per_channel_symmetric, ch_axis=axis)


# --- what the user gives ----------------------------------------------------------------------------------------------


def is_dynamic(chosen: Any) -> bool:
    return isinstance(chosen, torchao.QuantizationSpec) and bool(chosen.is_dynamic)


def check_activation(chosen: Any, where: str) -> None:
    """Raises QuantizationError for what is no way to observe an activation, or one that no kernel takes."""
    if isinstance(chosen, torchao.QuantizationSpec):
        top = 255 if chosen.quant_max is None else chosen.quant_max
        # The kernels of convolutions take uint8 only.
        if chosen.dtype != torch.uint8 or not 0 <= (chosen.quant_min or 0) < top <= 255:
            raise _refused(chosen, where, "activations are torch.uint8, quant_min and quant_max within 0 and 255")
        if chosen.qscheme not in (torch.per_tensor_affine, torch.per_tensor_symmetric, None):
            raise _refused(chosen, where, "activations are per tensor: torch.per_tensor_affine or per_tensor_symmetric")
    elif isinstance(chosen, str):
        match = _PERCENTILE.fullmatch(chosen)
        if chosen not in ACTIVATION_OBSERVERS and not (match and 50 < float(match[1]) <= 100):
            names = ", ".join(map(repr, (*ACTIVATION_OBSERVERS, "percentile:99.99")))
            raise _refused(chosen, where, f"for activations there are {names} (a percentile between 50 and 100)")
    elif _class_of(chosen) is None or "PerChannel" in _class_of(chosen).__name__:
        raise _refused(chosen, where, "activations take a per-tensor observer of torchao, a QuantizationSpec or a name")


def check_weight(chosen: Any, where: str) -> None:
    """Raises QuantizationError for what is no way to observe a weight, or one that no kernel takes."""
    if isinstance(chosen, torchao.QuantizationSpec):
        low = -128 if chosen.quant_min is None else chosen.quant_min
        top = 127 if chosen.quant_max is None else chosen.quant_max
        if chosen.dtype != torch.int8 or chosen.is_dynamic or not -128 <= low < top <= 127:
            raise _refused(chosen, where, "weights are torch.int8 and static, within -128 and 127")
        if chosen.qscheme not in (torch.per_channel_symmetric, torch.per_tensor_symmetric):
            raise _refused(chosen, where, "weights are symmetric: torch.per_channel_symmetric or per_tensor_symmetric")
    elif isinstance(chosen, str):
        if chosen not in WEIGHT_OBSERVERS:
            raise _refused(chosen, where, f"for weights there are {', '.join(map(repr, WEIGHT_OBSERVERS))}")
    elif _class_of(chosen) is None:
        raise _refused(chosen, where, "weights take an observer of torchao, a QuantizationSpec or a name")


def _refused(chosen: Any, where: str, possible: str) -> QuantizationError:
    return QuantizationError(f"{where}: {chosen!r}: {possible}")


def _class_of(observer: Any) -> Any:
    """The class that an observer's constructor makes, None where it is no observer's.

    Relies on torchao's `with_args` returning nested partial functions, in `p`.
    """
    while not isinstance(observer, type):
        inner = getattr(observer, "p", None) or getattr(observer, "func", None)
        if inner is None:
            return None
        observer = inner
    return observer if issubclass(observer, (torchao.ObserverBase, torchao.FakeQuantize)) else None


def _activation_observer(name: str) -> Any:
    match = _PERCENTILE.fullmatch(name)
    if match:
        return PercentileObserver.with_args(percentile=float(match[1]), eps=_SMALLEST_SCALE)
    return ACTIVATION_OBSERVERS[name].with_args(eps=_SMALLEST_SCALE)


# --- where torchao reads it -------------------------------------------------------------------------------------------


def annotation(node: fx.Node) -> Any:
    """What torchao reads of the node, made where there is none."""
    found = node.meta.get(torchao.ANNOTATION_KEY)
    if found is None:
        found = node.meta[torchao.ANNOTATION_KEY] = torchao.QuantizationAnnotation(_annotated=True)
    return found


def put(slot: Slot, spec: Any) -> None:
    """Annotates the value or the edge."""
    if isinstance(slot, fx.Node):
        annotation(slot).output_qspec = spec
    else:
        value, user = slot
        annotation(user).input_qspec_map[value] = spec
