"""The model's graph: exported so that it takes any batch size where the model does, or as the caller asks."""

from __future__ import annotations

import copy
import inspect
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx

log = logging.getLogger(__name__)


def export(model: torch.nn.Module, example_inputs: tuple[Any, ...], dynamic_shapes: Any) -> tuple[fx.GraphModule, bool]:
    """The model's graph, and whether it takes any batch size."""
    # Training goes through the graph: grad mode is part of what is exported.
    with torch.set_grad_enabled(model.training):
        if dynamic_shapes is not None:
            return _export_as_asked(model, example_inputs, dynamic_shapes), True
        for inputs, shapes in _any_batch(example_inputs):
            try:
                exported = torch.export.export(model, inputs, dynamic_shapes=shapes)
            except Exception as error:  # whatever it is, the export with fixed shapes says it better
                log.debug("no export with a dynamic batch: %s", error)
                continue
            first = next(
                n
                for n in exported.graph.nodes
                if n.op == "placeholder" and n.name in exported.graph_signature.user_inputs
            )
            dynamic = not isinstance(first.meta["val"].shape[0], int) and _takes_other_batches(exported, example_inputs)
            if dynamic or batch_size(inputs) == batch_size(example_inputs):
                return exported.module(), dynamic  # type: ignore[return-value]
        return torch.export.export(model, example_inputs).module(), False  # type: ignore[return-value]


def _export_as_asked(model: torch.nn.Module, example_inputs: tuple[Any, ...], dynamic_shapes: Any) -> fx.GraphModule:
    """The graph with the dimensions open that `dynamic_shapes` names; warns of those that the model fixes."""
    asked = _open_dimensions(model, example_inputs, dynamic_shapes)
    inputs = list(example_inputs)
    for position, dimension in asked:  # export takes a size of 1 to be fixed
        x = inputs[position]
        if x.shape[dimension] == 1:
            inputs[position] = torch.cat([x, x], dimension)
    try:
        exported = torch.export.export(model, tuple(inputs), dynamic_shapes=dynamic_shapes)
    except Exception as error:  # the example as it was given says better what is wrong
        log.debug("no export with sizes of 1 doubled: %s", error)
        exported = torch.export.export(model, example_inputs, dynamic_shapes=dynamic_shapes)
    values = {node.name: node.meta.get("val") for node in exported.graph.find_nodes(op="placeholder")}
    names = exported.graph_signature.user_inputs
    for position, dimension in asked if len(names) == len(inputs) else ():
        size = values[names[position]].shape[dimension]
        if isinstance(size, int):
            warnings.warn(
                f"dimension {dimension} of input {names[position]!r} was asked to be dynamic, and the model fixes it to "
                f"{size}: the graph takes no other size",
                stacklevel=4,
            )
    return exported.module()  # type: ignore[return-value]


def _open_dimensions(model: torch.nn.Module, inputs: tuple[Any, ...], dynamic_shapes: Any) -> list[tuple[int, int]]:
    """The dimensions that `dynamic_shapes` leaves open, as positions of tensors among `inputs` and dimensions of each."""
    if isinstance(dynamic_shapes, Mapping):
        parameters = list(inspect.signature(model.forward).parameters)[: len(inputs)]
        shapes = [dynamic_shapes.get(name) for name in parameters]
    else:
        shapes = list(dynamic_shapes) if isinstance(dynamic_shapes, (tuple, list)) else []
    found = []
    for position, (x, shape) in enumerate(zip(inputs, shapes, strict=False)):
        if isinstance(x, torch.Tensor) and shape is not None:
            sizes = shape.items() if isinstance(shape, Mapping) else enumerate(shape)
            fixed = (None, torch.export.Dim.STATIC)
            found += [(position, d) for d, size in sizes if size not in fixed and not isinstance(size, int)]
    return found


def _takes_other_batches(exported: Any, example_inputs: tuple[Any, ...]) -> bool:
    """Whether a program with an open batch runs on the example and on one row more.

    Export leaves a size open and guards it where a shape is written out in the model: view(4, 2, 8) of a batch of four.
    """
    module = copy.deepcopy(exported.module())  # in train mode a call changes the statistics of batch norms
    more = tuple(torch.cat([x, x[:1]]) for x in example_inputs)
    try:
        module(*example_inputs)
        module(*more)
    except Exception as error:  # a guard raises AssertionError, an operator whatever it likes
        log.debug("the batch stays fixed: %s", error)
        return False
    return True


def _any_batch(example_inputs: tuple[Any, ...]) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Inputs and shapes to export with so that the first dimension of all inputs stays open, if they agree on it."""
    if batch_size(example_inputs) is None:
        return
    inputs = example_inputs
    if batch_size(inputs) == 1:  # export takes a size of 1 to be fixed
        inputs = tuple(torch.cat([x, x]) for x in inputs)
    yield inputs, tuple({0: torch.export.Dim.AUTO} for _ in inputs)


def batch_size(inputs: Sequence[Any]) -> int | None:
    """The size of the first dimension of all inputs; None where they have none in common."""
    if not inputs or not all(isinstance(x, torch.Tensor) and x.dim() for x in inputs):
        return None
    sizes = {x.shape[0] for x in inputs}
    return sizes.pop() if len(sizes) == 1 else None
