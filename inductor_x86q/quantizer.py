"""X86Quantizer: which value of the graph gets quantized, decided on the structure of the ATen graph.

It works backwards from the convolutions and linears. A value is wanted in int8 when one of them reads it, or when it
reaches one through operators that only move or combine values. Where a value comes out of an int8 kernel, everybody
reads its quantized form, since the kernel then writes int8; elsewhere only those edges are quantized that lead on to
int8, so that a float residual stream stays float.
"""

from __future__ import annotations

import fnmatch
import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch import fx

from inductor_x86q import _cpu
from inductor_x86q import _torchao as torchao

aten = torch.ops.aten

CONVOLUTIONS = frozenset({
    aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, aten.conv1d.padding, aten.conv2d.padding,
    aten.conv3d.padding, aten.convolution.default,
})  # fmt: skip
LINEARS = frozenset({aten.linear.default})
# Matrix products whose second operand (third where a bias comes first) is a parameter count as linears.
PRODUCTS = {
    aten.mm.default: 1, aten.matmul.default: 1, aten.bmm.default: 1, aten.addmm.default: 2, aten.baddbmm.default: 2,
}  # fmt: skip

# Activations that some kernel does itself, behind a convolution or a linear.
ACTIVATIONS = frozenset({
    aten.relu.default, aten.relu_.default, aten.relu6.default, aten.relu6_.default, aten.hardtanh.default,
    aten.hardtanh_.default, aten.hardswish.default, aten.hardswish_.default, aten.silu.default, aten.silu_.default,
    aten.gelu.default, aten.gelu_.default, aten.leaky_relu.default, aten.leaky_relu_.default, aten.tanh.default,
    aten.tanh_.default, aten.sigmoid.default, aten.sigmoid_.default, aten.hardsigmoid.default,
    aten.hardsigmoid_.default, aten.elu.default, aten.elu_.default, aten.clamp.default, aten.clamp_.default,
    aten.clamp_min.default, aten.mish.default,
})  # fmt: skip
RELUS = frozenset({aten.relu.default, aten.relu_.default})
ADDITIONS = frozenset({aten.add.Tensor, aten.add_.Tensor})

# Operators through which quantize and dequantize pass exactly: result and tensors share their parameters.
SHARING = frozenset({
    aten.max_pool1d.default, aten.max_pool2d.default, aten.max_pool3d.default, aten.adaptive_max_pool2d.default,
    aten.flatten.using_ints, aten.unflatten.int, aten.reshape.default, aten.view.default, aten.permute.default,
    aten.transpose.int, aten.t.default, aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims,
    aten.unsqueeze.default, aten.slice.Tensor, aten.select.int, aten.expand.default, aten.expand_as.default,
    aten.repeat.default, aten.contiguous.default, aten.clone.default, aten.alias.default, aten.pixel_shuffle.default,
    aten.pixel_unshuffle.default, aten.channel_shuffle.default, aten.dropout.default, aten.dropout_.default,
    aten.feature_dropout.default, aten.cat.default, aten.concat.default, aten.stack.default, aten.chunk.default,
    aten.split.Tensor, aten.split.default, aten.split_with_sizes.default, aten.unbind.int, aten.flip.default,
    aten.roll.default, aten.upsample_nearest1d.vec, aten.upsample_nearest2d.vec, aten.upsample_nearest3d.vec,
    aten.narrow.int, aten.movedim.int, aten.swapaxes.default, aten.detach.default, aten.detach_.default,
    operator.getitem,
})  # fmt: skip
# The same where they fill with zeros: the zero point must be able to stand for 0, as it always does.
PADS = frozenset({aten.pad.default, aten.constant_pad_nd.default})

# Operators that compute in float between int8 tensors, in one generated kernel: int8 in, int8 out.
ARITHMETIC = frozenset({
    aten.add.Tensor, aten.add_.Tensor, aten.mul.Tensor, aten.mul_.Tensor, aten.avg_pool2d.default,
    aten.avg_pool1d.default, aten.avg_pool3d.default, aten.adaptive_avg_pool2d.default,
    aten.adaptive_avg_pool1d.default, aten.adaptive_avg_pool3d.default, aten.mean.dim, aten.mean.default,
    aten.batch_norm.default,
}) | ACTIVATIONS  # fmt: skip


