"""Constant folding leaves weights quantized, and computes what is made of constructors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from inductor_x86q.inductor.patches.patch import Patch
from inductor_x86q.inductor.patches.scopes import COMPILE
from inductor_x86q.inductor.requirements import Needs

# What is made with the help of constructors is stored where it has up to so many elements, and computed at each call above.
LARGEST_CONSTRUCTED = 2**20

_MODULE = "torch._inductor.constant_folding"


def _is_foldings(folder: Any) -> bool:
    """Whether this is what freezing folds with: subclasses, which look for constants to other ends, are torch's alone."""
    from torch._inductor.constant_folding import ConstantFolder

    return type(folder) is ConstantFolder


def _init(
    stock: Callable[..., None], folder: Any, gm: fx.GraphModule, skip_constructors: bool = False, **others: Any
) -> None:
    stock(folder, gm, skip_constructors and (bool(others) or not _is_foldings(folder)), **others)


def _deduce_value(stock: Callable[..., Any], folder: Any, node: fx.Node) -> Any:
    if _is_foldings(folder) and folder.is_impure(node):
        return folder.unknown_value
    return stock(folder, node)


def _add_node_replacement(stock: Callable[..., None], folder: Any, node: fx.Node, tensor: torch.Tensor) -> None:
    inputs, constructed = node.all_input_nodes, folder.__dict__.setdefault("_x86q_constructed", set())
    if _is_foldings(folder) and (not inputs or not constructed.isdisjoint(inputs)):
        constructed.add(node)
        if not inputs or tensor.numel() > LARGEST_CONSTRUCTED:
            return  # a constructor alone costs generated code nothing
    stock(folder, node, tensor)


def _patch(attribute: str, replacement: Callable[..., Any], why: str, needs: tuple[Needs, ...]) -> Patch:
    return Patch(
        scope=COMPILE,
        module=_MODULE,
        attribute=f"ConstantFolder.{attribute}",
        replacement=replacement,
        why=why,
        since="2.13",
        until="Constant folding itself asks `is_impure` before it computes, and has a limit instead of `skip_constructors`. "
        "None filed.",
        instead="`constant_fold` takes a `constraint_fn`, which is asked when all is computed, and freezing passes none.",
        relies_on="`constant_fold` making a `ConstantFolder` with `skip_constructors` and nothing else; `run_node` computing "
        "by `_deduce_value` first and asking `is_impure` afterwards; an impure node's result being `unknown_value` whatever "
        "was computed; `add_node_replacement` deciding what is stored.",
        needs=needs,
    )


_RUN_NODE = Needs(_MODULE, "ConstantFolder.run_node", looks_up=("_deduce_value", "is_impure", "add_node_replacement"))

PATCHES = (
    _patch(
        "__init__",
        _init,
        "Masks that a model writes element by element at each call (windows of shifted attention) are left to generated "
        "code: half of such a network's compile time.",
        (
            Needs(_MODULE, "ConstantFolder", parameters=("gm", "skip_constructors")),
            Needs(_MODULE, "constant_fold", looks_up=("ConstantFolder",)),
        ),
    ),
    _patch(
        "_deduce_value",
        _deduce_value,
        "The float form of each weight is computed and thrown away.",
        (_RUN_NODE, Needs(_MODULE, "ConstantFolder.is_impure", parameters=("node",))),
    ),
    _patch(
        "add_node_replacement",
        _add_node_replacement,
        "What is made of constructors is stored only where it is not too large.",
        (_RUN_NODE, Needs(_MODULE, "ConstantFolder.add_node_replacement", parameters=("node", "tensor"))),
    ),
)
