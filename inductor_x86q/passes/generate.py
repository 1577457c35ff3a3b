"""The generate stage: a call that a kernel of ours may replace brings along what that one needs, specified here once.

It is chosen here too, by the cost model, or in mode "max-autotune" in lowering, by the time that its few best and the call
take. Lowering adds where tensors lie.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from inductor_x86q import cpu
from inductor_x86q.graph import calls, per_token, qdq
from inductor_x86q.graph.library import GENERATED, STANDS_FOR
from inductor_x86q.graph.operators import CONVERT
from inductor_x86q.graph.reasons import No
from inductor_x86q.inductor import configuration, fake_tensors, objects
from inductor_x86q.kernels import cost
from inductor_x86q.kernels.convolution import Convolution, Depth
from inductor_x86q.kernels.epilogue import ACTIVATIONS, CPP_TYPES, Epilogue, Numbers
from inductor_x86q.kernels.specification import Specification
from inductor_x86q.passes.stage import Rule


@dataclasses.dataclass(frozen=True)
class _Layer:
    """All that a kernel needs to be known of a call when compiling."""

    weight: torch.Tensor
    numbers: Numbers
    specification: Specification


def unavailable() -> str:
    """Why no kernel of ours can be used at all; empty where they can."""
    if not configuration.keeps_constants():
        return "no kernel is generated with the option always_keep_tensor_constants=False"
    return "" if cpu.int8_lanes() else "this CPU has no AVX2"


def _find(node: fx.Node) -> _Layer | No:
    if why := unavailable():
        return No(why)
    call = calls.read(node)
    weight = qdq.constant(call.weight.args[0])
    if weight is None:
        return No("its weight is not known when compiling")
    if not isinstance(qdq.value(call.x).shape[1 if call.family == "conv" else -1], int):
        return No("its number of channels is not known when compiling")
    if why := _obstacle(call):
        return No(f"no kernel is generated for {why}")
    epilogue = _epilogue(call)
    convolution = cost.widest(_convolution(call, weight), epilogue)
    depth = () if convolution.depth == Depth() else (convolution.depth.kernel,)
    weight, numbers = weight.reshape(*weight.shape[:2], *depth, *convolution.kernel), _numbers(call)
    if epilogue.is_integer and call.is_static and not (convolution.largest_step(weight, numbers) < 2**30):
        return No("no kernel is generated for an output scale so small beside those of input and weight")
    specification = Specification(convolution, epilogue)
    if specification.is_call and not call.is_per_token and not _is_timed(call.x):
        return No("oneDNN is expected to be faster")
    return _Layer(weight, numbers, specification)


def _convolution(call: calls.Call, weight: torch.Tensor) -> Convolution:
    """The convolution that a call is; a linear is one of 1×1 on its rows."""
    x = qdq.value(call.x)
    is_conv = call.family == "conv"
    n, c, *planes, h, w = map(_example, x.shape if is_conv else (1, x.shape[-1], 1, math.prod(x.shape[:-1])))
    kernel = weight.shape[2:] if is_conv else (1, 1)
    stride, padding, dilation, groups = call.geometry if is_conv else ((1, 1), (0, 0), (1, 1), 1)
    depth = Depth()
    if planes:
        # No kernel that is written for one plane takes more of them.
        size = planes[0] if isinstance(x.shape[2], int) else max(planes[0], 2)
        depth = Depth(size, *(int(values[0]) for values in (kernel, stride, padding, dilation)))
    found = Convolution(
        n=n,
        h=h,
        w=w,
        c=c,
        out_c=weight.shape[0],
        kernel=_pair(kernel[-2:]),
        stride=_pair(stride[-2:]),
        padding=_pair(padding[-2:]),
        dilation=_pair(dilation[-2:]),
        groups=groups,
        lanes=8,
        x_signed=x.dtype == torch.int8,
        fits_16=not cpu.has_vnni(),
        depth=depth,
    )
    return dataclasses.replace(found, threads=configuration.threads(found.macs, configuration.MACS_PER_THREAD))


# What an open size is taken for where there is no example of it.
TYPICAL_SIZE = 8


def _example(size: Any) -> int:
    return fake_tensors.example(size, TYPICAL_SIZE)


def _epilogue(call: calls.Call) -> Epilogue:
    return Epilogue(call.output_dtype, _activation(call), _other_dtype(call), dynamic=not call.is_static)


def _pair(values: Sequence[int]) -> tuple[int, int]:
    vertical, horizontal = values
    return int(vertical), int(horizontal)


def _activation(call: calls.Call) -> str:
    """A call's activation as kernels name it."""
    unary = call.unary
    return f"gelu_{'tanh' if unary.algorithm == 'tanh' else 'erf'}" if unary.name == "gelu" else unary.name


