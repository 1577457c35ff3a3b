"""A call absorbs what stands behind it: an activation, an addition, the quantize of its output."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import fx

from inductor_x86q.graph import aliasing, operators, qdq
from inductor_x86q.graph.calls import Binary, Call, Unary, absorb, is_call, read, with_output
from inductor_x86q.graph.reasons import No
from inductor_x86q.inductor import fake_tensors
from inductor_x86q.passes.stage import Rule

aten = torch.ops.aten


def spelled(node: fx.Node) -> Unary:
    """The activation as the kernels spell it."""
    (post,) = operators.post_operations(node)
    arguments = qdq.schema_arguments(node)
    scalars = tuple(float(arguments[name]) for name in post.scalars)
    return Unary(post.name, scalars, arguments[post.algorithm] if post.algorithm else "")


def accepts(call: Call, unary: Unary) -> bool:
    """Whether the call's kernel can end in this activation."""
    return unary.name == "none" or operators.takes(call.kernel, unary.name, after_addition=call.binary is not None)


def _absorbable(node: fx.Node) -> Call | No:
    """The call behind `node` if it may still absorb its only user."""
    if not is_call(node):
        return No(f"its input is {operators.name(node)}, not a fused call", (node,))
    if len(node.users) != 1:
        return No(f"the call's result has {len(node.users)} users", tuple(node.users))
    call = read(node)
    if call.has_int8_output:
        return No("the call's result is already quantized", (node,))
    return call


# --- activations ------------------------------------------------------------------------------------------------------


def _find_unary(node: fx.Node) -> Call | No:
    source = qdq.operand(node)
    call = _absorbable(source)
    if isinstance(call, No):
        return call
    unary = spelled(node)
    merged = _merge(call.unary, unary)
    if merged is None:
        return No(f"the call already ends in {call.unary.name}", (source,))
    if not accepts(call, merged):
        behind = " after an addition" if call.binary else ""
        return No(f"the {call.kernel} kernel does not take {unary.name}{behind}", (source,))
    return dataclasses.replace(call, unary=merged)


def _merge(first: Unary, second: Unary) -> Unary | None:
    """One post-operation that does both; None if there is none."""
    if first.name == "none":
        return second
    bounds, further = _bounds(first), _bounds(second)
    if bounds is None or further is None:
        return None
    (low, high), (low2, high2) = bounds, further
    clip = min(max(low, low2), high2), max(min(high, high2), low2)
    return Unary("relu") if clip == (0.0, math.inf) else Unary("hardtanh", clip)


def _bounds(unary: Unary) -> tuple[float, ...] | None:
    """What the post-operation clips to; None where it does something else."""
    return (0.0, math.inf) if unary.name == "relu" else unary.scalars if unary.name == "hardtanh" else None


def _rewrite_unary(node: fx.Node, call: Call) -> fx.Node:
    return absorb(node.args[0], call, at=node)


# --- addition ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Sum:
    source: fx.Node
    call: Call  # that of `source`, with the other operand added
    in_place: bool  # whether that may write into the other operand's memory


def _find_addition(node: fx.Node) -> _Sum | No:
    arguments = qdq.schema_arguments(node)
    if arguments.get("alpha", 1) != 1:
        return No(f"it scales its second operand by alpha={arguments['alpha']}")
    operands = node.all_input_nodes
    if len(operands) != 2:
        return No("it does not add two different tensors")
    if not fake_tensors.same_shape(*(qdq.value(operand).shape for operand in operands)):
        return No("it broadcasts", tuple(operands))
    # Of two calls the later one takes the sum: the earlier one's result is the accumulator.
    earlier, later = sorted(operands)
    found = _added(node, later, earlier)
    if not isinstance(found, No):
        return found
    instead = _added(node, earlier, later)
    return found if isinstance(instead, No) and is_call(later) else instead


def _added(node: fx.Node, source: fx.Node, other: fx.Node) -> _Sum | No:
    """The call of `source` with `other` added."""
    call = _absorbable(source)
    if isinstance(call, No):
        return call
    if call.binary or call.unary.name != "none":
        return No(f"the call already ends in {call.binary.kind if call.binary else call.unary.name}", (source,))
    if not operators.takes(call.kernel, "sum"):
        return No(f"the {call.kernel} kernel takes no addition", (source,))
    return _find_accumulator(node, source, call, other)


def _find_accumulator(node: fx.Node, source: fx.Node, call: Call, other: fx.Node) -> _Sum | No:
    quantized = _quantized_output(node)
    if qdq.is_dequantize(other) and quantized is not None:
        parameters = qdq.qparams(other)
        dtypes = {parameters.dtype, quantized.dtype, qdq.value(call.x).dtype}  # one only: see _find_quantize
        if parameters.is_static and parameters.axis is None and len(dtypes) == 1:
            integers = qdq.operand(other)
            binary = Binary("sum", integers, parameters.scale, parameters.zero_point)
            # A kernel that reads its input while it overwrites it would read its own results.
            apart = aliasing.base(integers) is not aliasing.base(call.x)
            in_place = apart and bool(aliasing.may_overwrite(integers, after=node))
            return _Sum(source, dataclasses.replace(call, binary=binary), in_place)
    dtype = qdq.value(other).dtype
    if qdq.is_dequantize(other):
        return No("its other operand is int8 and its own result is not: left to one generated kernel", (other,))
    if call.output_dtype == torch.bfloat16 and dtype == qdq.value(node).dtype == torch.float32:
        call = dataclasses.replace(call, output_dtype=dtype)  # the sum would be widened, so its terms need no rounding
    if dtype != call.output_dtype or qdq.value(node).dtype != dtype:
        return No(f"it adds {dtype} to {call.output_dtype}", (other,))
    int8_result = No("it is float, and the result int8", (other,))
    free = aliasing.may_overwrite(other, after=node) if quantized is None else int8_result
    if free:
        return _Sum(source, dataclasses.replace(call, binary=Binary("sum", other)), True)
    if operators.takes(call.kernel, "add"):
        return _Sum(source, dataclasses.replace(call, binary=Binary("add", other)), True)
    return No(f"a convolution's sum overwrites the accumulator, which it may not here: {free.why}", free.nodes)


