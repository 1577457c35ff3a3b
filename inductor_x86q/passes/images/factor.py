"""Factors of channels, part of the images stage: what an int8 image's channels are scaled by is computed once.

Such are the gates of squeeze-and-excitation. Inductor would compute a hard sigmoid and its quantize anew at each pixel.
"""

from __future__ import annotations

import torch
from torch import fx

from inductor_x86q.graph import qdq
from inductor_x86q.graph.library import MATERIALIZE
from inductor_x86q.graph.reasons import No
from inductor_x86q.passes.stage import Rule

aten = torch.ops.aten


def _find(node: fx.Node) -> fx.Node | No:
    for image, factor in qdq.operands(node):
        if not (isinstance(factor, fx.Node) and isinstance(image, fx.Node) and qdq.is_dequantize(image)):
            continue
        if qdq.value(factor).dim() != 4 or qdq.value(factor).shape[2:] != (1, 1) or qdq.value(image).dim() != 4:
            continue
        if qdq.value(image).shape[2:] == (1, 1):
            return No("it scales one pixel")
        if factor.target is MATERIALIZE or factor.op != "call_function" or qdq.is_constant(factor):
            return No("the factors are stored already", (factor,))
        return factor
    return No("it scales no channels of an int8 image")


def _rewrite(node: fx.Node, factor: fx.Node) -> None:
    from inductor_x86q.inductor.lowering import materialize  # noqa: F401  registers with Inductor, which is slow to import

    node.replace_input_with(factor, qdq.call(MATERIALIZE, factor, like=factor))


RULES = (Rule("factor of channels", (aten.mul.Tensor,), _find, _rewrite),)
