"""Running a fused graph eagerly, with nothing generated or compiled."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch._ops import HigherOrderOperator

from inductor_x86q.inductor.requirements import Interface, Needs

INTERFACE = Interface(
    "uncompiled.py",
    "The frozen and fused graph is run eagerly.",
    (Needs("torch.fx", "Interpreter.call_function", parameters=("target", "args", "kwargs")),),
    "Every operator in such a graph, Inductor's prims included, having an eager kernel; a call that adds having what it adds as "
    "its seventh argument; `inner_compile` giving what is called with a list of arguments, by `_boxed_call`.",
)

aten = torch.ops.aten
prims = torch.ops.prims


def run_uncompiled(graph_module: fx.GraphModule, example_inputs: list[Any], **keywords: Any) -> Callable[..., Any]:
    """An `inner_compile` for compile_fx that generates nothing: the frozen and fused graph itself is run, eagerly.

    Relies on every operator in it, Inductor's prims included, having an eager kernel.
    """

    def run(arguments: list[Any]) -> Any:
        values = list(arguments)
        arguments.clear()
        with torch.no_grad():
            return _EagerInterpreter(graph_module).run(*values)

    run._boxed_call = True  # type: ignore[attr-defined]
    return run


class _EagerInterpreter(fx.Interpreter):
    """Runs a graph eagerly, except for what eager mode refuses and Inductor does not.

    Integer max pools run in float: eager mode's integer pool counts its indices in 8 bits. Views may copy: a kernel's
    real result has other strides than the fake one for which the view was made, and Inductor lays it out as needed.
    What a call adds is laid out as Inductor does it, since a linear takes any other strides for rows one after another.
    A sum always takes the accumulator's memory, which Inductor may make it do, whatever the kernel does by itself.
    """

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target is aten.view.default:
            target = aten.reshape.default
        if target is prims._low_memory_max_pool_with_offsets.default and not args[0].is_floating_point():
            values, offsets = target(args[0].float(), *args[1:], **kwargs)
            return values.to(args[0].dtype), offsets
        if str(target).startswith("inductor_x86q.q"):
            # It may become the call that it stands for, whose arguments come behind two of its own.
            target, args = _call(target), args[2:]
        if str(target).startswith("onednn.") and ".binary" in str(target):
            return _binary(target, args)
        if isinstance(target, HigherOrderOperator):
            args = tuple(_eagerly(value) if isinstance(value, fx.GraphModule) else value for value in args)
        return super().call_function(target, args, kwargs)


def _call(target: Any) -> Any:
    """The operator of `torch.ops.onednn` that one of ours of the same name stands for."""
    return operator.attrgetter(str(target).removeprefix("inductor_x86q."))(torch.ops.onednn)


def _eagerly(module: fx.GraphModule) -> Callable[..., Any]:
    """What a branch or a loop's body computes, run like the graph around it."""
    return lambda *operands: _EagerInterpreter(module).run(*operands)


def _binary(target: Any, args: tuple[Any, ...]) -> torch.Tensor:
    """A call that adds its seventh argument; relies on that being so in every `binary` overload.

    Convolutions take accumulators whose channels lie innermost, linears those whose rows are contiguous. One that lies
    otherwise is converted first, as compiled code does. Compiled code may have laid it out so to begin with, and then
    sums into its memory: so does this, except where that memory is the input's, which only a converted one may share.
    """
    accumulator: torch.Tensor = args[6]
    layout = torch.channels_last if "conv" in str(target) else torch.contiguous_format
    in_place = "sum" in args
    shared = args[0].untyped_storage().data_ptr() == accumulator.untyped_storage().data_ptr() != 0
    if in_place and shared and accumulator.is_contiguous(memory_format=layout):
        raise RuntimeError(f"{target} is asked to add its result to its own input")
    packed = accumulator.clone(memory_format=layout)
    result = target(*args[:6], packed, *args[7:])
    if not in_place or shared or result.dtype != accumulator.dtype:
        return result
    return accumulator.copy_(result)