def _quantized_output(node: fx.Node) -> qdq.QParams | None:
    """The parameters by which the sum `node`, or the relu behind it, is quantized; None if it stays float."""
    user = qdq.only_user(node)
    if user is not None and user.target is aten.relu.default:
        user = qdq.only_user(user)
    if user is None or user.target is not qdq.QUANTIZE:
        return None
    parameters = qdq.qparams(user)
    return parameters if parameters.dtype in qdq.INT8_TYPES else None


def _rewrite_addition(node: fx.Node, found: _Sum) -> fx.Node:
    call, binary = found.call, found.call.binary
    if binary is not None and not found.in_place:
        # Not aten.clone: Inductor drops one whose source it does not know to be overwritten.
        whole = torch.iinfo(qdq.value(binary.other).dtype)
        copy = qdq.call(aten.clamp.default, binary.other, whole.min, whole.max, like=node)
        call = dataclasses.replace(call, binary=dataclasses.replace(binary, other=copy))
    return absorb(found.source, call, at=node)


# --- quantize ---------------------------------------------------------------------------------------------------------


def _find_quantize(node: fx.Node) -> Call | No:
    call = _absorbable(qdq.operand(node))
    if isinstance(call, No):
        return call
    parameters = qdq.qparams(node)
    if parameters.dtype not in qdq.INT8_TYPES:
        return No(f"it quantizes to {parameters.dtype}")
    input_dtype = qdq.value(call.x).dtype
    if parameters.dtype != input_dtype:
        # The kernel would do it, but Inductor gives an int8 output the type of the input.
        return No(f"the call reads {input_dtype}, and Inductor knows no other int8 type for its output", (call.x,))
    if not (math.isfinite(parameters.scale) and parameters.scale > 0):
        return No(f"its scale is {parameters.scale}")
    info = torch.iinfo(parameters.dtype)
    if not info.min <= parameters.zero_point <= info.max:
        return No(f"its zero point is {parameters.zero_point}, outside of {parameters.dtype}")
    if parameters.quant_min > parameters.quant_max:
        return No(f"its range is empty: {parameters.quant_min} to {parameters.quant_max}")
    if call.binary and call.binary.kind == "sum":
        dtype = qdq.value(call.binary.other).dtype
        if dtype != parameters.dtype:
            return No(f"the call adds in place into {dtype}", (call.binary.other,))
    return with_output(call, parameters)


def _rewrite_quantize(node: fx.Node, call: Call) -> fx.Node:
    parameters = qdq.qparams(node)
    if parameters.is_full_range:
        return absorb(node.args[0], call, at=node)
    # The kernel saturates at the type's bounds; a narrower range is a clip of the real value, or of the integers.
    low = (parameters.quant_min - parameters.zero_point) * parameters.scale
    high = (parameters.quant_max - parameters.zero_point) * parameters.scale
    merged = _merge(call.unary, Unary("hardtanh", (low, high)))
    if merged is not None and accepts(call, merged):
        return absorb(node.args[0], dataclasses.replace(call, unary=merged), at=node)
    new = absorb(node.args[0], call, at=node)
    return qdq.call(aten.clamp.default, new, parameters.quant_min, parameters.quant_max, like=new)


# --- relu that a quantize does by itself ------------------------------------------------------------------------------


def _find_implied_relu(node: fx.Node) -> fx.Node | No:
    relu = qdq.operand(node)
    if relu.target is not aten.relu.default or len(relu.users) != 1:
        return No("it quantizes no relu of one user", (relu,))
    parameters = qdq.qparams(node)
    if parameters.zero_point != parameters.quant_min:
        return No("its lower bound does not stand for 0")
    call = _absorbable(qdq.operand(relu))
    if isinstance(call, No):
        return call
    return relu if not accepts(call, Unary("relu")) else No("the kernel takes the relu")


def _rewrite_implied_relu(node: fx.Node, relu: fx.Node) -> None:
    """quantize(relu(x)) is quantize(x) where the smallest integer stands for 0: what is below saturates there."""
    node.replace_input_with(relu, qdq.operand(relu))
    qdq.erase_dead(relu)


RULES = (
    Rule("implied relu", (qdq.QUANTIZE,), _find_implied_relu, _rewrite_implied_relu),
    Rule("activation", operators.UNARIES, _find_unary, _rewrite_unary),
    Rule("addition", (aten.add.Tensor,), _find_addition, _rewrite_addition),
    Rule("quantized output", (qdq.QUANTIZE,), _find_quantize, _rewrite_quantize),
)
