"""Two kinds of operators get operands that lie as they take them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from inductor_x86q.inductor.patches.patch import Patch
from inductor_x86q.inductor.patches.scopes import COMPILE
from inductor_x86q.inductor.requirements import Needs


def _channels_last(node: fx.Node, x: Any, *arguments: Any, **keywords: Any) -> tuple[Any, Any]:
    from torch._inductor import ir

    return (ir.ExternKernel.require_channels_last(x), *arguments), keywords


def _contiguous_addend(node: fx.Node, *arguments: Any, **keywords: Any) -> tuple[Any, Any]:
    from torch._inductor import ir

    return (*arguments[:6], ir.ExternKernel.require_contiguous(arguments[6]), *arguments[7:]), keywords


@functools.cache
def _constraints() -> dict[Any, Callable[..., tuple[Any, Any]]]:
    linear = torch.ops.onednn.qlinear_pointwise
    return {
        torch.ops.quantized.max_pool2d.default: _channels_last,
        linear.binary: _contiguous_addend,
        linear.binary_tensor: _contiguous_addend,
    }


def _layout_constraints(stock: Callable[..., Any], target: Any) -> Any:
    return _constraints().get(target) or stock(target)


PATCHES = (
    Patch(
        scope=COMPILE,
        module="torch._inductor.graph",
        attribute="maybe_layout_constraints",
        replacement=_layout_constraints,
        why="The library's int8 max pool gets images with channels innermost: its fake kernel says that its result lies so, "
        "which holds where its input does, and generated code asserts it. What a linear adds is made a buffer: lowering "
        "leaves it an expression where nothing else reads it, such as a conversion, and then refuses it.",
        since="2.13",
        until="Inductor's lowerings of both operators ask for it themselves. None filed.",
        instead="`add_layout_constraint` registers for every compile of the process.",
        relies_on="Lowering asking this function for the constraint of each operator that it lowers.",
        needs=(
            Needs("torch._inductor.graph", "GraphLowering.call_function", looks_up=("maybe_layout_constraints",)),
            Needs("torch._inductor.ir", "ExternKernel.require_channels_last"),
            Needs("torch._inductor.ir", "ExternKernel.require_contiguous"),
        ),
    ),
)
