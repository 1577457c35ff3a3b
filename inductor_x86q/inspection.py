"""explain() and cpp_code(): what a compile of a model does, without or with the C++ compiler."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from inductor_x86q import _torch
from inductor_x86q.backend import compile_graph, settings
from inductor_x86q.errors import CompileError
from inductor_x86q.report import Report


def explain(
    model: torch.nn.Module,
    example_inputs: tuple[Any, ...],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Report:
    """Which kernel each layer of a quantized model becomes, and why not where it does not.

    Runs the passes as `torch.compile(model, backend="inductor_x86q", ...)(*example_inputs)` would, but neither
    generates nor compiles code.

    Raises:
        CompileError: as the backend does.
        StrictError: with `options={"strict": True}`, when something was missed.
    """
    report = Report([], [], [])
    chosen = settings(mode, options)

    def backend(graph_module: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        return compile_graph(graph_module, inputs, chosen, on_report=report.extend, inner_compile=_torch.run_uncompiled)

    _call_once(model, example_inputs, backend)
    return report


def cpp_code(
    model: torch.nn.Module,
    example_inputs: tuple[Any, ...],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> str:
    """The C++ that Inductor generates for a quantized model: the wrapper and all kernels.

    Raises:
        CompileError: as the backend does.
    """
    chosen = settings(mode, options)

    def backend(graph_module: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        return compile_graph(graph_module, inputs, chosen)

    with _torch.generated_code() as codes:
        _call_once(model, example_inputs, backend)
    return "\n".join(codes)


def _call_once(model: torch.nn.Module, example_inputs: tuple[Any, ...], backend: Callable[..., Any]) -> None:
    """Calls the model once, compiled by `backend`, leaving no trace in Dynamo's caches of the model's own code."""
    if not isinstance(model, torch.nn.Module):
        raise CompileError(f"model is a {type(model).__name__}: expected what quantize() or convert_pt2e() returned")
    if not isinstance(example_inputs, tuple):
        raise CompileError(f"example_inputs is a {type(example_inputs).__name__}: expected a tuple of arguments")
    with torch.no_grad():
        _torch.compile_fresh(model, backend)(*example_inputs)
