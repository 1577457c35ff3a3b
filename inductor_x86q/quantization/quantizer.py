"""X86Quantizer, as torchao's PT2E steps take it: annotates a graph with what the plan says."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable
from typing import Any

from torch import fx

from inductor_x86q import cpu
from inductor_x86q.errors import QuantizationError
from inductor_x86q.graph.disjoint_sets import DisjointSets
from inductor_x86q.graph.operators import Role, role
from inductor_x86q.quantization import qat, specs, torchao
from inductor_x86q.quantization.plan import Plan, Slot, is_float, shares


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
        plan = Plan(model.graph, self._is_excluded, dynamic=self.dynamic, folds=self.is_qat)
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


def _module_stack(node: fx.Node) -> list[tuple[str, Any]]:
    """Path and type of each module around the node, outermost first, spelled alike for both export modes."""
    found = []
    for path, kind in (node.meta.get("nn_module_stack") or {}).values():
        path = path.replace("L['self']", "").removeprefix("L__self__").removeprefix(".")
        found.append((path, kind))
    return found


def _annotate(plan: Plan, reduce_range: bool, is_qat: bool) -> None:
    groups = _grouped(plan)
    bits: dict[Slot, int] = {}
    for root, members in groups.sets().items():
        values = [slot if isinstance(slot, fx.Node) else slot[0] for slot in members]
        bits[root] = 7 if reduce_range and all(plan.clips(value) for value in values) else 8
        for slot in members:
            own = specs.dynamic_activation(bits[root]) if plan.dynamic else specs.activation(bits[root], is_qat=is_qat)
            specs.put(slot, own if slot == root else torchao.SharedQuantizationSpec(root))
    for node, (activation, weight) in plan.compute.items():
        axis = _output_axis(node, weight)
        read: Slot = activation if plan.slots(activation) == [activation] else (activation, node)
        weight_bits = 7 if reduce_range and bits[groups.root(read)] == 8 else 8
        specs.annotation(node).input_qspec_map[weight] = specs.weight(weight_bits, axis, is_qat=is_qat)


def _output_axis(layer: fx.Node, weight: fx.Node) -> int:
    """Which dimension of the weight the layer's output channels are."""
    if role(layer) is Role.PRODUCT:
        return int(weight.meta["val"].dim()) - 1
    return 1 if role(layer) is Role.TRANSPOSED_CONVOLUTION else 0


def _grouped(plan: Plan) -> DisjointSets[Slot]:
    """The slots of all wanted values, those joined that only move the same data.

    The root of a set is the slot that torchao comes to first: it makes a root's observer before those that share it.
    """
    positions = {node: position for position, node in enumerate(plan.nodes)}

    def order(slot: Slot) -> tuple[int, int]:
        # torchao walks the nodes in graph order, and of each the input edges before the output.
        return (positions[slot], 1) if isinstance(slot, fx.Node) else (positions[slot[1]], 0)

    groups: DisjointSets[Slot] = DisjointSets(order)
    for value in plan.nodes:
        if value not in plan.wanted:
            continue
        slots = plan.slots(value)
        for slot in slots:
            groups.join(slots[0], slot)
        for user in value.users:
            if shares(user) and plan.passes_on(value, user):
                for result in [user] if is_float(user) else [item for item in user.users if item in plan.wanted]:
                    groups.join(slots[0], plan.slots(result)[0])
    return groups
