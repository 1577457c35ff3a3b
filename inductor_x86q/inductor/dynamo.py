"""Dynamo: the parameters that it lifts to inputs, its lock, and compiling without leaving a trace in its caches."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Set
from typing import Any

import torch
from torch import fx

from inductor_x86q.inductor.requirements import Interface, Needs

INTERFACE = Interface(
    "dynamo.py",
    "To make constants of the parameters that Dynamo lifts to inputs, have it compile again for other ones, and compile while no "
    "other thread does.",
    (
        Needs("torch._dynamo.convert_frame", "compile_lock"),
        Needs("torch._dynamo.guards", "GuardBuilder.ID_MATCH"),
        Needs("torch._dynamo.guards", "GuardBuilder.TENSOR_MATCH"),
        Needs("torch._guards", "TracingContext.try_get"),
        Needs("torch._guards", "GuardsSet.add", parameters=("guard", "collect_debug_stack")),
        Needs("torch._guards", "GuardsSet.clear"),
        Needs("torch._guards", "Guard.create_fn_name"),
        Needs("torch._guards", "Source.make_guard"),
        Needs("torch._guards", "GuardSource"),
    ),
    "Dynamo marking what it lifts from a module by `_dynamo_static_input_type`, and its placeholders by `_dynamo_source`; the "
    "example inputs of parameters being real tensors; AOTAutograd telling parameters by `_param_name_to_source`; guards being "
    "made into a check after the backend is done; `compile_lock` being held while Dynamo compiles, and reentrant; `TENSOR_MATCH` saying nothing that a tensor's identity does not say.",
)


@contextlib.contextmanager
def one_at_a_time() -> Iterator[None]:
    """Within this context no other thread compiles: the first call of what torch.compile gave waits.

    The patches would not need it, but torch does, which is not made for compiling in several threads
    (pytorch/pytorch#168042): Inductor replaces class attributes of its own for a moment, whether nodes keep the names of
    their layers is one flag for all, and while any thread exports, torch.compile gives back what it was given. Dynamo takes
    this lock; exporting, compiling ahead of time and calling a backend oneself do not.
    """
    from torch._dynamo.convert_frame import compile_lock

    with compile_lock:
        yield


def export(model: torch.nn.Module, arguments: tuple[Any, ...], keywords: Any = None,
           **others: Any) -> torch.export.ExportedProgram:  # fmt: skip
    """`torch.export.export`, while no other thread compiles."""
    with one_at_a_time():
        return torch.export.export(model, arguments, keywords, **others)


def is_lifted_parameter(value: Any) -> bool:
    """Whether Dynamo lifted this example input from a module: it marks such tensors with this attribute."""
    return isinstance(value, torch.Tensor) and getattr(value, "_dynamo_static_input_type", None) is not None


def bind_parameters(graph_module: fx.GraphModule, example_inputs: list[Any]) -> list[int]:
    """Turns the parameters that Dynamo lifted to inputs into attributes of `graph_module`, so that freezing sees them.

    Returns the positions of the inputs that remain. Relies on `is_lifted_parameter`, on the example inputs of
    parameters being real tensors, on AOTAutograd telling parameters by `_param_name_to_source`, and on the name of a
    source's `guard_source` saying whether it goes through a module: a tensor that some module holds keeps its mark
    where it is passed as an argument, and there it is no constant.
    """
    kept: list[int] = []
    sources: dict[str, Any] = {}
    placeholders = graph_module.graph.find_nodes(op="placeholder")
    for position, (node, value) in enumerate(zip(placeholders, example_inputs, strict=True)):
        source = getattr(node, "_dynamo_source", None)
        is_argument = source is not None and "NN_MODULE" not in source.guard_source.name
        if is_argument or not is_lifted_parameter(value):
            kept.append(position)
            continue
        if isinstance(value, torch.nn.Parameter):
            graph_module.register_parameter(node.name, value)
        else:
            graph_module.register_buffer(node.name, value)
        sources[node.name] = source
        with graph_module.graph.inserting_before(node):
            attribute = graph_module.graph.get_attr(node.name)
        attribute.meta.update(node.meta)
        node.replace_all_uses_with(attribute)
        graph_module.graph.erase_node(node)
    others = getattr(graph_module, "_param_name_to_source", None) or {}
    graph_module._param_name_to_source = {**others, **sources}  # type: ignore[assignment]
    graph_module.recompile()
    _guard_identity(set(sources.values()) - {None})
    return kept


def _guard_identity(sources: Set[Any]) -> None:
    """Has Dynamo compile again where another tensor stands in the place of one of these, whatever its contents are.

    Dynamo guards types, shapes and strides of what it lifts, and would run one model's code for another model of the
    same class; it also costs more at each call. With the global freezing flag Dynamo does the same as this. Relies on
    the tracing context's guards being made into a check after the backend is done, and on `TENSOR_MATCH` saying nothing
    of a tensor that its identity does not say.
    """
    from torch._dynamo.guards import GuardBuilder

    context = torch._guards.TracingContext.try_get()
    if context is None:  # called by other code than Dynamo
        return
    guards = context.guards_context.dynamo_guards
    others = [g for g in guards if g.originating_source not in sources or g.create_fn_name() != "TENSOR_MATCH"]
    guards.clear()
    for guard in (*others, *(source.make_guard(GuardBuilder.ID_MATCH) for source in sources)):
        guards.add(guard, collect_debug_stack=False)


def compile_fresh(model: torch.nn.Module, backend: Callable[..., Any]) -> Callable[..., Any]:
    """`torch.compile(model)` under code objects of its own, so that no entry is added to those of the model.

    A graph module is rebuilt, so that Dynamo still sees it at the root and keeps the origin of its nodes.
    """
    if isinstance(model, fx.GraphModule):
        fresh = fx.GraphModule(model, model.graph)
        fresh.meta.update(model.meta)
        return torch.compile(fresh, backend=backend)

    def call(*arguments: Any, **keywords: Any) -> Any:
        return model(*arguments, **keywords)

    call.__code__ = call.__code__.replace(co_name=f"call_{id(backend)}")
    return torch.compile(call, backend=backend)
