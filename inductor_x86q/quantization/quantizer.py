"""X86Quantizer: which value of the graph gets quantized, decided on the structure of the ATen graph.

It works backwards from the convolutions and linears. A value is wanted in int8 when one of them reads it, or when it
reaches one through operators that only move or combine values. Where a value comes out of an int8 kernel, everybody
reads its quantized form, since the kernel then writes int8; elsewhere only those edges are quantized that lead on to
int8, so that a float residual stream stays float.
"""

from __future__ import annotations

import fnmatch
import operator
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import fx

from inductor_x86q import cpu
from inductor_x86q.errors import QuantizationError
from inductor_x86q.graph import qdq
from inductor_x86q.inductor import fake_tensors
from inductor_x86q.quantization import qat, torchao

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
# Operators whose kernels can clip their result to any range (hardtanh), and what is itself such a clip.
CLIPPING = LINEARS | frozenset(PRODUCTS) | {aten.conv2d.default, aten.conv2d.padding}
CLIPS = RELUS | {
    aten.relu6.default, aten.relu6_.default, aten.hardtanh.default, aten.hardtanh_.default, aten.clamp.default,
    aten.clamp_.default, aten.clamp_min.default,
}  # fmt: skip

# Operators through which quantize and dequantize pass exactly: result and tensors share their parameters.
SHARING = frozenset({
    aten.max_pool1d.default, aten.max_pool2d.default, aten.max_pool3d.default,
    aten.flatten.using_ints, aten.unflatten.int, aten.reshape.default, aten.view.default, aten.permute.default,
    aten.transpose.int, aten.t.default, aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims,
    aten.unsqueeze.default, aten.slice.Tensor, aten.select.int, aten.expand.default, aten.expand_as.default,
    aten.repeat.default, aten.contiguous.default, aten.clone.default, aten.alias.default, aten.pixel_shuffle.default,
    aten.pixel_unshuffle.default, aten.channel_shuffle.default, aten.dropout.default, aten.dropout_.default,
    aten.feature_dropout.default, aten.cat.default, aten.concat.default, aten.stack.default, aten.chunk.default,
    aten.split.Tensor, aten.split.default, aten.split_with_sizes.default, aten.unbind.int, aten.flip.default,
    aten.roll.default, aten.upsample_nearest1d.vec, aten.upsample_nearest2d.vec, aten.upsample_nearest3d.vec,
    aten.narrow.default, aten.movedim.int, aten.swapaxes.default, aten.detach.default, aten.detach_.default,
    operator.getitem,
})  # fmt: skip
# The same where they fill with zeros: the zero point must be able to stand for 0, as it always does.
PADS = frozenset({aten.pad.default, aten.constant_pad_nd.default})

# Operators that compute in float between int8 tensors, in one generated kernel: int8 in, int8 out.
POINTWISE = frozenset({
    aten.add.Tensor, aten.add_.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.mul_.Tensor, aten.div.Tensor,
    aten.batch_norm.default, aten.minimum.default, aten.maximum.default,
}) | ACTIVATIONS  # fmt: skip
POOLS = frozenset({
    aten.avg_pool1d.default, aten.avg_pool2d.default, aten.avg_pool3d.default, aten.adaptive_avg_pool1d.default,
    aten.adaptive_avg_pool2d.default, aten.adaptive_avg_pool3d.default, aten.mean.dim, aten.mean.default,
})  # fmt: skip


class X86Quantizer(torchao.Quantizer):
    """Annotates a graph for int8 on x86: activations uint8 per tensor, weights int8 per output channel.

    For torchao's `prepare_pt2e` and `prepare_qat_pt2e`; `quantize()` does all the steps.

    Args:
        reduce_range: keep 7 bits of each layer's input or, where no kernel clips that input to 7 bits at no cost, of
            its weight, so that CPUs without VNNI cannot overflow when they add pairs of products in 16 bits. None:
            where this machine has no VNNI.
        exclude: what stays float: module names ("layer1.0.conv1", and what is below it), glob patterns ("layer1.*")
            or module types (torch.nn.Linear).
        is_qat: for a graph exported in train mode: fake quantization that gradients pass, and each batch norm behind a
            layer becomes part of its weight.
        dynamic: linears only, each input's scale and zero point computed from its values at every call.
    """

    def __init__(
        self,
        *,
        reduce_range: bool | None = None,
        exclude: Iterable[str | type] = (),
        is_qat: bool = False,
        dynamic: bool = False,
    ) -> None:
        super().__init__()
        if dynamic and is_qat:
            raise ValueError("dynamic and is_qat exclude each other: training needs the ranges that calibration finds")
        self.reduce_range = not cpu.has_vnni() if reduce_range is None else reduce_range
        self.exclude = _rules(exclude)
        self.is_qat = is_qat
        self.dynamic = dynamic
        self.excluded: list[fx.Node] = []

    def annotate(self, model: fx.GraphModule) -> fx.GraphModule:
        plan = _Plan(model.graph, self._is_excluded, dynamic=self.dynamic, folds=self.is_qat)
        self.excluded = plan.excluded
        _annotate(plan, self.reduce_range, self.is_qat)
        qat.scale_weights(plan.norms)
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


