"""What a regression suite imports: small q/dq graphs by hand, and assertions on code and numbers.

Activations made here span 0 to 127: 8 bits overflow on CPUs without VNNI, and the passes then leave them in float.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from inductor_x86q import inspection
from inductor_x86q.backend import compile_graph, settings
from inductor_x86q.inductor import dynamo, fake_tensors, wrapper_source
from inductor_x86q.inductor.cpp_text import kernel_calls, stable
from inductor_x86q.quantization.arguments import each_tensor
from inductor_x86q.report import Report

__all__ = [
    "PINNED", "Compiled", "QConv1d", "QConv2d", "QConv3d", "QLinear", "assert_close_to_reference",
    "assert_expected_cpp", "assert_fused", "assert_same", "compile_once", "float_calls", "int8_calls", "kernel_calls",
    "own_calls", "qdq_graph", "quantize_dequantize", "snr", "stable",
]  # fmt: skip

fake_tensors.register_quantized_decomposed()

# With these the generated text depends on neither the CPU's vectors nor its number of cores.
PINNED: Mapping[str, Any] = {"cpp.simdlen": 256, "cpp.threads": 1, "kernels": "onednn"}

INT8_KERNELS = ("qconv", "qconv.binary", "qlinear", "qlinear.binary")
FLOAT_KERNELS = ("convolution", "convolution.binary", "linear", "linear.binary", "mm_out", "addmm_out", "bmm_out")


# --- small graphs by hand ---------------------------------------------------------------------------------------------


def quantize_dequantize(
    x: torch.Tensor,
    scale: Any = 0.02,
    zero_point: Any = 60,
    *,
    dtype: torch.dtype = torch.uint8,
    quant_min: int = 0,
    quant_max: int = 127,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """`x` quantized and dequantized per tensor, as two nodes of the graph; scale and zero point numbers or tensors.

    For int8 pass dtype=torch.int8 and a quant_min.

    Example:
        >>> testing.quantize_dequantize(torch.tensor([-2.0, 0.013, 0.5]), 0.02, 60)
        tensor([-1.2000,  0.0200,  0.5000])
    """
    decomposed = torch.ops.quantized_decomposed
    parameters = (scale, zero_point, quant_min, quant_max, dtype)
    if isinstance(scale, torch.Tensor):
        integers = decomposed.quantize_per_tensor.tensor(x, *parameters)
        return decomposed.dequantize_per_tensor.tensor(integers, *parameters, out_dtype=out_dtype)
    integers = decomposed.quantize_per_tensor.default(x, *parameters)
    return decomposed.dequantize_per_tensor.default(integers, *parameters, out_dtype=out_dtype)


class _QWeight(torch.nn.Module):
    """An int8 weight with one scale per output channel, and a float bias; the same numbers for the same shape.

    Weights reach from -largest to largest: up to 63 they cannot overflow with 8-bit activations on any CPU.
    """

    weight: torch.Tensor
    scale: torch.Tensor
    zero_point: torch.Tensor
    bias: torch.Tensor | None

    def __init__(self, shape: tuple[int, ...], bias: bool, dtype: torch.dtype, largest: int) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(math.prod(shape))
        self.dtype = dtype
        self.register_buffer("weight", torch.randint(-largest, largest + 1, shape, generator=random, dtype=torch.int8))
        fan_in = math.prod(shape[1:])
        scale = (0.5 + torch.rand(shape[0], generator=random)) / (0.58 * largest * math.sqrt(fan_in))
        self.register_buffer("scale", scale)
        self.register_buffer("zero_point", torch.zeros(shape[0], dtype=torch.int64))
        self.register_buffer("bias", torch.randn(shape[0], generator=random).to(dtype) if bias else None)

    def dequantized(self) -> torch.Tensor:
        arguments = (self.weight, self.scale, self.zero_point, 0, -127, 127, torch.int8)
        found = torch.ops.quantized_decomposed.dequantize_per_channel.default(*arguments)
        return found if self.dtype == torch.float32 else found.to(self.dtype)


class _QConvNd(_QWeight):
    spatial: int
    function: Callable[..., torch.Tensor]

    def __init__(self, inputs: int, outputs: int, kernel_size: int | tuple[int, ...], *, bias: bool = True,
                 groups: int = 1, dtype: torch.dtype = torch.float32, largest: int = 127,
                 **geometry: Any) -> None:  # fmt: skip
        kernel = (kernel_size,) * self.spatial if isinstance(kernel_size, int) else kernel_size
        super().__init__((outputs, inputs // groups, *kernel), bias, dtype, largest)
        self.geometry = {"groups": groups, **geometry}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return type(self).function(x, self.dequantized(), self.bias, **self.geometry)


class QConv1d(_QConvNd):
    """A 1-D convolution with an int8 weight; takes a dequantized input (N, C, L); other arguments as of F.conv1d."""

    spatial, function = 1, staticmethod(torch.nn.functional.conv1d)


class QConv2d(_QConvNd):
    """A 2-D convolution with an int8 weight; takes a dequantized input (N, C, H, W); other arguments as of F.conv2d."""

    spatial, function = 2, staticmethod(torch.nn.functional.conv2d)


class QConv3d(_QConvNd):
    """A 3-D convolution with an int8 weight; takes a dequantized input (N, C, D, H, W); arguments as of F.conv3d."""

    spatial, function = 3, staticmethod(torch.nn.functional.conv3d)


class QLinear(_QWeight):
    """A linear with an int8 weight; takes a dequantized input (..., inputs)."""

    def __init__(self, inputs: int, outputs: int, *, bias: bool = True, dtype: torch.dtype = torch.float32,
                 largest: int = 127) -> None:  # fmt: skip
        super().__init__((outputs, inputs), bias, dtype, largest)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, self.dequantized(), self.bias)


def qdq_graph(
    module: torch.nn.Module,
    example_inputs: tuple[Any, ...],
    *,
    kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
) -> fx.GraphModule:
    """The exported graph of a module whose forward quantizes and dequantizes by hand: what quantize() would return.

    Example:
        >>> class Block(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.fc = testing.QLinear(16, 32)
        ...     def forward(self, x):
        ...         return torch.relu(self.fc(testing.quantize_dequantize(x)))
        >>> graph = testing.qdq_graph(Block(), inputs := (torch.randn(8, 16),))
        >>> inductor_x86q.explain(graph, inputs).fused[0].absorbed
        ('relu',)
    """
    with torch.no_grad():
        exported = torch.export.export(module.eval(), example_inputs, dict(kwargs or {}), dynamic_shapes=dynamic_shapes)
    return exported.module()  # type: ignore[return-value]


# --- compiling --------------------------------------------------------------------------------------------------------


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

    compiled = dynamo.compile_fresh(q, backend)
    with wrapper_source.generated_code() as generated:
        outputs = run(*inputs, **(kwargs or {}))
    return Compiled(outputs, "\n".join(inspection.annotated(part) for part in generated), report, run)


# --- assertions on code -----------------------------------------------------------------------------------------------


def int8_calls(code: str) -> dict[str, int]:
    """The calls of oneDNN's int8 operators among `kernel_calls`."""
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


# --- assertions on numbers --------------------------------------------------------------------------------------------


def snr(actual: torch.Tensor, reference: torch.Tensor) -> float:
    """The signal-to-noise ratio of `actual` against `reference` in dB; infinite where they are equal.

    Example:
        >>> reference = torch.ones(100)
        >>> round(testing.snr(reference + 0.1, reference), 1)
        20.0
    """
    reference, actual = reference.double(), actual.double()
    noise = (actual - reference).square().sum().item()
    signal = reference.square().sum().item()
    if not math.isfinite(noise):
        return -math.inf
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal else -math.inf


def assert_close_to_reference(
    q: torch.nn.Module,
    inputs: tuple[Any, ...],
    *,
    kwargs: Mapping[str, Any] | None = None,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
    step: float | None = None,
    min_snr: float | None = None,
) -> Compiled:
    """Asserts that the compiled graph returns what the q/dq graph returns eagerly, that it does so at each call, and
    that it leaves its inputs alone.

    For a graph of one fused region leave `min_snr` out: integer outputs may differ by one step on at most 1 % of their
    elements (one element in small tensors), float outputs by float rounding.

    Args:
        step: the scale of float outputs that come from a dequantize: these too may differ by one step, likewise.
        min_snr: for whole nets, the least signal-to-noise ratio in dB, in place of the bounds above.

    Returns:
        The compile, so that more can be asserted of it.

    Raises:
        AssertionError: with the output's position, its largest difference and its signal-to-noise ratio.

    Example:
        >>> compiled = testing.assert_close_to_reference(q, (x,), min_snr=30)
    """
    named = dict(kwargs or {})
    copies, named_copies = each_tensor(torch.clone, (inputs, named))
    with torch.no_grad():
        reference = q(*copies, **named_copies)
    compiled = compile_once(q, inputs, kwargs=named, mode=mode, options=options)
    again = compiled.run(*inputs, **named)
    for key, before in (*enumerate(copies), *named_copies.items()):
        after = named[key] if isinstance(key, str) else inputs[key]
        if isinstance(before, torch.Tensor):
            assert torch.equal(before, after), f"input {key} was written to"
    for call, outputs in (("first", compiled.outputs), ("second", again)):
        assert_same(outputs, reference, step=step, min_snr=min_snr, where=f"{call} call, ")
    return compiled


def assert_same(
    actual: Any, reference: Any, *, step: float | None = None, min_snr: float | None = None, where: str = ""
) -> None:
    """The comparison of `assert_close_to_reference` on given outputs, in any nesting of tuples, lists and dicts.

    Example:
        >>> testing.assert_same(torch.tensor([1.0]), torch.tensor([1.1]), where="my model, ")
        Traceback (most recent call last):
            ...
        AssertionError: my model, output 0: more than float rounding (1.1e-05): largest difference 0.1, ...
    """
    left, right = (torch.utils._pytree.tree_leaves(x) for x in (actual, reference))
    assert len(left) == len(right), f"{where}{len(left)} outputs, the reference has {len(right)}"
    for position, (mine, theirs) in enumerate(zip(left, right, strict=True)):
        if not isinstance(theirs, torch.Tensor):
            assert mine == theirs, f"{where}output {position} is {mine!r}, the reference {theirs!r}"
            continue
        problem = _difference(mine, theirs, step, min_snr)
        assert problem is None, f"{where}output {position}: {problem}"


def _difference(actual: torch.Tensor, reference: torch.Tensor, step: float | None, min_snr: float | None) -> str | None:
    """What is wrong with `actual`, None where nothing is."""
    described = (
        f"{actual.dtype} of shape {tuple(actual.shape)}, the reference {reference.dtype} of {tuple(reference.shape)}"
    )
    if actual.dtype != reference.dtype or actual.shape != reference.shape:
        return described
    if not reference.numel():
        return None
    ratio = snr(actual, reference)
    error = (actual.double() - reference.double()).abs()
    text = f"largest difference {error.max():.4g}, signal-to-noise ratio {ratio:.1f} dB, {described}"
    if min_snr is not None:
        return None if ratio >= min_snr else f"below {min_snr} dB: {text}"
    if not reference.dtype.is_floating_point:
        step = 1.0
    few = max(1, reference.numel() // 100)
    rounding = 0.0 if not reference.dtype.is_floating_point else _rounding(reference)
    if step is None:
        return None if bool((error <= rounding).all()) else f"more than float rounding ({rounding:.3g}): {text}"
    differing = int((error > rounding).sum())
    if not bool((error <= step + rounding).all()):
        return f"more than one step ({step:.4g}): {text}"
    return (
        None
        if differing <= few
        else f"{differing} of {reference.numel()} elements differ by a step, at most {few} may: {text}"
    )


def _rounding(reference: torch.Tensor) -> float:
    """What a sum in another order, rounded once to the output's type, may differ by."""
    largest = reference.double().abs().max().item()
    return largest * max(1e-5, 2 * torch.finfo(reference.dtype).eps if reference.itemsize == 2 else 0.0)
