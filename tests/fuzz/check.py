"""Compiling a random graph and comparing it with what it may compute."""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch

from inductor_x86q.backend import compile_graph, settings
from inductor_x86q.graph import recurrence
from inductor_x86q.inductor import uncompiled
from inductor_x86q.kernels import cost
from inductor_x86q.report import Report
from tests.fuzz.bounds import bounds
from tests.fuzz.graphs import Graph

# Inductor's own search for the fastest float product takes seconds for each; a graph found in the cache takes no kernel.
OPTIONS = {
    None: {"fx_graph_cache": False},
    "max-autotune": {"max_autotune_gemm_backends": "ATEN", "fx_graph_cache": False},
}


class Mismatch(AssertionError):
    """A compiled graph differs from its reference; the message ends in a script that shows it."""


class Unexplained(Mismatch):
    """A layer stays float, and nothing was drawn that explains it."""


@contextlib.contextmanager
def _no_grad_and_fresh() -> Iterator[None]:
    torch._dynamo.reset()
    with torch.no_grad():
        yield


def compiled(model: torch.nn.Module, reports: Report, *, generate: bool, mode: str | None = None) -> Callable[..., Any]:
    """`model` compiled by this backend; without `generate` the fused graph is run eagerly, no C++ is made."""
    keywords = {} if generate else {"inner_compile": uncompiled.run_uncompiled}

    def backend(graph_module: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        return compile_graph(
            graph_module, inputs, settings(mode, OPTIONS.get(mode)), on_report=reports.extend, **keywords
        )

    return torch.compile(model, backend=backend)


def check(graph: Graph) -> Report:
    """Compiles without generating code, calls twice, and compares; raises Mismatch. Returns the report."""
    return check_together([graph], generate=False)


def check_exactly(graph: Graph) -> None:
    """Raises Mismatch where the fused graph, run uncompiled, gives other numbers than the graph itself.

    For graphs without products that round to 16 bits: what the graph allows leaves each such rounding open.
    """
    model, inputs = graph.module(), graph.example(0)
    with _no_grad_and_fresh():
        expected = _listed(model(*inputs))
        actual = _listed(compiled(model, Report([], [], []), generate=False)(*inputs))
    if not all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True)):
        raise Mismatch(f"the results are not those of the graph\n\n{graph.script()}")


@contextlib.contextmanager
def own_kernels_taken() -> Iterator[list[Any]]:
    """Within this context every layer that a kernel of ours may compute is computed by one, untimed; lists them.

    Which of its kernels is taken depends on the layer alone, so that all of them come up.
    """
    import torch._inductor.lowering  # noqa: F401

    from inductor_x86q.inductor.lowering import choice
    from inductor_x86q.inductor.lowering.layer import LayerTemplate

    taken: list[Any] = []
    stock = cost.choose

    def choose(*layer: Any) -> list[Any]:
        kernels = [choice for choice in stock(*layer) if choice != cost.ONEDNN]
        return [kernels[zlib.crc32(repr(layer).encode()) % len(kernels)]]

    def decide(target: Any, arguments: Any, given: Any, templates: Sequence[LayerTemplate]) -> LayerTemplate:
        taken.append(templates[0])
        return templates[0]

    with mock.patch.object(choice, "decide", decide), mock.patch.object(cost, "choose", choose):
        yield taken


class _Together(torch.nn.Module):
    """Several models as one, so that they share the cost of a compile."""

    def __init__(self, models: Sequence[torch.nn.Module], arities: Sequence[int]) -> None:
        super().__init__()
        self.models, self.arities = torch.nn.ModuleList(models), list(arities)

    def forward(self, *inputs: torch.Tensor) -> tuple[Any, ...]:
        results, start = [], 0
        for model, arity in zip(self.models, self.arities, strict=True):
            results.append(model(*inputs[start : start + arity]))
            start += arity
        return tuple(results)


