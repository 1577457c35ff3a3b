"""explain(), cpp_code() and why(): what a compile of a model does, mostly without the C++ compiler."""

from __future__ import annotations

import dataclasses
import difflib
import re
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from inductor_x86q.accuracy import drift as drift_module
from inductor_x86q.backend import compile_graph, settings
from inductor_x86q.errors import CompileError, of_ours
from inductor_x86q.graph import operators
from inductor_x86q.graph.origin import layer as layer_of
from inductor_x86q.inductor import compiling, cpp_text, dynamo, profiling, uncompiled, wrapper_source
from inductor_x86q.quantization.arguments import bind, checked
from inductor_x86q.quantization.attention_drift import NOTES
from inductor_x86q.report import Code, Kernel, Report, dump
from inductor_x86q.report.dump import Answer


def explain(
    model: torch.nn.Module,
    example_inputs: tuple[Any, ...],
    *,
    kwargs: Mapping[str, Any] | None = None,
    timing: bool = False,
    drift: bool | torch.nn.Module = False,
    code: bool = False,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Report:
    """Which kernel each layer of a quantized model becomes, and why not where it does not.

    Runs the passes as `torch.compile(model, backend="inductor_x86q", ...)(*example_inputs)` would, but neither
    generates nor compiles code.

    Args:
        kwargs: the call's arguments by name, beside the positional ones in `example_inputs`.
        timing: compile it all the same, and measure each kernel: the median of RUNS calls, in microseconds.
        drift: measure how far int8 is from float32 on these inputs, layer by layer, the worst first, and what excluding
            the worst would give. True: what rounding the activations costs, since the quantized graph holds no float
            weights; the float model it was made from: what rounding the weights costs too. Runs the graph once a layer.
        code: generate the C++ all the same; `Report.code` has it call by call, and the report's page shows it by layer.

    Raises:
        CompileError: as the backend does; or timing is asked for without the C++ wrapper; or drift of a model that is
            no graph of quantize(), or against another float model.
        StrictError: with `options={"strict": True}`, when something was missed.

    Example:
        >>> report = inductor_x86q.explain(q, (x,))
        >>> [fusion.layer for fusion in report.fused]
        ['0', '3', '6', '10']
        >>> report.missed, report.kept_float
        ([], [])
        >>> report.int8_share_of_macs
        1.0
    """
    args, named = _checked(model, example_inputs, kwargs)
    if timing:
        report = _timed(model, args, named, mode, options)
    elif code:
        report = _generated(model, args, named, mode, options)
    else:
        _, report = _run_uncompiled(model, args, named, mode, options)
    report.notes += getattr(model, "meta", {}).get(NOTES, [])
    if drift is not False:
        original: Any = None if drift is True else drift
        report.drift = drift_module.measure(model, args, named, original)
    report.tuning = getattr(model, "tuning", None)
    return report


def _run_uncompiled(
    model: Any, args: Any, kwargs: Any, mode: str | None, options: Mapping[str, Any] | None
) -> tuple[Any, Report]:
    """What the fused graph computes when it is run eagerly, and its report."""
    report = Report([], [], [])
    backend = _backend(mode, options, on_report=report.extend, inner_compile=uncompiled.run_uncompiled)
    return _call_once(model, args, kwargs, backend), report


def _generated(model: Any, args: Any, kwargs: Any, mode: str | None, options: Mapping[str, Any] | None) -> Report:
    report = Report([], [], [])
    backend = _backend(mode, options, on_report=report.extend, inner_compile=compiling.generate_only)
    with wrapper_source.generated_code() as generated:
        _call_once(model, args, kwargs, backend)
    return dataclasses.replace(report, code=calls_of(generated))


RUNS = 21


def _timed(model: Any, args: Any, kwargs: Any, mode: str | None, options: Mapping[str, Any] | None) -> Report:
    report = Report([], [], [])
    chosen = settings(mode, {**(options or {}), "cpp.enable_kernel_profile": True})
    if not chosen.inductor["cpp_wrapper"]:
        raise CompileError("timing needs the C++ wrapper: leave the option cpp_wrapper at True")

    def backend(graph_module: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        return compile_graph(graph_module, inputs, chosen, on_report=report.extend)

    with torch.no_grad():
        with dynamo.one_at_a_time(), wrapper_source.generated_code() as generated:
            compiled = dynamo.compile_fresh(model, backend)
            compiled(*args, **kwargs)
        events = profiling.profiled(lambda: compiled(*args, **kwargs), runs=RUNS)
    report = dataclasses.replace(report, code=calls_of(generated))
    return with_kernels(report, measured(generated, events))


def calls_of(generated: Sequence[wrapper_source.Generated]) -> list[Code]:
    """The kernel calls of generated code, each with the nodes that it computes and the kernel's C++."""
    found: list[Code] = []
    for part in generated:
        kernels = cpp_text.kernels(part.code)
        for call in cpp_text.calls(part.code):
            found.append(Code(call.name, _nodes_of(part, call)[1], call.line, kernels.get(call.symbol, "")))
    return found


def _nodes_of(part: wrapper_source.Generated, call: cpp_text.KernelCall) -> tuple[list[fx.Node], tuple[str, ...]]:
    """The nodes that a call computes, and what the report calls them."""
    nodes = [node for result in call.results for node in part.origins.get(result, ())]
    return nodes, tuple(dict.fromkeys(map(_reported_name, nodes)))


def measured(generated: Sequence[wrapper_source.Generated], events: Sequence[tuple[str, float]]) -> list[Kernel]:
    """The kernel calls of generated code with their median time.

    Args:
        events: name and microseconds of what a profiler saw in RUNS calls, in the order in which it began. A kernel's
            event is named as its C shim, or ends in the generated kernel's name.
    """
    found: list[Kernel] = []
    for part in generated:
        calls = list(cpp_text.calls(part.code))
        names = {call.symbol for call in calls}
        times: dict[str, list[float]] = {}
        for event, time in events:
            name = event if event in names else re.sub(r"^graph_\d+_", "", event)
            if name in names:
                times.setdefault(name, []).append(time)
        seen: Counter[str] = Counter()
        for call in calls:
            number, per_run = seen[call.symbol], sum(other.symbol == call.symbol for other in calls)
            seen[call.symbol] += 1
            if samples := times.get(call.symbol, [])[number::per_run]:
                nodes, names_of_nodes = _nodes_of(part, call)
                found.append(Kernel(call.name, tuple(layers_of(nodes)), names_of_nodes, statistics.median(samples)))
    return found


def _reported_name(node: fx.Node) -> str:
    """What the report calls a node; a view around what a call became in a later stage is not that call."""
    name: str = node.name if operators.role(node) is operators.Role.VIEW else node.meta.get("x86q_reported", node.name)
    return name


def with_kernels(report: Report, kernels: list[Kernel]) -> Report:
    """The report with the measured kernels, and their times at the layers that they serve."""
    times = {node: kernel.microseconds for kernel in kernels for node in kernel.nodes}

    def timed(items: list[Any]) -> list[Any]:
        return [dataclasses.replace(item, microseconds=times.get(item.node)) for item in items]

    return dataclasses.replace(
        report,
        fused=timed(report.fused),
        missed=timed(report.missed),
        kept_float=timed(report.kept_float),
        generated=timed(report.generated),
        kernels=kernels,
    )


def why(
    model: torch.nn.Module,
    example_inputs: tuple[Any, ...],
    node: str,
    *,
    kwargs: Mapping[str, Any] | None = None,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> list[Answer]:
    """Why the rules that could apply to a node, or to what reads it, did not, at the end of each stage.

    Args:
        kwargs: the call's arguments by name.
        node: the name of a node in the graph of some stage (INDUCTOR_X86Q_DEBUG writes these graphs), or a layer's
            path, which stands for all its nodes.

    Raises:
        CompileError: as the backend does; or no stage's graph has such a node.

    Example:
        >>> answers = inductor_x86q.why(q, (x,), "8")
        >>> {answer.stage for answer in answers if answer.rule} <= {stage.name for stage in inductor_x86q.passes.STAGES}
        True
    """
    answers: list[Answer] = []
    names: set[str] = set()

    def observe(stage: str, graph: fx.Graph) -> None:
        names.update(x.name for x in graph.nodes if x.op == "call_function")
        wanted = [x for x in graph.nodes if node in (x.name, layer_of(x)) and x.op == "call_function"]
        users = dict.fromkeys(user for x in wanted for user in x.users if user not in wanted)
        answers.extend(dump.answers(stage, wanted))
        answers.extend(answer for answer in dump.answers(stage, users) if answer.rule)

    backend = _backend(mode, options, observe=observe, inner_compile=uncompiled.run_uncompiled)
    _call_once(model, *_checked(model, example_inputs, kwargs), backend)
    if not answers:
        close = difflib.get_close_matches(node, names, 5) or sorted(names)[:20]
        raise CompileError(f"no stage's graph has a node or layer named {node!r}; there are {', '.join(close)} ...")
    return answers


def cpp_code(
    model: torch.nn.Module,
    example_inputs: tuple[Any, ...],
    *,
    kwargs: Mapping[str, Any] | None = None,
    layer: str | None = None,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> str:
    """The C++ that Inductor generates for a quantized model: the wrapper and all kernels.

    A comment in front of each kernel call says which layers it serves. Nothing is compiled.

    Args:
        kwargs: the call's arguments by name.
        layer: a module's path, e.g. "layer1.0.conv1": only the calls that serve it, or modules inside it, and the
            kernels they call.

    Raises:
        CompileError: as the backend does; or no kernel call serves the layer.

    Example:
        >>> code = inductor_x86q.cpp_code(q, (x,), layer="10", options={"kernels": "onednn"})
        >>> "aoti_torch_cpu__qlinear_pointwise_tensor(" in code
        True
    """
    backend = _backend(mode, options, inner_compile=compiling.generate_only)
    with wrapper_source.generated_code() as generated:
        _call_once(model, *_checked(model, example_inputs, kwargs), backend)
    code = "\n".join(annotated(part) for part in generated)
    if layer is None:
        return code
    try:
        return cpp_text.only_layer(code, layer)
    except KeyError as error:
        raise CompileError(error.args[0]) from None


def annotated(generated: wrapper_source.Generated) -> str:
    """Generated code with a comment at each call that names its layers."""
    layers = {name: layers_of(nodes) for name, nodes in generated.origins.items()}
    return cpp_text.annotate(generated.code, layers)


def layers_of(nodes: list[fx.Node]) -> list[str]:
    """The layers that the nodes belong to, each once; those without a module by their own name."""
    operators = [node for node in nodes if node.op == "call_function"]
    return list(dict.fromkeys(layer_of(node) for node in operators))


def _backend(mode: str | None, options: Mapping[str, Any] | None, **keywords: Any) -> Callable[..., Any]:
    """A backend for Dynamo that compiles as ours does, with these keywords of `compile_graph`."""
    chosen = settings(mode, options)

    def backend(graph_module: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        return compile_graph(graph_module, inputs, chosen, **keywords)

    return backend


def _call_once(
    model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], backend: Callable[..., Any]
) -> Any:
    """Calls the model once, compiled by `backend`, leaving no trace in Dynamo's caches of the model's own code.

    Errors of ours are raised as such, and not inside of one of Dynamo's.
    """
    try:
        with torch.no_grad(), dynamo.one_at_a_time():
            return dynamo.compile_fresh(model, backend)(*args, **kwargs)
    except Exception as error:
        if cause := of_ours(error):
            raise cause from None
        raise


def _checked(model: Any, example_inputs: Any, kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call that the model takes."""
    if not isinstance(model, torch.nn.Module):
        raise CompileError(f"model is a {type(model).__name__}: expected what quantize() or convert_pt2e() returned")
    args, named = checked(example_inputs, kwargs, CompileError)
    try:
        bind(model.forward, args, named)
    except TypeError as error:
        raise CompileError(f"the example does not fit the model: {error}") from None
    return args, named


def run_fused(
    model: torch.nn.Module, example_inputs: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None
) -> tuple[Any, Report]:
    """What the fused graph computes, and its report: the graph is run eagerly, with no C++ generated or compiled.

    For tests of many graphs: the numbers of the fusions without the wait for the compiler.
    """
    return _run_uncompiled(model, *_checked(model, example_inputs, kwargs), None, None)
