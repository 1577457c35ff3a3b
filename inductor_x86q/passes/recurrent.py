"""The steps of a recurrent layer get what our kernel needs: its constants in its order, and what it has to compute."""

from __future__ import annotations

import dataclasses

import torch
from torch import fx

from inductor_x86q import cpu
from inductor_x86q.graph import qdq
from inductor_x86q.graph.reasons import No
from inductor_x86q.graph.recurrence import PACKED_RECURRENCE, RECURRENCE
from inductor_x86q.inductor import objects
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
    # The state's bytes are at most 255.
    fits_16 = bool(weight.short().abs().amax() * 2 * 255 <= 32767)
    recurrence = Recurrence(arguments["cell"], hidden, directions, lanes, fits_16 and not cpu.has_vnni())
    return _Layer(recurrence, weight, scale, bias)


def kernel(node: fx.Node) -> Kernel:
    """The kernel that computes the steps, of an operator that brings what it needs."""
    return Recurrence.read(str(node.args[1])).kernel()


def _rewrite(node: fx.Node, layer: _Layer) -> fx.Node:
    """recurrence(…) → recurrence_packed(what the kernel reads, what that is, …)"""
    from inductor_x86q.inductor.lowering import recurrent  # noqa: F401  registers with Inductor, which is slow to import

    given = layer.recurrence
    objects.start([given.kernel()])
    constants = qdq.new_constant(given.constants(layer.weight, layer.scale, layer.bias), like=node)
    new = node.graph.call_function(PACKED_RECURRENCE, (constants, given.text(), *node.args))
    new.meta.update(node.meta)
    return new


RULES = (Rule("steps of a recurrent layer", (RECURRENCE,), _find, _rewrite),)