def _rules(exclude: Any) -> tuple[str | type, ...]:
    rules = (
        (exclude,) if isinstance(exclude, (str, type)) else tuple(exclude) if isinstance(exclude, Iterable) else None
    )
    if rules is None or not all(isinstance(rule, (str, type)) for rule in rules):
        raise QuantizationError(
            f"exclude is {exclude!r}: expected module names, glob patterns of them, or module types"
        )
    return rules


# Training rounds by the very parameters that converting reads from the observers. FusedMovingAvgObsFakeQuantize does not:
# its kernel takes another scale for symmetric ranges than its observer.
def _activation_spec(bits: int, is_qat: bool) -> torchao.QuantizationSpec:
    if is_qat:
        observer = torchao.FakeQuantize.with_args(observer=torchao.MovingAverageMinMaxObserver, eps=2**-12)
    else:
        observer = torchao.HistogramObserver.with_args(eps=2**-12)
    return torchao.QuantizationSpec(torch.uint8, observer, 0, 2**bits - 1, torch.per_tensor_affine)


def _dynamic_spec(bits: int) -> torchao.QuantizationSpec:
    observer = torchao.PlaceholderObserver.with_args(eps=2**-12)
    high = 2**bits - 1
    return torchao.QuantizationSpec(torch.uint8, observer, 0, high, torch.per_tensor_affine, is_dynamic=True)


def _weight_spec(bits: int, axis: int, is_qat: bool) -> torchao.QuantizationSpec:
    if is_qat:
        # No average over steps: the range that counts is that of the weight as it is.
        observer = torchao.FakeQuantize.with_args(
            observer=torchao.MovingAveragePerChannelMinMaxObserver, averaging_constant=1.0, eps=2**-12
        )
    else:
        observer = torchao.PerChannelMinMaxObserver.with_args(eps=2**-12)
    bound = 2 ** (bits - 1)
    return torchao.QuantizationSpec(torch.int8, observer, -bound, bound - 1, torch.per_channel_symmetric, ch_axis=axis)


def _module_stack(node: fx.Node) -> list[tuple[str, Any]]:
    """Path and type of each module around the node, outermost first, spelled alike for both export modes."""
    found = []
    for path, kind in (node.meta.get("nn_module_stack") or {}).values():
        path = path.replace("L['self']", "").removeprefix("L__self__").removeprefix(".")
        found.append((path, kind))
    return found