def _other_dtype(call: calls.Call) -> torch.dtype | None:
    return qdq.value(call.binary.other).dtype if call.binary else None


def _obstacle(call: calls.Call) -> str:
    """Why no kernel of ours computes the layer; empty where one does."""
    for dtype, what in ((call.output_dtype, "an output"), (_other_dtype(call), "an addition")):
        if dtype is not None and dtype not in CPP_TYPES:
            return f"{what} of {dtype}"
    return "" if _activation(call) in ACTIVATIONS else f"the activation {call.unary.name}"


def _numbers(call: calls.Call) -> Numbers:
    """Of a layer; an input's scale and zero point that are computed at run time are arguments instead."""
    scale, binary = qdq.constant(call.weight_scale), call.binary
    assert scale is not None
    x_scale, x_zero_point = (call.x_scale, call.x_zero_point) if call.is_static else (1.0, 0)
    return Numbers(
        *(x_scale, x_zero_point, scale, qdq.constant(call.bias)),
        *(call.output_scale, call.output_zero_point),
        *((binary.scale, binary.zero_point) if binary else (1.0, 0)),
        tuple(float(value) for value in call.unary.scalars),
    )


def _rewrite(node: fx.Node, layer: _Layer) -> fx.Node:
    """call(…) → the operator that stands for it(numbers and packed weight, what they are for, …)"""
    from inductor_x86q.inductor.lowering import choice  # noqa: F401  registers with Inductor, which is slow to import

    given = layer.specification
    objects.start(given.kernels if _is_timed(node.args[0]) else given.kernels[:1])
    packed = given.convolution.constants(layer.weight, layer.numbers, given.epilogue)
    constants = qdq.new_constant(packed, like=node)
    arguments = [*node.args]
    if given.epilogue.dynamic:
        arguments[1:3] = _converted(node.args[1], torch.float32, node), _converted(node.args[2], torch.int32, node)
    new = node.graph.call_function(GENERATED[node.target], (constants, given.text(), *arguments))
    new.meta.update(node.meta)
    return new


def _converted(x: Any, dtype: torch.dtype, like: fx.Node) -> fx.Node:
    """The tensor in the type in which kernels read it."""
    if qdq.value(x).dtype == dtype:
        return x
    constant = qdq.constant(x)
    return (
        qdq.call(CONVERT, x, dtype, like=like) if constant is None else qdq.new_constant(constant.to(dtype), like=like)
    )


def choice(node: fx.Node) -> tuple[str, str]:
    """What computes an operator that stands for a call, and why that."""
    given = Specification.read(str(node.args[1]))
    has_call = STANDS_FOR[node.target] not in per_token.TARGETS
    choices: list[cost.Choice] = [*given.kernels, *([cost.ONEDNN] if has_call else [])]
    names = [getattr(choice, "name", "oneDNN") for choice in choices]
    if _is_timed(node.args[2]):
        return "the fastest", f"timed when it is compiled: {', '.join(names)}"
    best, *others = (cost.microseconds(choice, given.convolution) for choice in choices)
    slower = ", ".join(f"{name} {time:.1f}" for name, time in zip(names[1:], others, strict=True))
    return names[0], f"computed by {names[0]}, expected to take {best:.1f} µs{f'; {slower}' if slower else ''}"


def _is_timed(x: Any) -> bool:
    """Whether lowering times what may compute a layer of `x`; what is best for one size is not for another."""
    return configuration.is_autotuning() and all(isinstance(size, int) for size in qdq.value(x).shape)


RULES = (Rule("generated kernel", tuple(GENERATED), _find, _rewrite),)


def calls_left(graph: fx.Graph) -> list[tuple[fx.Node, str]]:
    """The calls that no kernel of ours may replace, and why."""
    left = [node for node in graph.nodes if calls.is_call(node)]
    with fake_tensors.disable_modes():  # as rules are run
        reasons = {node: _find(node) for node in left}
    return [(node, reason.why) for node, reason in reasons.items() if isinstance(reason, No)]
