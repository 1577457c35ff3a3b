"""The model's graph: exported so that it takes any batch size where the model does, or as the caller asks."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from inductor_x86q.errors import QuantizationError
from inductor_x86q.graph import aliasing, operators, qdq
from inductor_x86q.inductor import dynamo, guards
from inductor_x86q.quantization.arguments import batch_size, bind, each_tensor

log = logging.getLogger(__name__)


def export(
    model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic_shapes: Any
) -> tuple[fx.GraphModule, bool]:
    """The model's graph, and whether it takes any batch size.

    Raises:
        QuantizationError: the model does not take these arguments.
    """
    try:
        bound = bind(model.forward, args, kwargs)
    except TypeError as error:
        raise QuantizationError(f"the example does not fit the model: {error}") from None
    # Training goes through the graph: grad mode is part of what is exported.
    with torch.set_grad_enabled(model.training), warnings.catch_warnings():
        # Recurrent modules list their weights anew when they are traced, which changes nothing.
        warnings.filterwarnings("ignore", message="The tensor attributes .*_flat_weights")
        if dynamic_shapes is not None:
            return _export_as_asked(model, args, kwargs, bound, dynamic_shapes), True
        for (inputs, named), shapes in _any_batch(args, kwargs, bound):
            try:
                exported = _exported(model, inputs, named, dynamic_shapes=shapes)
            except Exception as error:  # whatever it is, the export with fixed shapes says it better
                log.debug("no export with a dynamic batch: %s", error)
                continue
            values = {node.name: node.meta.get("val") for node in exported.graph.find_nodes(op="placeholder")}
            first = next(x for name in exported.graph_signature.user_inputs
                         if isinstance(x := values.get(name), torch.Tensor))  # fmt: skip
            dynamic = not isinstance(first.shape[0], int) and _takes_other_batches(exported, args, kwargs)
            if dynamic or batch_size((inputs, named)) == batch_size((args, kwargs)):
                return guards.traceable(exported.module()), dynamic
        return guards.traceable(_exported(model, args, kwargs).module()), False


def _exported(
    model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic_shapes: Any = None
) -> torch.export.ExportedProgram:
    """The exported program, without writes into what is read elsewhere: a value is quantized where it is computed.

    Of `x[:, 0] = 0` a graph otherwise says nothing where `x` is read next. Training keeps its operators as they are.
    """
    exported = dynamo.export(model, args, kwargs, dynamic_shapes=dynamic_shapes)
    return exported.run_decompositions({}) if not model.training and _writes_elsewhere(exported.graph) else exported


def _writes_elsewhere(graph: fx.Graph) -> bool:
    """Whether an operator writes into what others read too, through views or not, or into a buffer.

    Of a program that writes into its inputs torch makes no module again.
    """
    into = [x for node in graph.nodes for x in aliasing.written(node)]
    owners = {_owner(x).op for x in into}
    return "placeholder" not in owners and ("get_attr" in owners or any(len(aliasing.readers(x)) > 1 for x in into))


def _owner(node: fx.Node) -> fx.Node:
    """The node whose memory a value surely or perhaps is in: a clone has its own, whatever passes may make of it later."""
    while operators.shares_memory(node) and node.target is not torch.ops.aten.clone.default:
        node = qdq.operand(node)
    return node


def _export_as_asked(
    model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], bound: dict[str, Any], dynamic_shapes: Any
) -> fx.GraphModule:
    """The graph with the dimensions open that `dynamic_shapes` names; warns of those that the model fixes."""
    asked = _open_dimensions(bound, dynamic_shapes)
    inputs, named = list(args), dict(kwargs)
    for name, dimension in asked:  # export takes a size of 1 to be fixed
        place: Any = named if name in named else inputs
        key: Any = name if name in named else list(bound).index(name)
        if place[key].shape[dimension] == 1:
            place[key] = torch.cat([place[key], place[key]], dimension)
    try:
        exported = _exported(model, tuple(inputs), named, dynamic_shapes)
    except Exception as error:  # the example as it was given says better what is wrong
        log.debug("no export with sizes of 1 doubled: %s", error)
        exported = _exported(model, args, kwargs, dynamic_shapes)
    values = {node.name: node.meta.get("val") for node in exported.graph.find_nodes(op="placeholder")}
    names = exported.graph_signature.user_inputs
    order = list(bound)[: len(args)] + list(kwargs)
    for name, dimension in asked if len(names) == len(order) else ():
        size = values[names[order.index(name)]].shape[dimension]
        if isinstance(size, int):
            warnings.warn(
                f"dimension {dimension} of input {names[order.index(name)]!r} was asked to be dynamic, and the model "
                f"fixes it to {size}: the graph takes no other size",
                stacklevel=4,
            )
    return guards.traceable(exported.module())


def _open_dimensions(bound: dict[str, Any], dynamic_shapes: Any) -> list[tuple[str, int]]:
    """The dimensions that `dynamic_shapes` leaves open, as names of tensors among the arguments and dimensions of each."""
    if isinstance(dynamic_shapes, Mapping):
        shapes = [dynamic_shapes.get(name) for name in bound]
    else:
        shapes = list(dynamic_shapes) if isinstance(dynamic_shapes, (tuple, list)) else []
    found = []
    for (name, x), shape in zip(bound.items(), shapes, strict=False):
        if isinstance(x, torch.Tensor) and shape is not None:
            sizes = shape.items() if isinstance(shape, Mapping) else enumerate(shape)
            fixed = (None, torch.export.Dim.STATIC)
            found += [(name, d) for d, size in sizes if size not in fixed and not isinstance(size, int)]
    return found


def _takes_other_batches(exported: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a program with an open batch runs on the example and on one row more.

    Export leaves a size open and guards it where a shape is written out in the model: view(4, 2, 8) of a batch of four.
    """
    module = copy.deepcopy(exported.module())  # in train mode a call changes the statistics of batch norms
    more, more_named = each_tensor(lambda x: torch.cat([x, x[:1]]), (args, kwargs))
    try:
        module(*args, **kwargs)
        module(*more, **more_named)
    except Exception as error:  # a guard raises AssertionError, an operator whatever it likes
        log.debug("the batch stays fixed: %s", error)
        return False
    return True


def _any_batch(args: tuple[Any, ...], kwargs: dict[str, Any], bound: dict[str, Any]) -> Iterator[tuple[Any, Any]]:
    """Arguments and shapes to export with so that the first dimension of all tensors stays open, if they agree on it."""
    if batch_size(bound) is None:
        return
    inputs = (args, kwargs)
    if batch_size(bound) == 1:  # export takes a size of 1 to be fixed
        inputs = each_tensor(lambda x: torch.cat([x, x]), inputs)
    yield inputs, pytree.tree_map(lambda x: {0: torch.export.Dim.AUTO} if isinstance(x, torch.Tensor) else None, bound)
