"""Nodes whose operands look as before keep their fake values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from inductor_x86q.inductor.patches.patch import Patch
from inductor_x86q.inductor.patches.scopes import COMPILE
from inductor_x86q.inductor.requirements import Needs

_MODULE = "torch.fx.passes.fake_tensor_prop"


def _run_node(stock: Callable[..., Any], interpreter: Any, n: fx.Node) -> Any:
    operands = _operands(interpreter, n)
    if operands is not None and n.meta.get("x86q_operands") == operands and _is_of(interpreter, n.meta.get("val")):
        return n.meta["val"]
    result = stock(interpreter, n)
    n.meta["x86q_operands"] = operands
    return result


def _operands(interpreter: Any, n: fx.Node) -> Any:
    """All that a node's fake value depends on; None where that may be more than shapes, strides and types."""
    if n.op == "get_attr":
        return _described(interpreter.fetch_attr(n.target))
    if not isinstance(n.target, torch._ops.OpOverload) or n.target._schema.is_mutable or not n.all_input_nodes:
        return None
    operands = {operand: _described(operand.meta.get("val")) for operand in n.all_input_nodes}
    return None if None in operands.values() else (n.target, fx.map_arg((n.args, n.kwargs), operands.get))


def _described(value: Any) -> Any:
    """What operators can read off a tensor without its contents, hashable; None for one of unknown sizes or none."""
    if not isinstance(value, torch.Tensor) or value.layout != torch.strided:
        return None
    if any(type(size) is not int for size in (*value.shape, *value.stride())):
        return None
    return str((value.dtype, value.device, tuple(value.shape), value.stride(), value.storage_offset()))


def _is_of(interpreter: Any, value: Any) -> bool:
    """Whether a fake value is of the mode that is asked for: fake tensors of two modes do not mix."""
    leaves = torch.utils._pytree.tree_leaves(value)
    return bool(leaves) and all(getattr(leaf, "fake_mode", None) is interpreter._mode for leaf in leaves)


PATCHES = (
    Patch(
        scope=COMPILE,
        module=_MODULE,
        attribute="FakeTensorProp.run_node",
        replacement=_run_node,
        why="Freezing computes the fake values of all nodes anew four times and lowering once more, which took a tenth of a compile.",
        since="2.13",
        until="Freezing computes those of changed nodes only, as post-grad passes do (`FakeTensorUpdater`); a TODO there says so. "
        "None filed.",
        instead="There is none.",
        relies_on="What a pass copies or replaces coming without meta, or with the meta of the node that it equals.",
        needs=(
            Needs(_MODULE, "FakeTensorProp.__init__", looks_up=("_mode",)),
            Needs("torch._inductor.compile_fx", "fake_tensor_prop", looks_up=("FakeTensorProp",)),
        ),
    ),
)
