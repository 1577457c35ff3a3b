"""Graphs inside of a graph: branches of `cond`, bodies of loops, nested regions.

Freezing looks at the outer graph only. A branch gets its weights as operands, so to the passes they are no constants. Here
operands that are constants of the outer graph become constants of the branch, which can then be fused as any graph.
"""

from __future__ import annotations

import dataclasses
import operator
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx
from torch._ops import HigherOrderOperator

from inductor_x86q.inductor.fake_tensors import disable_modes
from inductor_x86q.inductor.requirements import Interface, Needs

INTERFACE = Interface(
    "regions.py",
    "Branches of `cond` and bodies of `while_loop` get constants of the outer graph as their own, nested regions are inlined.",
    (
        Needs("torch._higher_order_ops", "cond"),
        Needs("torch._higher_order_ops", "while_loop"),
        Needs("torch._higher_order_ops", "invoke_subgraph"),
        Needs("torch._inductor.constant_folding", "constant_fold", parameters=("gm",)),
    ),
    "`cond` taking the condition, two graphs and a tuple of operands; `while_loop` a condition's graph, a body's, a tuple "
    "of what is carried and one of what is not; `invoke_subgraph` a graph, its name and operands; the placeholders of such "
    "graphs being the operands in their order; lowering looking up a graph's constants in its own module.",
)


@dataclasses.dataclass(frozen=True)
class _Form:
    """Where a call has its graphs, and the operands that are the same at each run: `given` is behind those of `carried`."""

    graphs: tuple[int, ...]
    given: int
    carried: int | None = None


_FORMS = {
    torch.ops.higher_order.cond: _Form((1, 2), 3),
    torch.ops.higher_order.while_loop: _Form((0, 1), 3, carried=2),
}


@dataclasses.dataclass(frozen=True)
class Region:
    """A graph that `call`, a node of another graph, runs."""

    call: fx.Node
    name: str
    module: fx.GraphModule


def regions(graph: fx.Graph) -> Iterator[Region]:
    """The graphs that the nodes of this one run, without those inside of them."""
    for node in graph.nodes:
        if node.op == "call_function" and isinstance(node.target, HigherOrderOperator):
            for reader in node.all_input_nodes:
                is_stored = reader.op == "get_attr"
                module = operator.attrgetter(str(reader.target))(graph.owning_module) if is_stored else None
                if isinstance(module, fx.GraphModule):
                    yield Region(node, str(reader.target), module)


def with_constants(graph: fx.Graph) -> list[Region]:
    """Has branches and bodies take the constants among their operands as their own; returns those that can be fused.

    A graph that several calls run stays as it is: their operands may differ.
    """
    runs = Counter(id(region.module) for region in regions(graph))
    found = []
    for node in list(graph.nodes):
        form = _FORMS.get(node.target) if node.op == "call_function" else None
        if form is None:
            continue
        inside = [region for region in regions(graph) if region.call is node]
        if len(inside) == len(form.graphs) and all(runs[id(region.module)] == 1 for region in inside):
            _take_constants(node, form, [region.module for region in inside])
            found += inside
    return found


def _take_constants(call: fx.Node, form: _Form, modules: list[fx.GraphModule]) -> None:
    operands: Any = call.args[form.given]
    first = 0 if form.carried is None else len(call.args[form.carried])  # type: ignore[arg-type]
    constants = {position: _tensor(node) for position, node in enumerate(operands)}
    for module in modules:
        placeholders = module.graph.find_nodes(op="placeholder")
        for position, tensor in constants.items():
            if tensor is not None:
                _become_constant(module, placeholders[first + position], tensor)
        with disable_modes():
            _fold(module)
    kept = tuple(node for position, node in enumerate(operands) if constants[position] is None)
    call.update_arg(form.given, type(operands)(kept))
    call.graph.eliminate_dead_code()


def _tensor(node: Any) -> torch.Tensor | None:
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        return None
    found = operator.attrgetter(str(node.target))(node.graph.owning_module)  # ahead of time the path has dots
    return found if isinstance(found, torch.Tensor) else None


def _become_constant(module: fx.GraphModule, placeholder: fx.Node, tensor: torch.Tensor) -> None:
    with module.graph.inserting_before(placeholder):
        name = f"_x86q_operand_{placeholder.name}"
        module.register_buffer(name, tensor)
        constant = module.graph.get_attr(name)
    constant.meta.update(placeholder.meta)
    placeholder.replace_all_uses_with(constant)
    module.graph.erase_node(placeholder)


def _fold(module: fx.GraphModule) -> None:
    from torch._inductor.constant_folding import constant_fold

    constant_fold(module)


def finish(region: Region) -> None:
    """Folds what the passes left to fold, and has the outer module hold the region's constants under the same names.

    Inductor's graph cache takes frozen constants from the outermost module, by the name that they have in theirs.
    """
    with disable_modes():
        _fold(region.module)
    outer = region.call.graph.owning_module
    assert outer is not None
    for node in region.module.graph.find_nodes(op="get_attr"):
        tensor = _tensor(node)
        if tensor is None:
            continue
        name = _free(outer, f"{region.name}_{str(node.target).replace('.', '_')}")
        outer.register_buffer(name, tensor)
        region.module.register_buffer(name, tensor)
        node.target = name
    region.module.recompile()


def inline_nested(module: fx.GraphModule) -> None:
    """Puts the graphs of nested regions, which exist to be compiled once, where they are called.

    Each call then has neighbours to fuse with, and weights that are constants.
    """
    target = torch.ops.higher_order.invoke_subgraph
    while calls := module.graph.find_nodes(op="call_function", target=target):
        for call in calls:
            _inline(module, call)
    module.recompile()


def _inline(module: fx.GraphModule, call: fx.Node) -> None:
    reader, _, *operands = call.args
    inner = getattr(module, str(reader.target))  # type: ignore[union-attr]
    values = dict(zip(inner.graph.find_nodes(op="placeholder"), operands, strict=True))
    with module.graph.inserting_before(call):
        for node in inner.graph.nodes:
            if node.op == "get_attr":
                name = _free(module, f"{reader.target}_{str(node.target).replace('.', '_')}")  # type: ignore[union-attr]
                setattr(module, name, operator.attrgetter(str(node.target))(inner))
                values[node] = module.graph.get_attr(name)
            elif node.op not in ("placeholder", "output"):
                values[node] = module.graph.node_copy(node, values.__getitem__)
    results = fx.map_arg(inner.graph.output_node().args[0], values.__getitem__)
    for user in list(call.users):
        assert user.target is operator.getitem, f"{user} reads all results of {call} at once"
        user.replace_all_uses_with(results[user.args[1]])
        module.graph.erase_node(user)
    module.graph.erase_node(call)


def _free(module: fx.GraphModule, name: str) -> str:
    number = 0
    while hasattr(module, f"{name}_{number}"):
        number += 1
    return f"{name}_{number}"