class _Plan:
    """What to quantize.

    `compute`: each convolution and linear to quantize, with its activation and weight. `ends`: for each value inside
    a fused region, the region's last value, which is the only one of them that may be quantized; `starts` has for that
    one the operator and what the call does behind it. `wanted`: the values to quantize. `norms`: of each convolution and linear the batch norm that will be folded
    into it, while training.

    A `dynamic` plan has linears only, and quantizes what they read and nothing else: to know the range of a value, all
    of it has to be there, so that no kernel could write it in int8.
    """

    def __init__(
        self, graph: fx.Graph, is_excluded: Callable[[fx.Node], bool], *, dynamic: bool = False, folds: bool = False
    ) -> None:
        self.nodes = list(graph.nodes)
        self.dynamic = dynamic
        self.compute: dict[fx.Node, tuple[fx.Node, fx.Node]] = {}
        self.excluded: list[fx.Node] = []
        for node in self.nodes:
            operands = None if dynamic and node.target in CONVOLUTIONS else _compute_operands(node)
            if operands is not None and is_excluded(node):
                self.excluded.append(node)
            elif operands is not None:
                self.compute[node] = operands
        self.norms: dict[fx.Node, fx.Node] = {}
        for node in self.compute if folds else ():
            norm = qat.batch_norm_behind(node)
            if norm is not None:
                self.norms[node] = norm
        self.ends: dict[fx.Node, fx.Node] = {}
        self.starts: dict[fx.Node, list[fx.Node]] = {}
        self._claimed: set[fx.Node] = set()
        for node in reversed(self.compute):  # the later of two convolutions takes the addition, as when fusing
            self._find_region(node)
        self.wanted: set[fx.Node] = set()
        for node in reversed(self.nodes):
            if self._is_wanted(node):
                self.wanted.add(node)

    def _find_region(self, start: fx.Node) -> None:
        """What one call will compute: the operator with what its weight takes up, a batch norm or a constant factor;
        then an activation, or an addition with a relu behind it."""
        layer = [start, self.norms[start]] if start in self.norms else [start]
        user = qdq.only_user(layer[-1])
        if user is not None and _is_factor(user, start):
            layer.append(user)
            user = qdq.only_user(user)
        behind = []
        if user is not None and user.target in ACTIVATIONS:
            behind.append(user)
        elif user is not None and user not in self._claimed and _is_plain_addition(user):
            self._claimed.add(user)
            behind.append(user)
            user = qdq.only_user(user)
            if user is not None and user.target in RELUS:
                behind.append(user)
        for node in (*layer, *behind):
            self.ends[node] = (*layer, *behind)[-1]
        self.starts[self.ends[start]] = [start, *behind]

    def _is_wanted(self, node: fx.Node) -> bool:
        if not _is_float(node) or self.ends.get(node, node) is not node or qdq.is_constant(node):
            return False
        return any(self.passes_on(node, user) for user in node.users)

    def passes_on(self, value: fx.Node, user: fx.Node) -> bool:
        """Whether `user` should read `value` in int8."""
        if user in self.compute:
            return self.compute[user][0] is value
        if self.dynamic:
            return False
        if _shares(user):
            return self._results_wanted(user)
        if user in self._claimed:
            return self.ends[user] in self.wanted
        if user.target in POOLS:
            return user in self.wanted and self.is_int8_source(value)
        return user.target in POINTWISE and self._leads_to_int8(user) and self.is_int8_source(value)

    def _results_wanted(self, node: fx.Node) -> bool:
        if _is_float(node):
            return node in self.wanted
        return any(item in self.wanted for item in node.users)  # a list of results

    def _leads_to_int8(self, node: fx.Node) -> bool:
        """Whether a generated kernel that computes `node` writes int8, perhaps after more of the same."""
        if node in self.wanted:
            return True
        return any(
            user.target in POINTWISE and user not in self._claimed and self._leads_to_int8(user) for user in node.users
        )

    def is_int8_source(self, value: fx.Node) -> bool:
        """Whether whatever makes the value can as well write int8: a call, a pool, or data moved from one of these."""
        if value in self.ends or value.target in POOLS:
            return True
        if _shares(value) or _is_list(value):
            return any(self.is_int8_source(x) for x in value.all_input_nodes)
        return False

    def clips(self, value: fx.Node) -> bool:
        """Whether whatever makes the value clips it to any range on the way: a generated kernel does, and a call that
        ends in nothing else than a clip. It need not where data is only moved: that shares its range with the source.
        """
        if self.dynamic:  # every input is quantized by a generated kernel, and loses more by a bit than a weight does
            return False
        if value not in self.starts:
            return True
        start, *rest = self.starts[value]
        return start.target in CLIPPING and all(node.target in CLIPS for node in rest)

    def slots(self, value: fx.Node) -> list[Any]:
        """Where to quantize the value: at the node, for all its users, or only on the edges that lead to int8."""
        edges = [user for user in value.users if self.passes_on(value, user)]
        if self.dynamic:
            return [(value, user) for user in edges]
        if len(edges) == len(value.users) or self.is_int8_source(value):
            return [value]
        return [(value, user) for user in edges]


