"""Calls give, and add, types that this CPU has kernels for.

Under autocast calls give bfloat16, and other rules see nothing else. A CPU without bf16 instructions has the reference
kernels for that only, tens of times slower, and none that adds bfloat16 to an int8 result: there a call gives and adds
float32, and conversions stand around it. For float16 it is so on every CPU: no convolution gives it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from inductor_x86q import cpu
from inductor_x86q.graph import qdq
from inductor_x86q.graph.calls import TARGETS, Call, emit, is_call, read
from inductor_x86q.graph.operators import CONVERT
from inductor_x86q.graph.reasons import No
from inductor_x86q.passes.stage import Rule

# The types that calls need not have kernels for, and whether they have.
HAS_KERNELS: dict[torch.dtype, Callable[[], bool]] = {
    torch.bfloat16: lambda: cpu.has_bf16(),
    torch.float16: lambda: False,
}


def _lacks_kernels(dtype: torch.dtype) -> bool:
    return dtype in HAS_KERNELS and not HAS_KERNELS[dtype]()


def _find_unsupported(node: fx.Node) -> Any:
    call = read(node)
    added = call.binary and qdq.value(call.binary.other).dtype
    if _lacks_kernels(call.output_dtype) or (added and _lacks_kernels(added)):
        return call
    return No(f"this CPU has kernels that give {call.output_dtype}{f' and add {added}' if added else ''}")


def _rewrite_unsupported(node: fx.Node, call: Call) -> fx.Node:
    """call to bf16 → bf16(call to fp32), what it adds likewise"""
    binary, dtype = call.binary, call.output_dtype
    if binary is not None and _lacks_kernels(qdq.value(binary.other).dtype):
        other = qdq.call(CONVERT, binary.other, torch.float32, like=binary.other)
        binary = dataclasses.replace(binary, other=other)
    widened = torch.float32 if _lacks_kernels(dtype) else dtype
    new = emit(dataclasses.replace(call, output_dtype=widened, binary=binary), like=node)
    new.meta.update({key: value for key, value in node.meta.items() if key.startswith("x86q_")})
    if widened == dtype:
        return new
    new.meta["x86q_float32_for"] = dtype
    return qdq.call(CONVERT, new, dtype, like=node)


def _find_there_and_back(node: fx.Node) -> Any:
    rounded: Any = node.args[0]
    if node.args[1] != torch.float32 or rounded.target is not CONVERT:
        return No("it widens no rounded value")
    call: Any = rounded.args[0]
    if not is_call(call) or call.meta.get("x86q_float32_for") != rounded.args[1]:
        return No("what was rounded is no call that would give that type elsewhere")
    # Only one of them may read the call's memory: the sum that is written there, or what may come after it.
    if any(_sums_into(user, node) for user in node.users) and len(call.users) > 1:
        return No("a sum is written into it, and the call's result is read elsewhere")
    if any(_sums_into(user, call) for user in call.users):
        return No("a sum is written into the call's result")
    return call


def _sums_into(user: fx.Node, node: fx.Node) -> bool:
    binary = read(user).binary if is_call(user) else None
    return binary is not None and binary.kind == "sum" and binary.other is node


def _rewrite_there_and_back(node: fx.Node, call: fx.Node) -> fx.Node:
    """fp32(bf16(call to fp32)) is the call"""
    return call


RULES = (
    Rule("float32 where 16 bits have no kernel", TARGETS, _find_unsupported, _rewrite_unsupported),
    Rule("float32 to 16 bits and back", (CONVERT,), _find_there_and_back, _rewrite_there_and_back),
)
