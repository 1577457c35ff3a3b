"""X86Quantizer, as torchao's PT2E steps take it: annotates a graph with what plan and configuration say."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import fx

from inductor_x86q import cpu
from inductor_x86q.errors import QuantizationError
from inductor_x86q.graph import operators
from inductor_x86q.graph.disjoint_sets import DisjointSets
from inductor_x86q.graph.operators import Role, role
from inductor_x86q.graph.origin import layer as layer_of
from inductor_x86q.quantization import attention_written_out, qat, recurrent, rows, specs, torchao
from inductor_x86q.quantization import embeddings as embedding_tables
from inductor_x86q.quantization.config import (
    DYNAMIC,
    Config,
    LayerConfig,
    is_excluded,
    is_layer_operator,
)
from inductor_x86q.quantization.plan import Plan, Slot, is_float, shares

ATTENTION_MODES = (None, "int8", "float")


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
        dynamic: linears only, each input's scale and zero point computed from its values at every call; "per_token" for
            each row of it.
        config: as of `quantize`.
        embeddings: as of `quantize`.
        attention: "int8" or "float"; None is "int8". While training it is float. Convert with
            `inductor_x86q.convert`: torchao's leaves the softmax as it is, and attention is float then.

    Example:
        >>> inductor_x86q.X86Quantizer(exclude=["layer1.*", torch.nn.Linear]).exclude
        ('layer1.*', <class 'torch.nn.modules.linear.Linear'>)
    """

    def __init__(
        self,
        *,
        reduce_range: bool | None = None,
        exclude: Iterable[str | type] = (),
        is_qat: bool = False,
        dynamic: bool | str = False,
        config: Any = None,
        embeddings: str | None = None,
        attention: str | None = None,
    ) -> None:
        super().__init__()
        if dynamic and is_qat:
            raise ValueError("dynamic and is_qat exclude each other: training needs the ranges that calibration finds")
        self.reduce_range = not cpu.has_vnni() if reduce_range is None else reduce_range
        self.exclude = _rules(exclude)
        if embeddings not in embedding_tables.MODES:
            raise QuantizationError(f"embeddings is {embeddings!r}: expected None or 'int8'")
        self.embeddings = embeddings
        if attention not in ATTENTION_MODES:
            raise QuantizationError(f"attention is {attention!r}: expected {', '.join(map(repr, ATTENTION_MODES))}")
        self.attention = attention
        self.is_qat = is_qat
        if is_qat and config is not None:
            raise QuantizationError("config is for quantizing after training: prepare_qat() and is_qat take none")
        mode = ("per_tensor" if dynamic is True else dynamic) or "static"
        self.config = Config(config, LayerConfig(mode=str(mode)))
        self.excluded: list[fx.Node] = []
        self.rewritten = 0  # layers that need no observer, being quantized before others are annotated
        self._left_out: list[fx.Node] = []  # of those that could be
        self.static: list[fx.Node] = []  # layers whose inputs' ranges are to be calibrated

    def transform_for_annotation(self, model: fx.GraphModule) -> fx.GraphModule:
        """Layers that are quantized otherwise than by an observer are rewritten; attention that is written out is joined,
        for there is a kernel for the whole."""

        def is_float(node: fx.Node) -> bool:
            return self._mode(node) == "float"

        self._left_out = recurrent.rewrite(model, is_float, bits=7 if self.reduce_range else 8)
        if self.embeddings:
            self.rewritten, left_out = embedding_tables.rewrite(model, is_float)
            self._left_out += left_out
        if self.attention != "float" and not self.is_qat:
            attention_written_out.join(model)
        return model

    def annotate(self, model: fx.GraphModule) -> fx.GraphModule:
        plan = Plan(model.graph, self._mode, attention=self._attention_mode, folds=self.is_qat)
        self.excluded, self.static = [*plan.excluded, *self._left_out], list(plan.compute)
        self.config.check([*plan.compute, *plan.dynamic, *self.excluded], self.exclude)
        self._annotate_static(plan)
        self._annotate_dynamic(plan)
        for node in plan.excluded:
            node.meta[specs.IN_BFLOAT16] = self._mode(node) == "bfloat16"
        qat.scale_weights(plan.norms)
        return model

    def validate(self, model: fx.GraphModule) -> None:
        """Nothing to check: `annotate` writes only what it knows to be supported."""

    def _mode(self, node: fx.Node) -> str:
        if is_excluded(node, self.exclude):
            return "float"
        choice, ranks = self.config.of(node)
        if choice.mode in DYNAMIC and role(node) in (Role.CONVOLUTION, Role.TRANSPOSED_CONVOLUTION):
            if "mode" in ranks and ranks["mode"] >= (1,):
                raise QuantizationError(
                    f"config asks for {choice.mode!r} on layer {layer_of(node)!r}, a convolution ({operators.own_name(node)})"
                    ": ranges computed at every call are for linears; 'static', 'bfloat16' and 'float' are possible here"
                )
            return "float"  # what the whole model is said to be holds where it can
        return str(choice.mode)

    def _attention_mode(self, node: fx.Node) -> str:
        if self.is_qat or self.attention == "float":
            return "float"
        return self._mode(node)

    def _annotate_static(self, plan: Plan) -> None:
        groups = _grouped(plan)
        chosen = self._chosen(plan, groups)
        bits: dict[Slot, int] = {}
        for root, members in groups.sets().items():
            values = [slot if isinstance(slot, fx.Node) else slot[0] for slot in members]
            bits[root] = 7 if self.reduce_range and all(plan.clips(value) for value in values) else 8
            own = specs.activation(bits[root], is_qat=self.is_qat, chosen=chosen.get(root))
            for slot in members:
                specs.put(slot, own if slot == root else torchao.SharedQuantizationSpec(root))
        for node, (activation, weight) in plan.compute.items():
            group = groups.root(_read(plan, node, activation))
            self._annotate_weight(node, weight, 7 if self.reduce_range and bits[group] == 8 else 8)

    def _annotate_dynamic(self, plan: Plan) -> None:
        """Layers that read one value share its range."""
        for node in plan.dynamic_attention:
            node.meta[rows.BITS] = 7 if self.reduce_range else 8
        first: dict[tuple[fx.Node, Any], Slot] = {}
        # Every input is quantized by a generated kernel, and would lose more by a bit than a weight does.
        for node, (activation, weight) in plan.dynamic.items():
            choice, _ = self.config.of(node)
            node.meta[specs.GRANULARITY] = choice.mode
            edge: Slot = (activation, node)
            kind = (choice.mode, choice.activation if specs.is_dynamic(choice.activation) else None)
            root = first.setdefault((activation, kind), edge)
            own = specs.dynamic_activation(8, kind[1])
            specs.put(edge, own if root == edge else torchao.SharedQuantizationSpec(root))
            self._annotate_weight(node, weight, 7 if self.reduce_range else 8)

    def _annotate_weight(self, node: fx.Node, weight: fx.Node, bits: int) -> None:
        spec = specs.weight(bits, _output_axis(node, weight), is_qat=self.is_qat, chosen=self.config.of(node)[0].weight)
        specs.annotation(node).input_qspec_map[weight] = spec

    def _chosen(self, plan: Plan, groups: DisjointSets[Slot]) -> dict[Slot, Any]:
        """What observes each group of values that share their range: the choice of the layers that read them."""
        found: dict[Slot, tuple[tuple[int, int], Any, fx.Node]] = {}
        general: Any = self.config.whole.activation
        for node, (activation, _) in plan.compute.items():
            choice, ranks = self.config.of(node)
            if choice.activation is None or specs.is_dynamic(choice.activation):
                continue
            root, rank = groups.root(_read(plan, node, activation)), ranks["activation"]
            other = found.get(root)
            if other is not None and other[0] == rank and other[1] != choice.activation:
                raise QuantizationError(
                    f"config gives layer {layer_of(other[2])!r} the activation {other[1]!r} and layer {layer_of(node)!r} "
                    f"{choice.activation!r}, and both read the same values: give them the same"
                )
            if other is None or rank > other[0]:
                found[root] = (rank, choice.activation, node)
        given = {root: choice for root, (_, choice, _) in found.items()}
        return {root: given.get(root, None if specs.is_dynamic(general) else general) for root in groups.sets()}


