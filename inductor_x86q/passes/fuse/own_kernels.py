"""Operators of ours that are no calls and have one kernel each: the quantize of their output, and when its kernel is built."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from inductor_x86q.graph import operators, outputs, qdq
from inductor_x86q.graph.attention import TARGETS as ATTENTIONS
from inductor_x86q.graph.outputs import KERNEL
from inductor_x86q.graph.qdq import QParams
from inductor_x86q.graph.reasons import No
from inductor_x86q.graph.recurrence import PACKED_RECURRENCE
from inductor_x86q.inductor import objects
from inductor_x86q.passes.fuse import attention, recurrent
from inductor_x86q.passes.stage import Rule

# The kernel of each.
KERNELS: dict[Any, Callable[[fx.Node], Any]] = {
    **dict.fromkeys(ATTENTIONS, attention.kernel),
    PACKED_RECURRENCE: recurrent.kernel,
}


def _producer(result: fx.Node) -> fx.Node | No:
    """The operator whose output `result` is; of several results that is the first."""
    source: Any = result.args[0] if operators.is_item(result) and result.args[1] == 0 else result
    if source.target not in KERNELS:
        return No("it quantizes no output of a kernel of ours", (source,))
    items = [user for user in source.users if operators.is_item(user) and user.args[1] == 0]
    readers = [user for item in items for user in item.users] if items else [*result.users]
    return source if len(readers) == 1 else No(f"the output has {len(readers)} users", tuple(readers))


def _find_quantize(node: fx.Node) -> QParams | No:
    source = _producer(qdq.operand(node))
    if isinstance(source, No):
        return source
    grid, given = qdq.qparams(node), outputs.read(source)
    if not given.dtype.is_floating_point:
        return No("the output is already quantized", (source,))
    if grid.dtype not in qdq.INT8_TYPES or grid.quant_min > grid.quant_max:
        return No(f"no kernel gives {grid.dtype} from {grid.quant_min} to {grid.quant_max}")
    info = torch.iinfo(grid.dtype)
    if not (math.isfinite(grid.scale) and grid.scale > 0) or not info.min <= grid.zero_point <= info.max:
        return No(f"its scale is {grid.scale}, its zero point {grid.zero_point}")
    return grid


def _rewrite_quantize(node: fx.Node, grid: QParams) -> fx.Node:
    """quantize(operator(…, float32)) → operator(…, as it quantizes)"""
    result = qdq.operand(node)
    source = _producer(result)
    assert isinstance(source, fx.Node)
    outputs.write(source, grid)
    source.meta["x86q_absorbed"] = ["quantize"]
    result.meta["val"] = qdq.value(node)
    if source is not result:
        source.meta["val"] = (qdq.value(node), *source.meta["val"][1:])
    return result


def _find_kernel(node: fx.Node) -> Any:
    return No("its kernel is chosen") if KERNEL in node.meta else KERNELS[node.target](node)


def _rewrite_kernel(node: fx.Node, found: Any) -> None:
    """Chooses the kernel, which begins to be built while all else is lowered."""
    import inductor_x86q.inductor.lowering.attention  # they register with Inductor, which is slow to import
    import inductor_x86q.inductor.lowering.recurrent  # noqa: F401

    node.meta[KERNEL] = found
    objects.start([found])


POST_OP_RULES = (Rule("quantized output of ours", (qdq.QUANTIZE,), _find_quantize, _rewrite_quantize),)
FINISH_RULES = (Rule("kernel of ours", tuple(KERNELS), _find_kernel, _rewrite_kernel),)
