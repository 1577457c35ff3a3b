"""What became of every convolution, linear and q/dq node, and why."""

from __future__ import annotations

import dataclasses
import enum
from typing import Any

import torch
from torch import fx


class Reason(enum.Enum):
    """Why a layer does not run in int8; the value says what to change."""

    NOT_QUANTIZED = "no quantize/dequantize stands at its inputs: it was excluded, or the quantizer left it out"
    NO_KERNEL = "torch has no int8 kernel for it"
    ACTIVATION_NOT_QUANTIZED = "its weight is quantized, its input is not: put quantize and dequantize in front of it"
    WEIGHT_NOT_QUANTIZED = "its input is quantized, its weight is not: quantize the weight to int8 per channel"
    WEIGHT_NOT_CONSTANT = "its weight is not known when compiling: pass it as a parameter or buffer, not as an input"
    WEIGHT_TYPE = "its weight is not symmetric int8 with one scale a tensor or output channel: quantize it so"
    ACTIVATION_TYPE = "its input is not uint8 or int8 with one scale for the tensor: quantize it so"
    BAD_PARAMETERS = "a scale or zero point is not usable: calibrate again, with data that reaches this layer"
    SATURATES = (
        "this CPU has no VNNI and adds pairs of 8-bit products in 16 bits, which can overflow: quantize with "
        "reduce_range=True on this machine"
    )
    QUANTIZE_LEFT = "no kernel absorbed it; it runs as a generated kernel of its own"


@dataclasses.dataclass(frozen=True)
class Obstacle:
    """A reason, and what was found in this case."""

    reason: Reason
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.reason.value}{f' ({self.detail})' if self.detail else ''}"


@dataclasses.dataclass(frozen=True)
class Fusion:
    """An int8 kernel and what it stands for. Shapes are strings where a size is not known when compiling."""

    layer: str  # the module's path in the model
    kernel: str  # e.g. onednn.qconv_pointwise
    operator: str  # "conv" or "linear"
    absorbed: tuple[str, ...]  # the operators behind it that the call does too, in order
    input_dtype: str
    weight_dtype: str
    output_dtype: str
    output_shape: tuple[Any, ...]
    macs: int | None
    source: str = ""  # the line in the model's source, where known


@dataclasses.dataclass(frozen=True)
class Miss:
    """An operator that does not run in int8, and why."""

    layer: str
    operator: str
    obstacle: Obstacle
    output_shape: tuple[Any, ...]
    macs: int | None
    source: str = ""

    @property
    def reason(self) -> Reason:
        return self.obstacle.reason

    def __str__(self) -> str:
        return f"{self.layer} ({self.operator}): {self.obstacle}"


@dataclasses.dataclass
class Report:
    """`fused`: int8 kernels; `missed`: what should have been int8 and is not; `kept_float`: float by design."""

    fused: list[Fusion]
    missed: list[Miss]
    kept_float: list[Miss]
    quantizes_left: list[str] = dataclasses.field(default_factory=list)
    dequantizes_left: list[str] = dataclasses.field(default_factory=list)

    def extend(self, other: Report) -> None:
        """Adds what another graph of the same model became."""
        self.fused += other.fused
        self.missed += other.missed
        self.kept_float += other.kept_float
        self.quantizes_left += other.quantizes_left
        self.dequantizes_left += other.dequantizes_left

    def missed_text(self) -> str:
        return "\n".join(f"  {miss}" for miss in self.missed)

    @property
    def int8_share_of_macs(self) -> float:
        """The share of multiply-accumulates that run in int8, 0 to 1; 1 where there are none."""
        done = sum(f.macs or 0 for f in self.fused)
        total = done + sum(m.macs or 0 for m in (*self.missed, *self.kept_float))
        return done / total if total else 1.0


_PRODUCTS = {
    torch.ops.aten.convolution.default: "conv", torch.ops.aten.linear.default: "linear",
    torch.ops.aten.mm.default: "matmul", torch.ops.aten.addmm.default: "matmul",
    torch.ops.aten.bmm.default: "matmul", torch.ops.aten.baddbmm.default: "matmul",
}  # fmt: skip


def collect(graph: fx.Graph) -> Report:
    """The report of a graph that has gone through the fuse stage (and not yet through finish)."""
    from inductor_x86q import qgraph
    from inductor_x86q.passes.fuse import compute
    from inductor_x86q.passes.fuse.call import is_call

    report = Report([], [], [])
    for node in graph.nodes:
        if is_call(node):
            report.fused.append(_fusion(node))
        elif node.target in _PRODUCTS:
            miss = Miss(
                layer(node), _PRODUCTS[node.target], _obstacle(node), _shape(node), compute.macs(node), source(node)
            )
            by_design = miss.reason in (Reason.NOT_QUANTIZED, Reason.NO_KERNEL)
            (report.kept_float if by_design else report.missed).append(miss)
        elif qgraph.is_quantize(node):
            report.quantizes_left.append(node.name)
        elif qgraph.is_dequantize(node) and qgraph.constant(node.args[0]) is None:
            report.dequantizes_left.append(node.name)
    return report


def _obstacle(node: fx.Node) -> Obstacle:
    from inductor_x86q.passes.fuse import compute

    if node.target in (compute.CONVOLUTION, compute.LINEAR):
        found = compute.obstacle(node)
        assert found is not None, f"{node} is eligible and was not fused"
        return found
    return Obstacle(Reason.NO_KERNEL, "product of two tensors that are both computed at run time")


def _fusion(node: fx.Node) -> Fusion:
    from inductor_x86q import qgraph
    from inductor_x86q.passes.fuse.call import read

    call = read(node)
    return Fusion(
        layer=layer(node),
        kernel=str(node.target),
        operator=call.family,
        absorbed=tuple(node.meta.get("x86q_absorbed", ())),
        input_dtype=_name(qgraph.value(call.x).dtype),
        weight_dtype="int8",
        output_dtype=_name(call.output_dtype),
        output_shape=_shape(node),
        macs=node.meta.get("x86q_macs"),
        source=source(node),
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _shape(node: fx.Node) -> tuple[Any, ...]:
    return tuple(size if isinstance(size, int) else str(size) for size in node.meta["val"].shape)


def layer(node: fx.Node) -> str:
    """The path of the module that the node comes from; the node's own name where that is not known."""
    stack = node.meta.get("nn_module_stack")
    if stack:
        path = next(reversed(stack.values()))[0]
        if path:
            return path.replace("L['self'].", "").removeprefix("L__self__.")
    return node.name


def source(node: fx.Node) -> str:
    """The last line of the node's stack trace that names a file, as file:line; empty where there is none."""
    for line in reversed(str(node.meta.get("stack_trace") or "").splitlines()):
        line = line.strip()
        if line.startswith("File ") and "<eval_with_key>" not in line:
            parts = line.split('"')
            number = line.split("line ")[-1].split(",")[0]
            return f"{parts[1]}:{number}"
    return ""
