"""The generate stage, for max-autotune: a call that a kernel of ours could replace brings along what that one needs."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import fx

from inductor_x86q import cpu
from inductor_x86q.graph import calls, qdq
from inductor_x86q.graph.library import GENERATED
from inductor_x86q.graph.reasons import No
from inductor_x86q.inductor import configuration, fake_tensors
from inductor_x86q.inductor.lowering import layer as layers
from inductor_x86q.kernels.convolution import Convolution, Epilogue, Numbers
from inductor_x86q.passes.stage import Rule


@dataclasses.dataclass(frozen=True)
class _Layer:
    """All that a generated kernel needs to be known of a call when compiling."""

    weight: torch.Tensor
    numbers: Numbers
    convolution: Convolution
    epilogue: Epilogue


def _find(node: fx.Node) -> Any:
    if not configuration.is_autotuning():
        return No('the mode is not "max-autotune"')
    if not configuration.keeps_constants():
        return No("no kernel is generated with the option always_keep_tensor_constants=False")
    if not cpu.int8_lanes():
        return No("this CPU has no AVX2")
    call = calls.read(node)
    weight = qdq.constant(call.weight.args[0])
    if weight is None or (call.family == "conv" and weight.dim() != 4):
        return No(f"no kernel is generated for a {call.kernel}")
    x, output = qdq.value(call.x), qdq.value(node)
    if not all(isinstance(size, int) for size in (*x.shape, *output.shape)):
        return No("a size is not known when compiling")
    n, c, h, w = x.shape if call.family == "conv" else (1, x.shape[-1], 1, x.shape[:-1].numel())
    kernel = weight.shape[2:] if call.family == "conv" else (1, 1)
    convolution = layers.describe(call, (n, h, w, c), output.shape, kernel, x.dtype)
    other_dtype = qdq.value(call.binary.other).dtype if call.binary else None
    if why := layers.obstacle(call, convolution, other_dtype):
        return No(f"no kernel is generated for {why}")
    weight, numbers = weight.reshape(*weight.shape[:2], *convolution.kernel), _numbers(call)
    if not (call.output_dtype == torch.float32 or convolution.largest_step(weight, numbers) < 2**30):
        return No("no kernel is generated for an output scale so small beside those of input and weight")
    return _Layer(weight, numbers, convolution, layers.epilogue(call, other_dtype))


def _numbers(call: calls.Call) -> Numbers:
    scale, binary = qdq.constant(call.weight_scale), call.binary
    assert scale is not None
    return Numbers(
        *(call.x_scale, call.x_zero_point, scale, qdq.constant(call.bias)),
        *(call.output_scale, call.output_zero_point),
        *((binary.scale, binary.zero_point) if binary else (1.0, 0)),
        tuple(float(value) for value in call.unary.scalars),
    )


def _rewrite(node: fx.Node, layer: _Layer) -> fx.Node:
    """call(…) → the operator that stands for it(numbers and packed weight, kernel size, …)"""
    from inductor_x86q.inductor.lowering import choice as lowering  # noqa: F401  registers with Inductor, which is slow to import

    convolution = layer.convolution
    constants = qdq.new_constant(convolution.constants(layer.weight, layer.numbers, layer.epilogue), like=node)
    target = GENERATED[node.target]
    new = node.graph.call_function(target, (constants, list(convolution.kernel), *node.args))
    new.meta.update(node.meta)
    return new


RULES = (Rule("generated kernel", tuple(GENERATED), _find, _rewrite),)


def calls_left(graph: fx.Graph) -> list[tuple[fx.Node, str]]:
    """The calls that no generated kernel may replace, and why; none but in mode "max-autotune"."""
    if not configuration.is_autotuning():
        return []
    left = [node for node in graph.nodes if calls.is_call(node)]
    dynamic = No("its scales are computed at run time")
    with fake_tensors.disable_modes():  # as rules are run
        return [(node, (_find(node) if node.target in GENERATED else dynamic).why) for node in left]
