"""Compiling once, and assertions on the generated code."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from inductor_x86q import inspection
from inductor_x86q.backend import compile_graph, settings
from inductor_x86q.inductor import dynamo, wrapper_source
from inductor_x86q.inductor.cpp_text import kernel_calls, stable
from inductor_x86q.report import Report

# With these the generated text depends on neither the CPU's vectors nor its number of cores.
PINNED: Mapping[str, Any] = {"cpp.simdlen": 256, "cpp.threads": 1, "kernels": "onednn"}

INT8_KERNELS = ("qconv", "qconv.binary", "qlinear", "qlinear.binary")
FLOAT_KERNELS = ("convolution", "convolution.binary", "linear", "linear.binary", "mm_out", "addmm_out", "bmm_out")


@dataclasses.dataclass(frozen=True)
class Compiled:
    """One compile of a q/dq graph: what it returned, its source, its report and a way to call it again."""

    outputs: Any
    code: str
    report: Report
    run: Callable[..., Any]

    @property
    def calls(self) -> Counter[str]:
        return kernel_calls(self.code)


def compile_once(
    q: torch.nn.Module,
    inputs: tuple[Any, ...],
    *,
    kwargs: Mapping[str, Any] | None = None,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Compiled:
    """Compiles `q` with the backend, bypassing all caches, and calls it once."""
    report = Report([], [], [])
    chosen = settings(mode, options)

    def backend(graph_module: fx.GraphModule, arguments: list[Any]) -> Callable[..., Any]:
        return compile_graph(graph_module, arguments, chosen, on_report=report.extend)

    def run(*arguments: Any, **keywords: Any) -> Any:
        with torch.no_grad():
            return compiled(*arguments, **keywords)

    with dynamo.one_at_a_time(), wrapper_source.generated_code() as generated:
        compiled = dynamo.compile_fresh(q, backend)
        outputs = run(*inputs, **(kwargs or {}))
    return Compiled(outputs, "\n".join(inspection.annotated(part) for part in generated), report, run)


def int8_calls(code: str) -> dict[str, int]:
    """The onednn int8 calls among `kernel_calls`.

    Example:
        >>> testing.int8_calls(inductor_x86q.cpp_code(q, (x,), options={"kernels": "onednn"}))
        {'qconv': 3, 'qlinear': 1}
    """
    return {name: count for name, count in kernel_calls(code).items() if name in INT8_KERNELS}


def own_calls(code: str) -> dict[str, int]:
    """The layers in kernels of ours among `kernel_calls`."""
    return {name: count for name, count in kernel_calls(code).items() if name.startswith("x86q.")}


def float_calls(code: str) -> dict[str, int]:
    """The float convolutions, linears and matrix products among `kernel_calls`."""
    return {name: count for name, count in kernel_calls(code).items() if name in FLOAT_KERNELS}


def assert_fused(
    q: torch.nn.Module,
    inputs: tuple[Any, ...],
    expected: Mapping[str, int],
    *,
    kwargs: Mapping[str, Any] | None = None,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> str:
    """Asserts how many kernels of each kind the generated code calls; returns the code. Nothing is compiled.

    All that is fused is a call of oneDNN, whatever the CPU: the option `kernels` is "onednn", unless `options` has it.

    Args:
        expected: counts by the keys of `kernel_calls`, where "cpp" stands for all generated kernels together. Every
            int8 and float oneDNN kernel that is not named is expected not to be there; other kernels may be.

    Raises:
        AssertionError: with the counts that differ, all calls, and what the report says was missed.

    Example:
        >>> code = testing.assert_fused(q, (x,), {"qconv": 3, "qlinear": 1})
    """
    options = {"kernels": "onednn", **(options or {})}
    code = inspection.cpp_code(q, inputs, kwargs=kwargs, mode=mode, options=options)
    calls = kernel_calls(code)
    found = Counter(calls)
    found["cpp"] = sum(count for name, count in calls.items() if name.startswith("cpp_"))
    wanted = {**dict.fromkeys((*INT8_KERNELS, *FLOAT_KERNELS), 0), **expected}
    wrong = [f"{name}: {found[name]}, expected {count}" for name, count in wanted.items() if found[name] != count]
    if wrong:
        report = inspection.explain(q, inputs, kwargs=kwargs, mode=mode, options=options)
        reasons = "\n".join(f"  {miss}" for miss in (*report.missed, *report.kept_float))
        raise AssertionError(
            f"kernel calls differ: {'; '.join(wrong)}\nall calls: {dict(calls)}"
            + (f"\nnot int8:\n{reasons}" if reasons else "")
        )
    return code


def assert_expected_cpp(code: str, expected: str, *, skip: int = 0) -> None:
    """Asserts that `stable(code)` is the text `expected`, a string literal in the caller's source.

    EXPECTTEST_ACCEPT=1 in the environment rewrites the literal instead. Needs the package expecttest.

    Args:
        skip: how many more calls stand between this one and the literal.
    """
    try:
        import expecttest
    except ImportError as error:
        raise ImportError("assert_expected_cpp needs expecttest: pip install inductor-x86q[test]") from error
    expecttest.assert_expected_inline("\n" + stable(code), expected, skip=skip + 1)
