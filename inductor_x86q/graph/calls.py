"""One typed view of the four onednn operators that the fuse stage builds, and of ours for rows that have scales of their own.

`qconv_pointwise`, `qconv2d_pointwise.binary`, `qlinear_pointwise` and `qlinear_pointwise.binary` take the same things
under other names and in another order. The rules see a `Call`; this file alone knows the schemas.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from inductor_x86q.graph import operators, per_token, qdq
from inductor_x86q.graph.qdq import QParams

onednn = torch.ops.onednn


@dataclasses.dataclass(frozen=True)
class Unary:
    """A post-operation as the kernels name it."""

    name: str = "none"
    scalars: tuple[Any, ...] = ()
    algorithm: str = ""


@dataclasses.dataclass(frozen=True)
class Binary:
    """An addition inside the call. `sum` writes into `other`'s memory, `add` does not."""

    kind: str
    other: fx.Node
    scale: float = 1.0
    zero_point: int = 0


@dataclasses.dataclass(frozen=True)
class Call:
    """A quantized convolution or linear: int8 input and weight, int8, fp32 or bf16 output."""

    family: str  # "conv" or "linear"
    x: fx.Node
    x_scale: Any
    x_zero_point: Any
    weight: fx.Node  # packed
    weight_scale: fx.Node
    weight_zero_point: fx.Node
    bias: fx.Node | None
    geometry: tuple[Any, ...]  # stride, padding, dilation, groups of a convolution
    output_dtype: torch.dtype
    output_scale: float = 1.0
    output_zero_point: int = 0
    unary: Unary = Unary()
    binary: Binary | None = None
    # Scale and zero point are tensors, of one element for each row; zero points may be one for all.
    is_per_token: bool = False

    @property
    def kernel(self) -> str:
        """Which of the library's kernels it is, as the tables of post-operations know them."""
        return f"conv{len(self.geometry[0])}d" if self.family == "conv" else self.family

    @property
    def has_int8_output(self) -> bool:
        return self.output_dtype in qdq.INT8_TYPES

    @property
    def is_static(self) -> bool:
        return isinstance(self.x_scale, (int, float))


_TARGETS: dict[tuple[str, bool, str], Any] = {
    # family, has a binary post-op, scale and zero point of the input
    ("conv", False, "static"): onednn.qconv_pointwise.default,
    ("conv", False, "per_tensor"): onednn.qconv_pointwise.tensor,
    ("conv", True, "static"): onednn.qconv2d_pointwise.binary,
    ("conv", True, "per_tensor"): onednn.qconv2d_pointwise.binary_tensor,
    ("linear", False, "static"): onednn.qlinear_pointwise.default,
    ("linear", False, "per_tensor"): onednn.qlinear_pointwise.tensor,
    ("linear", False, "per_token"): per_token.LINEAR,
    ("linear", True, "static"): onednn.qlinear_pointwise.binary,
    ("linear", True, "per_tensor"): onednn.qlinear_pointwise.binary_tensor,
    ("linear", True, "per_token"): per_token.LINEAR_WITH_ADDITION,
}
_KINDS = {target: kind for kind, target in _TARGETS.items()}
TARGETS: tuple[Any, ...] = tuple(_KINDS)


def is_call(node: Any) -> bool:
    return isinstance(node, fx.Node) and node.target in _KINDS


def read(node: fx.Node) -> Call:
    """The call that `node` makes."""
    return parse(node.target, node.args)


def parse(target: Any, arguments: Sequence[Any]) -> Call:
    """The call of `target` with these arguments."""
    family, has_binary, mode = _KINDS[target]
    values: list[Any] = list(arguments)
    x, x_scale, x_zero_point, weight, weight_scale, weight_zero_point, *values = values
    other: Any = values.pop(0) if has_binary else None
    bias = values.pop(0)
    geometry, values = (tuple(values[:4]), values[4:]) if family == "conv" else ((), values)
    scale, zero_point, dtype, *values = values
    binary = None
    if has_binary:
        other_scale, other_zero_point, kind, _alpha, *values = values
        binary = Binary(kind, other, other_scale, other_zero_point)
    name, scalars, algorithm = values
    unary = Unary(name, tuple(scalars), algorithm)
    return Call(
        *(family, x, x_scale, x_zero_point, weight, weight_scale, weight_zero_point),
        *(bias, geometry, dtype, scale, zero_point, unary, binary),
        is_per_token=mode == "per_token",
    )


def emit(call: Call, *, like: fx.Node) -> fx.Node:
    """A node that makes `call`, at the graph's insertion point; its value has `like`'s shape and strides."""
    binary = call.binary
    arguments = [
        *(call.x, call.x_scale, call.x_zero_point, call.weight, call.weight_scale, call.weight_zero_point),
        *((binary.other,) if binary else ()),
        call.bias,
        *call.geometry,
        *(call.output_scale, call.output_zero_point, call.output_dtype),
        *((binary.scale, binary.zero_point, binary.kind, 1.0) if binary else ()),
        *(call.unary.name, list(call.unary.scalars), call.unary.algorithm),
    ]
    mode = "static" if call.is_static else "per_token" if call.is_per_token else "per_tensor"
    target = _TARGETS[call.family, binary is not None, mode]
    node = like.graph.call_function(target, tuple(arguments))
    qdq.copy_origin(node, like)
    fake = qdq.value(like)
    node.meta["val"] = fake if fake.dtype == call.output_dtype else fake.to(call.output_dtype)
    return node


def absorb(old: Any, call: Call, *, at: fx.Node) -> fx.Node:
    """A node that makes `call`, which computes `at` from the arguments of `old`.

    It keeps the origin of `old`, the convolution or linear, and remembers what else it stands for.
    """
    node = emit(call, like=at)
    qdq.copy_origin(node, old)
    node.meta["x86q_absorbed"] = [*old.meta.get("x86q_absorbed", ()), operators.name(at)]
    node.meta["x86q_macs"] = old.meta.get("x86q_macs")
    return node


def with_output(call: Call, parameters: QParams) -> Call:
    """The call with an int8 output."""
    dtype, scale, zero_point = parameters.dtype, parameters.scale, parameters.zero_point
    return dataclasses.replace(call, output_dtype=dtype, output_scale=scale, output_zero_point=zero_point)
