"""How a value is observed and rounded: torchao's specifications for activations and weights, and where they are kept."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from inductor_x86q.quantization import torchao
from inductor_x86q.quantization.plan import Slot


# Training rounds by the very parameters that converting reads from the observers. FusedMovingAvgObsFakeQuantize does not:
# its kernel takes another scale for symmetric ranges than its observer.
def activation(bits: int, *, is_qat: bool) -> torchao.QuantizationSpec:
    if is_qat:
        observer = torchao.FakeQuantize.with_args(observer=torchao.MovingAverageMinMaxObserver, eps=2**-12)
    else:
        observer = torchao.HistogramObserver.with_args(eps=2**-12)
    return torchao.QuantizationSpec(torch.uint8, observer, 0, 2**bits - 1, torch.per_tensor_affine)


def dynamic_activation(bits: int) -> torchao.QuantizationSpec:
    observer = torchao.PlaceholderObserver.with_args(eps=2**-12)
    high = 2**bits - 1
    return torchao.QuantizationSpec(torch.uint8, observer, 0, high, torch.per_tensor_affine, is_dynamic=True)


def weight(bits: int, axis: int, *, is_qat: bool) -> torchao.QuantizationSpec:
    if is_qat:
        # No average over steps: the range that counts is that of the weight as it is.
        observer = torchao.FakeQuantize.with_args(
            observer=torchao.MovingAveragePerChannelMinMaxObserver, averaging_constant=1.0, eps=2**-12
        )
    else:
        observer = torchao.PerChannelMinMaxObserver.with_args(eps=2**-12)
    bound = 2 ** (bits - 1)
    return torchao.QuantizationSpec(torch.int8, observer, -bound, bound - 1, torch.per_channel_symmetric, ch_axis=axis)


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
