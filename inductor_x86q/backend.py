"""The torch.compile backend: binds parameters, scopes the passes, calls Inductor."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from inductor_x86q import passes
from inductor_x86q.errors import CompileError, StrictError
from inductor_x86q.graph import qdq
from inductor_x86q.graph.origin import layer
from inductor_x86q.inductor import compiling, configuration, dynamo, objects, patches, regions, supported
from inductor_x86q.report import Report, RuleCount, dump
from inductor_x86q.report.collect import collect, inside_regions

log = logging.getLogger(__name__)

# Options of ours; everything else in `options` is Inductor's.
OWN_OPTIONS = ("strict", "kernels")
KERNELS = ("auto", "onednn")


def inductor_x86q(
    graph_module: fx.GraphModule,
    example_inputs: list[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """Compiles a graph for `torch.compile(model, backend="inductor_x86q")`.

    The weights become constants of the compiled code, as with any freezing: another tensor in the place of one is
    compiled again, writing into one in place changes nothing.

    Args:
        mode: a mode of `torch.compile`.
        options: any Inductor option, and two of ours. `strict` (bool): raise StrictError when a layer that should run in
            int8 does not. `kernels`: "auto", the default, lets a kernel of ours compute a layer where that should be faster
            than oneDNN's operator, and in mode "max-autotune" where it was measured to be; "onednn" uses none of ours.

    Raises:
        CompileError: gradients are asked for, an option is unknown, or there is no C++ compiler.

    Example:
        >>> compiled = torch.compile(q, backend="inductor_x86q", options={"strict": True})
        >>> with torch.no_grad():
        ...     compiled(x).shape
        torch.Size([4, 4])
    """
    return compile_graph(graph_module, example_inputs, settings(mode, options))


@dataclasses.dataclass(frozen=True)
class Settings:
    """Inductor's options for one compile, and our own."""

    inductor: dict[str, Any]
    strict: bool = False
    kernels: str = "auto"


def settings(mode: str | None, options: Mapping[str, Any] | None) -> Settings:
    """Checks and merges what `torch.compile` passed on; raises CompileError for what is not known."""
    supported.require()
    if options is not None and not isinstance(options, Mapping):
        raise CompileError(f"options is a {type(options).__name__}: expected a dictionary of names and values")
    given = dict(options or {})
    own = {name: given.pop(name) for name in OWN_OPTIONS if name in given}
    known = configuration.config_keys()
    for name in given:
        if name.replace("-", "_") not in known:
            raise CompileError(
                f"unknown option {name!r}: expected `strict`, `kernels` or an Inductor option "
                "(torch._inductor.list_options())"
            )
    if not isinstance(own.get("strict", False), bool):
        raise CompileError(f"option `strict` is {own['strict']!r}: expected True or False")
    if own.get("kernels", "auto") not in KERNELS:
        raise CompileError(f"option `kernels` is {own['kernels']!r}: expected {' or '.join(map(repr, KERNELS))}")
    try:
        inductor = configuration.merged(mode, given)
    except RuntimeError as error:
        raise CompileError(str(error)) from error
    return Settings(inductor, **own)


def compile_graph(
    graph_module: fx.GraphModule,
    example_inputs: Sequence[Any],
    chosen: Settings,
    *,
    on_report: Callable[[Report], None] = lambda report: None,
    observe: Callable[[str, fx.Graph], None] = lambda stage, graph: None,
    **keywords: Any,
) -> Callable[..., Any]:
    """Compiles one Dynamo graph.

    `on_report` receives the report as soon as the passes have run, `observe` the graph after each stage.
    """
    require_compilable(example_inputs)

    def pipeline(graph: fx.Graph) -> None:
        # What hangs on the module goes into the key of Inductor's graph cache: other passes, another entry.
        assert graph.owning_module is not None
        graph.owning_module.meta["inductor_x86q"] = passes.fingerprint()
        report = run_passes(graph, chosen, observe=observe)
        on_report(report)

    inputs = list(example_inputs)
    regions.inline_nested(graph_module)
    kept = dynamo.bind_parameters(graph_module, inputs)
    remaining = [inputs[position] for position in kept]
    generating = "inner_compile" not in keywords
    with contextlib.ExitStack() as stack:
        stack.enter_context(patches.applied(pipeline))
        if generating:
            stack.enter_context(patches.headers_ahead(chosen.inductor))
            stack.enter_context(objects.built_ahead())
        compiled = compiling.compile_fx(graph_module, remaining, chosen.inductor, **keywords)
    return _dropping(compiled, kept, len(inputs))


