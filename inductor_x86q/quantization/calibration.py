"""Calibration: the prepared graph runs on typical inputs, and its observers take the ranges."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import fx

from inductor_x86q import progress
from inductor_x86q.errors import QuantizationError
from inductor_x86q.graph import aliasing, qdq
from inductor_x86q.graph.origin import layer
from inductor_x86q.quantization import arguments


def is_observer(module: torch.nn.Module) -> bool:
    return hasattr(module, "calculate_qparams")


@contextlib.contextmanager
def finite_values_only(prepared: fx.GraphModule) -> Iterator[None]:
    """Within this context an observer that sees NaN or infinity raises QuantizationError with the layer's name."""
    hooks = []
    for node in prepared.graph.nodes:
        if node.op != "call_module" or not is_observer(prepared.get_submodule(node.target)):
            continue
        source = node.args[0]
        name = f"input {source.name!r}" if source.op == "placeholder" else f"the output of {layer(source)!r}"

        def check(module: torch.nn.Module, arguments: tuple[Any, ...], name: str = name) -> None:
            # NaN and infinity both reach the extremes, which take a fraction of the time of isfinite on every element.
            if arguments[0].numel() and not all(torch.isfinite(bound) for bound in torch.aminmax(arguments[0])):
                raise QuantizationError(f"calibration met NaN or infinity in {name}: check the data and the weights")

        hooks.append(prepared.get_submodule(node.target).register_forward_pre_hook(check))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextlib.contextmanager
def state_kept(graph_module: fx.GraphModule) -> Iterator[None]:
    """Within this context calls of the graph may write into its buffers, which afterwards hold what they did before."""
    reads = graph_module.graph.find_nodes(op="get_attr")
    state = [tensor for node in reads if aliasing.is_variable(node) and (tensor := qdq.constant(node)) is not None]
    before = [tensor.detach().clone() for tensor in state]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, contents in zip(state, before, strict=True):
                tensor.copy_(contents)


def calibrate(prepared: fx.GraphModule, calibration: Iterable[Any], fixed_batch: int | None) -> None:
    """Runs all calls; where the graph takes one batch size only, cuts and pads batches to it."""
    if isinstance(calibration, Mapping) or not isinstance(calibration, Iterable):
        raise QuantizationError(
            f"calibration is a {type(calibration).__name__}: expected an iterable of calls, each a tuple of arguments or a "
            "dictionary of them by name"
        )
    count = 0
    for call in _progress(calibration):
        args, kwargs = arguments.split(call)
        try:
            for part in _fitted(arguments.positional(prepared, args, kwargs), fixed_batch):
                prepared(*part)
        except QuantizationError:
            raise
        except Exception as error:  # whatever the model, or the guards of its export, raise
            got, reason = arguments.described(kwargs or args), next(iter(str(error).splitlines()), "")
            raise QuantizationError(
                f"calibration call {count} does not fit the model: ({got}): {type(error).__name__}: {reason[:300]}"
            ) from error
        count += 1
    if not count:
        raise QuantizationError("no calibration data: the iterable was empty")


def first_calls(
    graph_module: fx.GraphModule, calibration: Iterable[Any], fixed_batch: int | None, rows: int, values: int
) -> list[tuple[Any, ...]]:
    """Calls of the graph with the first of the data, as many as make up that many rows and that many values."""
    found: list[tuple[Any, ...]] = []
    for call in calibration:
        found += _fitted(arguments.positional(graph_module, *arguments.split(call)), fixed_batch)
        rows -= arguments.batch_size(found[-1]) or 1
        values -= arguments.size(found[-1])
        if rows <= 0 and values <= 0:
            break
    return found


def _fitted(inputs: tuple[Any, ...], fixed_batch: int | None) -> Iterator[tuple[Any, ...]]:
    size = arguments.batch_size(inputs)
    if fixed_batch is None or size is None or size == fixed_batch:
        yield inputs
        return
    for start in range(0, size, fixed_batch):
        # Rows that stand twice in a batch do not change the range, and hardly the histogram.
        rows = start + torch.arange(fixed_batch) % min(fixed_batch, size - start)
        yield arguments.each_tensor(operator.itemgetter(rows), inputs)


def _progress(calls: Iterable[Any]) -> Iterator[Any]:
    """The calls one by one, with progress on a terminal."""
    with progress.task("calibrating", operator.length_hint(calls) or None) as advance:
        for call in calls:
            yield call
            advance()