def check_together(drawn: Sequence[Graph], *, generate: bool, mode: str | None = None) -> Report:
    """Compiles several graphs as one module, calls it twice with different inputs, and compares every result.

    Kernels of ours are taken wherever there are any.
    """
    models = [graph.module() for graph in drawn]
    whole = models[0] if len(models) == 1 else _Together(models, [len(graph.inputs) for graph in drawn])
    report = Report([], [], [])
    with _no_grad_and_fresh(), own_kernels_taken() as taken:
        run = compiled(whole, report, generate=generate, mode=mode)
        for number in (0, 1):
            _check_call(drawn, models, run, number, mode)
    _check_report(drawn, report, mode)
    if generate and len(taken) != own_kernels_of(report):
        raise Mismatch(f"{len(taken)} kernels of ours, the report has {own_kernels_of(report)}: {report}\n\n"
                       f"{_scripts(drawn, 0, mode)}")  # fmt: skip
    return report


def own_kernels_of(report: Report) -> int:
    """How many layers a kernel of ours may compute in place of a call: of those in int8 each other one is said to be computed
    by oneDNN.

    Attention and a recurrent layer's steps are kernels of ours without a choice.
    """
    layers = [fusion for fusion in report.fused if fusion.operator not in ("attention", *recurrence.CELLS)]
    return len(layers) - sum(" is computed by oneDNN: " in note for note in report.notes)


def _check_call(
    drawn: Sequence[Graph],
    models: Sequence[torch.nn.Module],
    run: Callable[..., Any],
    number: int,
    mode: str | None,
) -> None:
    inputs = [graph.example(number, 5 if graph.dynamic_batch and number else None) for graph in drawn]
    before = [[x.clone() for x in each] for each in inputs]
    for graph, each in zip(drawn, inputs, strict=True):
        if graph.dynamic_batch:
            for x in each:
                torch._dynamo.maybe_mark_dynamic(x, 0)
    try:
        results = run(*(x for each in inputs for x in each))
    except Exception as error:
        raise Mismatch(
            f"call {number} raises {type(error).__name__}: {error}\n\n{_scripts(drawn, number, mode)}"
        ) from error
    for graph, model, each, copies, result in zip(
        drawn, models, inputs, before, [results] if len(drawn) == 1 else results, strict=True
    ):
        for x, copy in zip(each, copies, strict=True):
            if not torch.equal(x, copy):
                raise Mismatch(
                    f"call {number} changed an input of shape {tuple(x.shape)}\n\n{graph.script(number, mode)}"
                )
        _compare(graph, model, tuple(copies), _listed(result), number, mode)


def _listed(result: Any) -> list[torch.Tensor]:
    return list(result) if isinstance(result, (tuple, list)) else [result]


def _scripts(drawn: Sequence[Graph], number: int, mode: str | None) -> str:
    return "\n".join(graph.script(number, mode) for graph in drawn)


def _compare(
    graph: Graph,
    model: torch.nn.Module,
    inputs: tuple[torch.Tensor, ...],
    actual: list[torch.Tensor],
    number: int,
    mode: str | None,
) -> None:
    expected = _listed(model(*inputs))
    for name, interval, eager, result in zip(graph.outputs, bounds(model, inputs), expected, actual, strict=True):
        if result.shape != eager.shape or result.dtype != eager.dtype:
            raise Mismatch(f"call {number}: {name} is {result.dtype} {tuple(result.shape)}, "
                           f"expected {eager.dtype} {tuple(eager.shape)}\n\n{graph.script(number, mode)}")  # fmt: skip
        for what, value in (("eager", eager), ("compiled", result)):
            wrong = interval.excludes(value)
            if wrong.any():
                at = tuple(int(i) for i in wrong.nonzero()[0])
                raise Mismatch(
                    f"call {number}: {what} {name} has {int(wrong.sum())} of {wrong.numel()} elements outside what the graph "
                    f"allows; at {at}: {value[at].item()}, allowed {interval.low[at].item()} to {interval.high[at].item()}, "
                    f"eager {eager[at].item()}\n\n{graph.script(number, mode)}"
                )


def _check_report(drawn: Sequence[Graph], report: Report, mode: str | None) -> None:
    """Every product is in the report, and none is missed but for a reason that was put in on purpose."""
    allowed = frozenset[str]().union(*(graph.defects for graph in drawn))
    for miss in (*report.missed, *report.kept_float):
        if miss.reason.name not in allowed:
            raise Unexplained(f"unexplained miss: {miss}\n\n{_scripts(drawn, 0, mode)}")