def run_passes(
    graph: fx.Graph,
    chosen: Settings,
    *,
    observe: Callable[[str, fx.Graph], None] = lambda stage, graph: None,
) -> Report:
    """Runs the pipeline and returns its report; raises StrictError under `strict` when something was missed."""
    report = _run_everywhere(graph, chosen, observe)
    if report.missed:
        if chosen.strict:
            raise StrictError(
                f"{len(report.missed)} layers that should run in int8 do not:\n{report.missed_text()}", report
            )
        log.warning("%d layers that should run in int8 do not:\n%s", len(report.missed), report.missed_text())
    return report


def _run_everywhere(graph: fx.Graph, chosen: Settings, observe: Callable[[str, fx.Graph], None]) -> Report:
    """Runs the pipeline on the graph, and on those inside of it whose weights are known; the report names all layers."""
    inside = regions.with_constants(graph)
    report = _run(graph, chosen, observe)
    for region in inside:
        report.extend(_run_everywhere(region.module.graph, chosen, observe))
        regions.finish(region)
    done = {region.module for region in inside}
    for region in regions.regions(graph):
        if region.module not in done:
            report.extend(inside_regions(region))
    return report


def _run(graph: fx.Graph, chosen: Settings, observe: Callable[[str, fx.Graph], None]) -> Report:
    require_usable_parameters(graph)
    report: Report | None = None
    record = dump.Dump.from_environment(graph)

    def between(stage: passes.Stage, graph: fx.Graph) -> None:
        nonlocal report
        if stage is passes.FUSED:
            report = collect(graph)
        record.after(stage.name, graph)
        observe(stage.name, graph)

    keeps_calls = chosen.kernels == "onednn"
    results = passes.run(graph, between, without=passes.OURS if keeps_calls else ())
    assert report is not None
    for node, why in [] if keeps_calls else passes.generate.calls_left(graph):
        report.notes.append(f"{layer(node)} is computed by oneDNN: {why}")
    named = ((node.meta.get("x86q_reported"), passes.computed_by(node)) for node in graph.nodes)
    kernels = {reported: kernel for reported, kernel in named if kernel}
    report.fused = [dataclasses.replace(fusion, computed_by=kernels.get(fusion.node, "")) for fusion in report.fused]
    report.passes = [RuleCount(r.stage, rule, n, r.seconds) for r in results for rule, n in r.matches.items()]
    record.finish(results, report)
    return report


def require_usable_parameters(graph: fx.Graph) -> None:
    """Raises CompileError for q/dq nodes that have no meaning: the eager graph raises too, generated code would not."""
    for node in graph.nodes:
        if not (qdq.is_quantize(node) or qdq.is_dequantize(node)):
            continue
        parameters = qdq.qparams(node)
        where = f"{node.target.__name__.split('.')[0]} in layer {layer(node)}"
        if parameters.scale == 0:
            raise CompileError(f"{where} has a scale of 0: calibrate again, with data that reaches this layer")
        if parameters.dtype not in qdq.INT8_TYPES:
            continue
        info = torch.iinfo(parameters.dtype)
        if parameters.quant_min < info.min or parameters.quant_max > info.max:
            raise CompileError(
                f"{where} has the range {parameters.quant_min} to {parameters.quant_max}, which {parameters.dtype} does "
                f"not hold: give it one within {info.min} to {info.max}"
            )


def _dropping(compiled: Callable[..., Any], kept: list[int], total: int) -> Callable[..., Any]:
    """`compiled` without the arguments that became constants.

    Dynamo itself leaves them out, since it calls with what placeholders its graph has after the backend is done;
    whoever calls the backend directly passes them all.
    """
    if len(kept) == total:
        return compiled

    def call(*arguments: Any) -> Any:
        return compiled(*(arguments if len(arguments) == len(kept) else [arguments[position] for position in kept]))

    return call


def require_compilable(example_inputs: Sequence[Any]) -> None:
    """Raises CompileError where no code can be compiled: gradients, another device, no C++ compiler."""
    _require_inference(example_inputs)
    _require_cpu(example_inputs)
    try:
        configuration.cxx_compiler()
    except RuntimeError as error:
        raise CompileError(str(error)) from error


def _require_inference(example_inputs: Sequence[Any]) -> None:
    if not torch.is_grad_enabled():
        return
    for value in example_inputs:
        if isinstance(value, torch.Tensor) and value.requires_grad:
            kind = "a parameter" if dynamo.is_lifted_parameter(value) else "an input"
            raise CompileError(
                f"{kind} of shape {tuple(value.shape)} requires grad: int8 inference has no gradients. Call the "
                "compiled model under `torch.no_grad()` or `torch.inference_mode()`."
            )


def _require_cpu(example_inputs: Sequence[Any]) -> None:
    for value in example_inputs:
        if isinstance(value, torch.Tensor) and value.device.type != "cpu":
            raise CompileError(
                f"an input is on {value.device}: this backend compiles for x86 CPUs only, move it to cpu"
            )
