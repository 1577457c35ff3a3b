"""The steps of a recurrent layer get what our kernel needs, its constants in its order, and a float output."""

from __future__ import annotations

import dataclasses

import torch
from torch import fx

from inductor_x86q import cpu
from inductor_x86q.graph import outputs, qdq
from inductor_x86q.graph.reasons import No
from inductor_x86q.graph.recurrence import PACKED_RECURRENCE, RECURRENCE
from inductor_x86q.kernels.recurrence import Kernel, Recurrence
from inductor_x86q.passes.stage import Rule


@dataclasses.dataclass(frozen=True)
class _Layer:
    recurrence: Recurrence
    weight: torch.Tensor
    scale: torch.Tensor
    bias: torch.Tensor | None


def _find(node: fx.Node) -> _Layer | No:
    lanes = cpu.int8_lanes()
    if not lanes:
        return No("this CPU has no AVX2")
    arguments = qdq.schema_arguments(node)
    weight, scale, bias = (qdq.constant(arguments[name]) for name in ("weight", "scale", "bias"))
    if weight is None or scale is None or (bias is None and arguments["bias"] is not None):
        return No("its weight is not known when compiling")
    directions, _, hidden = weight.shape
    adds_in_16 = not cpu.has_vnni() and _fits_16(weight)
    recurrence = Recurrence(arguments["cell"], hidden, directions, lanes, adds_in_16)
    return _Layer(recurrence, weight, scale, bias)


def _fits_16(weight: torch.Tensor) -> bool:
    """Whether no sum of two products with bytes of the state, which are at most 255, exceeds 16 bits."""
    return int(weight.short().abs().amax()) * 2 * 255 <= 32767  # of a tensor of 16 bits it would wrap around itself


def kernel(node: fx.Node) -> Kernel:
    """Which computes the steps on this CPU."""
    return Recurrence.read(str(node.args[1])).kernel(outputs.read(node).dtype)


def _rewrite(node: fx.Node, layer: _Layer) -> fx.Node:
    """recurrence(…) → recurrence_packed(what the kernel reads, what that is, …, float32)"""
    given = layer.recurrence
    constants = qdq.new_constant(given.constants(layer.weight, layer.scale, layer.bias), like=node)
    arguments = (constants, given.text(), *node.args, *outputs.FLOAT32.arguments())
    new = node.graph.call_function(PACKED_RECURRENCE, arguments)
    new.meta.update(node.meta)
    return new


COMPUTE_RULES = (Rule("steps of a recurrent layer", (RECURRENCE,), _find, _rewrite),)