def _compute_operands(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """Activation and weight of a convolution or linear with a constant weight; None for any other node."""
    if node.op != "call_function":
        return None
    if node.target in CONVOLUTIONS or node.target in LINEARS:
        activation, weight = node.args[0], node.args[1]
        if node.target is aten.convolution.default and node.args[6]:
            return None  # transposed
    elif node.target in PRODUCTS:
        position = PRODUCTS[node.target]
        activation, weight = node.args[position - 1], node.args[position]
    else:
        return None
    if not isinstance(activation, fx.Node) or not isinstance(weight, fx.Node):
        return None
    if weight.meta["val"].dim() == 3 and node.target in PRODUCTS and not _repeats_one_matrix(weight):
        return None
    if (
        not qdq.is_constant(weight)
        or qdq.is_constant(activation)
        or not _is_float(activation)
        or weight.meta["val"].dim() < 2
    ):
        return None
    return activation, weight


def _repeats_one_matrix(weight: fx.Node) -> bool:
    """Whether a batch of matrices is one matrix, expanded."""
    if weight.target is not aten.expand.default:
        return False
    source: Any = weight.args[0]
    return source.meta["val"].shape.numel() == weight.meta["val"].shape[1:].numel()


def _is_float(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.dtype == torch.float32


def _is_list(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), (list, tuple))


def _is_factor(node: fx.Node, layer: fx.Node) -> bool:
    """Whether the node multiplies the layer's result by a constant that the layer's weight can take up."""
    if node.target is not aten.mul.Tensor:
        return False
    channel = 1 if layer.target in CONVOLUTIONS else -1
    # A tensor of one element is a number by the time the passes run, and stays where it is.
    constants = [x for x in node.all_input_nodes if qdq.is_constant(x) and qdq.value(x).numel() > 1]
    return any(qdq.is_channel_factor(constant, layer, channel) for constant in constants)


def _is_plain_addition(node: fx.Node) -> bool:
    """Whether the node adds two different float tensors of one shape, unscaled."""
    if node.target not in ADDITIONS or node.kwargs.get("alpha", 1) != 1:
        return False
    first, second = node.args[:2]
    if not isinstance(first, fx.Node) or not isinstance(second, fx.Node) or first is second:
        return False
    if not _is_float(first) or not _is_float(second) or qdq.is_constant(first) or qdq.is_constant(second):
        return False
    return fake_tensors.same_shape(first.meta["val"].shape, second.meta["val"].shape)


def _shares(node: fx.Node) -> bool:
    """Whether the node only moves data, so that its result and its tensors share their parameters."""
    if node.target in PADS:
        arguments = dict(zip(("mode", "value"), node.args[2:], strict=False)) | node.kwargs
        if node.target is aten.constant_pad_nd.default:
            return not (node.args[2] if len(node.args) > 2 else 0)  # type: ignore[return-value]
        return bool(arguments.get("mode", "constant") != "constant" or not arguments.get("value"))
    return node.target in SHARING


def _annotate(plan: _Plan, reduce_range: bool, is_qat: bool) -> None:
    groups = _grouped(plan)
    bits: dict[Any, int] = {}
    for root, members in groups.sets().items():
        values = [slot if isinstance(slot, fx.Node) else slot[0] for slot in members]
        bits[root] = 7 if reduce_range and all(plan.clips(value) for value in values) else 8
        for slot in members:
            own = _dynamic_spec(bits[root]) if plan.dynamic else _activation_spec(bits[root], is_qat)
            _set(slot, own if slot == root else torchao.SharedQuantizationSpec(root))
    for node, (activation, weight) in plan.compute.items():
        axis = weight.meta["val"].dim() - 1 if node.target in PRODUCTS else 0
        slot = next(s for s in plan.slots(activation) if s in (activation, (activation, node)))
        weight_bits = 7 if reduce_range and bits[groups.root(slot)] == 8 else 8
        _annotation(node).input_qspec_map[weight] = _weight_spec(weight_bits, axis, is_qat)


def _grouped(plan: _Plan) -> _Groups:
    """The slots of all wanted values, those joined that only move the same data."""
    groups = _Groups({node: position for position, node in enumerate(plan.nodes)})
    for value in plan.nodes:
        if value not in plan.wanted:
            continue
        slots = plan.slots(value)
        for slot in slots:
            groups.join(slots[0], slot)
        for user in value.users:
            if _shares(user) and plan.passes_on(value, user):
                for result in [user] if _is_float(user) else [item for item in user.users if item in plan.wanted]:
                    groups.join(slots[0], plan.slots(result)[0])
    return groups


def _annotation(node: fx.Node) -> Any:
    found = node.meta.get(torchao.ANNOTATION_KEY)
    if found is None:
        found = node.meta[torchao.ANNOTATION_KEY] = torchao.QuantizationAnnotation(_annotated=True)
    return found


def _set(slot: Any, spec: Any) -> None:
    if isinstance(slot, fx.Node):
        _annotation(slot).output_qspec = spec
    else:
        value, user = slot
        _annotation(user).input_qspec_map[value] = spec


class _Groups:
    """Sets of slots that share parameters (a disjoint-set forest).

    The root of a set is the slot that torchao comes to first: it makes a root's observer before those that share it.
    """

    def __init__(self, positions: dict[fx.Node, int]) -> None:
        self._positions = positions
        self._parents: dict[Any, Any] = {}

    def _order(self, slot: Any) -> tuple[int, int]:
        # torchao walks the nodes in graph order, and of each the input edges before the output.
        return (self._positions[slot], 1) if isinstance(slot, fx.Node) else (self._positions[slot[1]], 0)

    def root(self, slot: Any) -> Any:
        self._parents.setdefault(slot, slot)
        while self._parents[slot] != slot:
            slot = self._parents[slot]
        return slot

    def join(self, first: Any, second: Any) -> None:
        first, second = sorted((self.root(first), self.root(second)), key=self._order)
        self._parents[second] = first

    def sets(self) -> dict[Any, list[Any]]:
        """The slots of each set by its root."""
        found: dict[Any, list[Any]] = {}
        for slot in self._parents:
            found.setdefault(self.root(slot), []).append(slot)
        return found
