"""Calls give a type that this CPU has a kernel for.

Under autocast calls give bfloat16, and other rules see nothing else. A CPU without bf16 instructions has the reference
kernels for that only, tens of times slower: there a call gives float32, and what reads it a conversion.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import fx

from inductor_x86q import _cpu, qgraph
from inductor_x86q.passes.fuse.call import TARGETS, Call, emit, is_call, read
from inductor_x86q.passes.stage import No, Rule

CONVERT = torch.ops.prims.convert_element_type.default


def _find_bf16(node: fx.Node) -> Any:
    call = read(node)
    if call.output_dtype != torch.bfloat16:
        return No(f"the call gives {call.output_dtype}")
    return No("this CPU has bf16 kernels") if _cpu.has_bf16() else call


def _rewrite_bf16(node: fx.Node, call: Call) -> fx.Node:
    """call to bf16 → bf16(call to fp32), an accumulator likewise"""
    binary = call.binary
    if binary is not None and qgraph.value(binary.other).dtype == torch.bfloat16:
        other = qgraph.call(CONVERT, binary.other, torch.float32, like=binary.other)
        binary = dataclasses.replace(binary, other=other)
    new = emit(dataclasses.replace(call, output_dtype=torch.float32, binary=binary), like=node)
    new.meta.update({key: value for key, value in node.meta.items() if key.startswith("x86q_")})
    new.meta["x86q_float32_for_bf16"] = True
    return qgraph.call(CONVERT, new, torch.bfloat16, like=node)


def _find_there_and_back(node: fx.Node) -> Any:
    rounded: Any = node.args[0]
    if node.args[1] != torch.float32 or rounded.target is not CONVERT:
        return No("it widens no rounded value")
    call: Any = rounded.args[0]
    if not is_call(call) or not call.meta.get("x86q_float32_for_bf16"):
        return No("what was rounded is no call that would give bf16 elsewhere")
    return call


def _rewrite_there_and_back(node: fx.Node, call: fx.Node) -> fx.Node:
    """fp32(bf16(call to fp32)) is the call"""
    return call


RULES = (
    Rule("float32 where bf16 has no kernel", TARGETS, _find_bf16, _rewrite_bf16),
    Rule("float32 to bf16 and back", (CONVERT,), _find_there_and_back, _rewrite_there_and_back),
)
