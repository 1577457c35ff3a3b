"""explain() and cpp_code(): what a compile of a model does, without or with the C++ compiler."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from inductor_x86q import _torch, codegen
from inductor_x86q.backend import compile_graph, settings
from inductor_x86q.errors import CompileError
from inductor_x86q.report import Report
from inductor_x86q.report import layer as layer_of


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
    layer: str | None = None,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> str:
    """The C++ that Inductor generates for a quantized model: the wrapper and all kernels.

    A comment in front of each kernel call says which layers it serves. Nothing is compiled.

    Args:
        layer: a module's path, e.g. "layer1.0.conv1": only the calls that serve it, or modules inside it, and the
            kernels they call.

    Raises:
        CompileError: as the backend does; or no kernel call serves the layer.
    """
    chosen = settings(mode, options)

    def backend(graph_module: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        return compile_graph(graph_module, inputs, chosen, inner_compile=_torch.generate_only)

    with _torch.generated_code() as generated:
        _call_once(model, example_inputs, backend)
    code = "\n".join(annotated(part) for part in generated)
    if layer is None:
        return code
    try:
        return codegen.only_layer(code, layer)
    except KeyError as error:
        raise CompileError(error.args[0]) from None


def annotated(generated: _torch.Generated) -> str:
    """Generated code with a comment at each call that names its layers."""
    layers = {name: layers_of(nodes) for name, nodes in generated.origins.items()}
    return codegen.annotate(generated.code, layers)


def layers_of(nodes: list[fx.Node]) -> list[str]:
    """The layers that the nodes belong to, each once; those without a module by their own name."""
    operators = [node for node in nodes if node.op == "call_function"]
    return list(dict.fromkeys(layer_of(node) for node in operators))


def _call_once(model: torch.nn.Module, example_inputs: tuple[Any, ...], backend: Callable[..., Any]) -> Any:
    """Calls the model once, compiled by `backend`, leaving no trace in Dynamo's caches of the model's own code."""
    if not isinstance(model, torch.nn.Module):
        raise CompileError(f"model is a {type(model).__name__}: expected what quantize() or convert_pt2e() returned")
    if not isinstance(example_inputs, tuple):
        raise CompileError(f"example_inputs is a {type(example_inputs).__name__}: expected a tuple of arguments")
    with torch.no_grad():
        return _torch.compile_fresh(model, backend)(*example_inputs)


def run_fused(model: torch.nn.Module, example_inputs: tuple[Any, ...]) -> tuple[Any, Report]:
    """What the fused graph computes, and its report: the graph is run eagerly, with no C++ generated or compiled.

    For tests of many graphs: the numbers of the fusions without the wait for the compiler.
    """
    report = Report([], [], [])
    chosen = settings(None, None)

    def backend(graph_module: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        return compile_graph(graph_module, inputs, chosen, on_report=report.extend, inner_compile=_torch.run_uncompiled)

    return _call_once(model, example_inputs, backend), report
