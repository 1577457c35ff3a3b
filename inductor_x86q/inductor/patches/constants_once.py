"""Constants of the same contents are one constant, who reads each is known, and those of branches are the outer graph's too."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx

from inductor_x86q.inductor.patches.patch import Patch
from inductor_x86q.inductor.patches.scopes import COMPILE
from inductor_x86q.inductor.requirements import Needs


def readers(graph: Any, constant: str) -> set[fx.Node]:
    """Who reads a constant of a graph that is being lowered, as far as is known by then."""
    known: dict[str, set[fx.Node]] = graph.__dict__.setdefault("_x86q_readers", {})
    return known.setdefault(constant, set())


def _allocate(stock: Callable[..., str], graph: Any, name: str | None, data: torch.Tensor) -> str:
    found = _once(stock, graph, name, data)
    node = graph.current_node
    readers(graph, found).update(node.users if node.op == "get_attr" else [node])
    for outer in outer_graphs(graph):
        outer.constants[found] = graph.constants[found]
        outer.allocated_constant_name[found] = graph.allocated_constant_name[found]
    return found


def outer_graphs(graph: Any) -> Iterator[Any]:
    """The graphs around one that is being lowered, from the inside out: of a branch of `cond`, say."""
    while (graph := getattr(graph, "parent", None)) is not None:
        yield graph


def _once(stock: Callable[..., str], graph: Any, name: str | None, data: torch.Tensor) -> str:
    if data.is_mkldnn or data.layout != torch.strided or data.numel() > 65536 or name in graph.mutated_named_buffers:
        return stock(graph, name, data)
    names: dict[Any, str] = graph.__dict__.setdefault("_x86q_names", {})
    contents = data.reshape(-1).clone(memory_format=torch.contiguous_format).view(torch.uint8).numpy().tobytes()
    key = (data.dtype, data.shape, data.stride(), contents)
    if names.get(key) not in graph.constants:  # as one that was taken out again
        names[key] = stock(graph, name, data)
    return names[key]


PATCHES = (
    Patch(
        scope=COMPILE,
        module="torch._inductor.graph",
        attribute="GraphLowering.allocate_non_dup_const_name",
        replacement=_allocate,
        why="Lowering makes a tensor of each call's scale and of each zero point, and most zero points are equal. Each constant "
        "costs at every call and when compiling, since all are passed to the generated function. The constants of a branch of "
        "`cond` never reach that function before torch 2.14, nor the cache of graphs before 2.15.",
        since="2.13",
        until="Inductor tells constants by their contents: it compares with the storage's address alone where a constant is not "
        "of the graph module. None filed. For branches: 2.15 is the oldest supported torch.",
        instead="There is none: the passes see the numbers, lowering makes the tensors.",
        relies_on="Every constant going through this method, which returns its name, `current_node` being what is lowered "
        "then, and a branch's graph having the outer one as its `parent`.",
        needs=(
            Needs("torch._inductor.graph", "GraphLowering.allocate_non_dup_const_name", parameters=("name", "data")),
            Needs(
                "torch._inductor.graph",
                "GraphLowering.add_tensor_constant",
                looks_up=("allocate_non_dup_const_name",),
            ),
            Needs("torch._inductor.graph", "GraphLowering.__init__", looks_up=("constants", "mutated_named_buffers")),
            Needs("torch._inductor.graph", "GraphLowering.run_node", looks_up=("set_current_node",)),
        ),
    ),
)