def _read(plan: Plan, node: fx.Node, activation: fx.Node) -> Slot:
    """Where what the layer reads is quantized."""
    return activation if plan.slots(activation) == [activation] else (activation, node)


def _rules(exclude: Any) -> tuple[str | type, ...]:
    rules = (
        (exclude,) if isinstance(exclude, (str, type)) else tuple(exclude) if isinstance(exclude, Iterable) else None
    )
    if rules is None or not all(isinstance(rule, (str, type)) for rule in rules):
        raise QuantizationError(
            f"exclude is {exclude!r}: expected module names, glob patterns of them, or module types"
        )
    return rules


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


def from_x86_inductor(quantizer: Any, *, reduce_range: bool | None = None) -> X86Quantizer:
    """The X86Quantizer that quantizes as torchao's X86InductorQuantizer is configured to.

    What it says of convolutions and linears, for the whole model, operators and modules, is taken over. Which values
    between them are quantized follows from these layers here, so that what it says of other operators is not needed.

    Raises:
        QuantizationError: the quantizer is none of torchao's, is for training, or asks for what no int8 kernel takes.

    Example:
        >>> import torchao.quantization.pt2e.quantizer.x86_inductor_quantizer as x86
        >>> quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
        >>> inductor_x86q.from_x86_inductor(quantizer).config.whole.mode
        'static'
    """
    parts = ("global_config", "operator_type_qconfig", "module_name_qconfig")
    if not all(hasattr(quantizer, part) for part in parts):
        raise QuantizationError(f"quantizer is a {type(quantizer).__name__}: expected torchao's X86InductorQuantizer")
    operator_types = {
        operator: given for operator, given in quantizer.operator_type_qconfig.items() if is_layer_operator(operator)
    }
    entries = {"": quantizer.global_config, **operator_types, **quantizer.module_name_qconfig}
    if any(given is not None and given.is_qat for given in entries.values()):
        raise QuantizationError("the quantizer is configured for training: use prepare_qat() with the float model")
    return X86Quantizer(
        reduce_range=reduce_range,
        config={
            selector: LayerConfig(mode="float")
            if given is None
            else LayerConfig(activation=given.input_activation, weight=given.weight)
            for selector, given in entries.items()
        },
    )