class X86Quantizer(torchao.Quantizer):
    """Annotates a graph for int8 on x86: activations uint8 per tensor, weights int8 per output channel.

    For torchao's `prepare_pt2e` and `prepare_qat_pt2e`; `quantize()` does all the steps.

    Args:
        reduce_range: keep 7 bits of each activation, so that CPUs without VNNI cannot overflow when they add pairs of
            products in 16 bits. None: where this machine has no VNNI.
        exclude: what stays float: module names ("layer1.0.conv1", and what is below it), glob patterns ("layer1.*")
            or module types (torch.nn.Linear).
        is_qat: observers that training can go through.
    """

    def __init__(
        self,
        *,
        reduce_range: bool | None = None,
        exclude: Iterable[str | type] = (),
        is_qat: bool = False,
    ) -> None:
        super().__init__()
        self.reduce_range = not _cpu.has_vnni() if reduce_range is None else reduce_range
        self.exclude = tuple(exclude)
        self.is_qat = is_qat
        self.excluded: list[str] = []
        self._activation = _activation_spec(127 if self.reduce_range else 255, is_qat)
        self._weight = _weight_spec(is_qat)

    def annotate(self, model: fx.GraphModule) -> fx.GraphModule:
        plan = _Plan(model.graph, self._is_excluded)
        self.excluded = plan.excluded
        _annotate(plan, self._activation, self._weight)
        return model

    def validate(self, model: fx.GraphModule) -> None:
        """Nothing to check: `annotate` writes only what it knows to be supported."""

    def _is_excluded(self, node: fx.Node) -> bool:
        for path, kind in _module_stack(node):
            for rule in self.exclude:
                if isinstance(rule, str):
                    if path == rule or fnmatch.fnmatchcase(path, rule):
                        return True
                elif kind in (f"{rule.__module__}.{rule.__qualname__}", rule):
                    return True
        return False


def _activation_spec(quant_max: int, is_qat: bool) -> torchao.QuantizationSpec:
    if is_qat:
        observer = torchao.FusedMovingAvgObsFakeQuantize.with_args(observer=torchao.MovingAverageMinMaxObserver)
    else:
        observer = torchao.HistogramObserver.with_args(eps=2**-12)
    return torchao.QuantizationSpec(torch.uint8, observer, 0, quant_max, torch.per_tensor_affine)


def _weight_spec(is_qat: bool) -> torchao.QuantizationSpec:
    if is_qat:
        observer = torchao.FusedMovingAvgObsFakeQuantize.with_args(observer=torchao.MovingAveragePerChannelMinMaxObserver)
    else:
        observer = torchao.PerChannelMinMaxObserver.with_args(eps=2**-12)
    return torchao.QuantizationSpec(torch.int8, observer, -128, 127, torch.per_channel_symmetric, ch_axis=0)


def _module_stack(node: fx.Node) -> list[tuple[str, Any]]:
    """Path and type of each module around the node, outermost first, spelled alike for both export modes."""
    found = []
    for path, kind in (node.meta.get("nn_module_stack") or {}).values():
        path = path.replace("L['self']", "").removeprefix("L__self__").removeprefix(".")
        found.append((path, kind))
    return found


class _Plan:
    """What to quantize: `wanted` values, `groups` of slots that share parameters, and the `compute` nodes."""

    def __init__(self, graph: fx.Graph, is_excluded: Any) -> None:
        self.graph = graph
        self.compute: dict[fx.Node, tuple[fx.Node, fx.Node]] = {}  # node: (activation, weight)
        self.excluded: list[str] = []
        self.wanted: set[fx.Node] = set()
        self.accumulated: dict[fx.Node, fx.Node] = {}  # addition: the operand that a kernel will add into
        self._nodes = list(graph.nodes)
        for node in self._nodes:
            operands = _compute_operands(node)
            if operands is None:
                continue
            if is_excluded(node):
                self.excluded.append(node.name)
            else:
                self.compute[node] = operands
        self._find_wanted()

    def _find_wanted(self) -> None:
        for node in reversed(self._nodes):
            if _is_float(node) and any(self.passes_on(node, user) for user in node.users) and not self._inside(node):
                self.wanted.add(node)

    def passes_on(self, value: fx.Node, user: fx.Node) -> bool:
        """Whether `user` reads `value` in int8."""
        if user in self.compute:
            return self.compute[user][0] is value
        if user.target in SHARING or user.target in PADS:
            return self._reaches(user)
        return user.target in ARITHMETIC and user in self.wanted and self.is_int8_source(value)

    def _reaches(self, node: fx.Node) -> bool:
        if _is_float(node):
            return node in self.wanted
        return any(item in self.wanted for item in node.users)  # a list of results

    def _inside(self, node: fx.Node) -> bool:
        """Whether a kernel keeps the value to itself: between a convolution or linear and what it absorbs."""
        end = self._region_end(node)
        return end is not None and end is not node

    def _region_end(self, node: fx.Node) -> fx.Node | None:
        """Where the region that the value belongs to ends; None where no convolution or linear starts it."""
        raise NotImplementedError

    def is_int8_source(self, value: fx.Node) -> bool:
        raise NotImplementedError


def _compute_operands(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    raise NotImplementedError


def _is_float(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.dtype == torch.float32


def _annotate(plan: _Plan, activation: Any, weight: Any) -> None:
    raise NotImplementedError
