"""The guards of an exported graph on its inputs' sizes, said so that Dynamo takes them for sizes without an example too."""

from __future__ import annotations

import inspect
import sys
from typing import Any

import torch
from torch import fx

from inductor_x86q.inductor.requirements import Interface, Needs

INTERFACE = Interface(
    "guards.py",
    "An exported graph's guards on sizes become checks that Dynamo traces for sizes that are unbacked.",
    (
        Needs("torch.export._unlift", "_convert_guards_code_to_fn"),
        Needs("torch._dynamo.external_utils", "wrap_dunder_call_ctx_manager", parameters=("func",)),
        Needs("torch", "_check", parameters=("cond", "message")),
    ),
    "`ExportedProgram.module` putting the guards into a submodule `_guards_fn`, whose `forward` is a closure around "
    "the function `func`, which asserts each with `torch._assert`, in globals of its own.",
)


def traceable(graph_module: Any) -> fx.GraphModule:
    """Has the graph's guards checked by `torch._check` where Dynamo traces them.

    Dynamo breaks the graph where `torch._assert` is to decide on a size that has no example. Relies on what INTERFACE says.
    """
    guards: Any = getattr(graph_module, "_guards_fn", None)
    if guards is not None:
        written = inspect.getclosurevars(guards.forward).nonlocals["func"]
        written.__globals__["torch"] = sys.modules[__name__]  # which are its own
    return graph_module


def _assert(condition: Any, message: str) -> None:
    """What the guards call in place of `torch._assert`."""
    if torch.compiler.is_dynamo_compiling():
        torch._check(condition, lambda: message)
    else:
        torch._assert(condition, message)
