"""What became of every convolution, linear and q/dq node, and why.

`Report.to_json()` writes one JSON object (SCHEMA, VERSION):

    schema    "inductor_x86q.report"
    version   1; a reader refuses a greater one. Fields may be added within a version, none changes its meaning.
    totals    layers, int8_layers, macs, int8_macs, missed, kept_float, quantizes_left, dequantizes_left, float_islands,
              microseconds (null where nothing was measured)
    fused     int8 kernels: the fields of Fusion
    missed, kept_float
              layers that are not int8: the fields of Miss, `obstacle` as {"reason": name, "detail": text, "text": all}
    generated what runs in kernels that Inductor generates: the fields of Operation
    quantizes_left, dequantizes_left
              names of the nodes that no kernel absorbed
    passes    {"stage", "rule", "matches", "seconds"}: what each rule of each stage did; seconds are the stage's
    nodes     the graph after fusing, in order: the fields of Node
    kernels   calls in the order in which they run: the fields of Kernel; empty where nothing was measured
    notes     what else is to be said, a line each
    drift     the fields of Drift, its `layers` those of LayerDrift; null where it was not measured

Shapes are lists of numbers, and of strings where a size is not known when compiling; types are torch's names.
"""

from __future__ import annotations

import dataclasses
import enum
import json
import math
import shutil
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

if TYPE_CHECKING:
    from inductor_x86q.drift import Drift


class Reason(enum.Enum):
    """Why a layer does not run in int8; the value says what to change."""

    NOT_QUANTIZED = (
        "no quantize/dequantize stands at its inputs: if it should be int8, take it out of `exclude`, or annotate it "
        "in your quantizer"
    )
    NO_KERNEL = "torch has no int8 kernel for it: it stays float, and nothing needs to be changed"
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


@dataclasses.dataclass(frozen=True)
class Obstacle:
    """A reason, and what was found in this case."""

    reason: Reason
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.reason.value}{f' ({self.detail})' if self.detail else ''}"


SCHEMA, VERSION = "inductor_x86q.report", 1


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
    node: str = ""  # the name of the call in the graph
    input_scale: float | None = None  # None: computed at run time
    input_zero_point: int | None = None
    output_scale: float | None = None  # None: the output is float
    output_zero_point: int | None = None
    microseconds: float | None = None  # None: not measured


@dataclasses.dataclass(frozen=True)
class Miss:
    """An operator that does not run in int8, and why."""

    layer: str
    operator: str
    obstacle: Obstacle
    output_shape: tuple[Any, ...]
    macs: int | None
    source: str = ""
    node: str = ""
    microseconds: float | None = None

    @property
    def reason(self) -> Reason:
        return self.obstacle.reason

    def __str__(self) -> str:
        return f"{self.layer} ({self.operator}): {self.obstacle}"


@dataclasses.dataclass(frozen=True)
class Operation:
    """An addition, pool, quantize or anything else that runs in a kernel that Inductor generates."""

    layer: str
    operator: str
    input_dtypes: tuple[str, ...]
    output_dtype: str
    output_shape: tuple[Any, ...]
    source: str = ""
    node: str = ""
    microseconds: float | None = None  # of the whole kernel, which other operations may share


@dataclasses.dataclass(frozen=True)
class Node:
    """A node of the graph after fusing, constants left out."""

    name: str
    kind: str  # input, output, fused, missed, kept_float, quantize, dequantize, generated
    operator: str
    layer: str
    dtype: str
    shape: tuple[Any, ...]
    inputs: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A call of the compiled code, measured."""

    name: str
    layers: tuple[str, ...]
    nodes: tuple[str, ...]
    microseconds: float


@dataclasses.dataclass(frozen=True)
class RuleCount:
    """How often a rule of a stage matched; seconds are those of its whole stage."""

    stage: str
    rule: str
    matches: int
    seconds: float


@dataclasses.dataclass
class Report:
    """`fused`: int8 kernels; `missed`: what should have been int8 and is not; `kept_float`: float by design."""

    fused: list[Fusion]
    missed: list[Miss]
    kept_float: list[Miss]
    quantizes_left: list[str] = dataclasses.field(default_factory=list)
    dequantizes_left: list[str] = dataclasses.field(default_factory=list)
    generated: list[Operation] = dataclasses.field(default_factory=list)
    nodes: list[Node] = dataclasses.field(default_factory=list)
    passes: list[RuleCount] = dataclasses.field(default_factory=list)
    kernels: list[Kernel] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)
    drift: Drift | None = None  # where it was asked for

    def extend(self, other: Report) -> None:
        """Adds what another graph of the same model became; its nodes get new names where both use one."""
        other = _renamed(other, {node.name for node in self.nodes})
        for name in _KINDS:
            getattr(self, name).extend(getattr(other, name))

    # --- totals ---

    @property
    def layers(self) -> int:
        """How many convolutions, linears and matrix products there are."""
        return len(self.fused) + len(self.missed) + len(self.kept_float)

    @property
    def int8_share_of_layers(self) -> float:
        """The share of convolutions, linears and matrix products that run in int8, 0 to 1; 1 where there are none."""
        return len(self.fused) / self.layers if self.layers else 1.0

    @property
    def int8_share_of_macs(self) -> float:
        """The share of multiply-accumulates that run in int8, 0 to 1; 1 where there are none."""
        done = _total(self.fused)
        total = done + _total(self.missed) + _total(self.kept_float)
        return done / total if total else 1.0

    @property
    def float_islands(self) -> int:
        """How many groups of connected float operations stand between int8 and int8."""
        return _count_islands(self.nodes)

    @property
    def microseconds(self) -> float | None:
        """The sum over all measured kernels; None where nothing was measured."""
        return sum(k.microseconds for k in self.kernels) if self.kernels else None

    def totals(self) -> dict[str, Any]:
        int8_macs = _total(self.fused)
        return {
            "layers": self.layers,
            "int8_layers": len(self.fused),
            "macs": int8_macs + _total(self.missed) + _total(self.kept_float),
            "int8_macs": int8_macs,
            "missed": len(self.missed),
            "kept_float": len(self.kept_float),
            "quantizes_left": len(self.quantizes_left),
            "dequantizes_left": len(self.dequantizes_left),
            "float_islands": self.float_islands,
            "microseconds": self.microseconds,
        }

    # --- texts ---

    def missed_text(self) -> str:
        return "\n".join(f"  {miss}" for miss in self.missed)

    def summary(self) -> str:
        """The totals in one line."""
        time = "" if self.microseconds is None else f", {self.microseconds / 1000:.2f} ms in kernels"
        return (
            f"{len(self.fused)} of {self.layers} layers in int8 ({self.int8_share_of_macs:.1%} of the "
            f"multiply-accumulates), {len(self.missed)} missed, {len(self.kept_float)} float by design; "
            f"{len(self.quantizes_left)} quantize and "
            f"{len(self.dequantizes_left)} dequantize nodes left, {self.float_islands} float islands{time}"
        )

    def __str__(self) -> str:
        return self.table(shutil.get_terminal_size((120, 40)).columns)

    def table(self, width: int = 120) -> str:
        """The report as text, no line of the table longer than `width` characters (at least 60)."""
        parts = [_table(self.fused, max(width, 60))] if self.fused else []
        for title, misses in (
            ("missed, should be int8", self.missed),
            ("float by design", self.kept_float),
        ):
            if misses:
                parts.append(f"{title}:\n" + "\n".join(_grouped(misses)))
        if self.drift is not None:
            parts.append(str(self.drift))
        return "\n\n".join([*parts, *dict.fromkeys(self.notes), self.summary()])

    # --- files ---

    def to_json(self) -> str:
        """The report as JSON; the module's documentation has the schema."""
        content = {"schema": SCHEMA, "version": VERSION, "totals": self.totals()}
        for name in _KINDS:
            content[name] = [_plain(item) for item in getattr(self, name)]
        content["drift"] = _plain(self.drift)
        return json.dumps(content, indent=1, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Report:
        """The report that `to_json` wrote.

        Raises:
            ValueError: the text is no report, or of a later version of the schema.
        """
        content = json.loads(text)
        if not isinstance(content, dict) or content.get("schema") != SCHEMA:
            raise ValueError(f"not a report: expected a JSON object with schema {SCHEMA!r}")
        if content["version"] > VERSION:
            raise ValueError(
                f"the report has version {content['version']} of the schema, this package reads up to {VERSION}"
            )
        lists = {name: [_read(kind, item) for item in content.get(name, ())] for name, kind in _KINDS.items()}
        return cls(**lists, drift=_read_drift(content.get("drift")))

    def to_html(self, title: str = "int8 report") -> str:
        """One self-contained page: totals, the graph, a table of all layers; it needs no network."""
        from inductor_x86q.html import page

        return page(self, title)


_KINDS: dict[str, Any] = {
    "fused": Fusion, "missed": Miss, "kept_float": Miss, "quantizes_left": str, "dequantizes_left": str,
    "generated": Operation, "nodes": Node, "passes": RuleCount, "kernels": Kernel, "notes": str,
}  # fmt: skip


def _plain(item: Any) -> Any:
    """What JSON can hold; numbers that it cannot are given as text."""
    if isinstance(item, Obstacle):
        return {"reason": item.reason.name, "detail": item.detail, "text": str(item)}
    if dataclasses.is_dataclass(item):
        return {field.name: _plain(getattr(item, field.name)) for field in dataclasses.fields(item)}
    if isinstance(item, (list, tuple)):
        return [_plain(x) for x in item]
    return item if not isinstance(item, float) or math.isfinite(item) else str(item)


def _read(kind: Any, item: Any) -> Any:
    if kind is str:
        return item
    values = {field.name: item[field.name] for field in dataclasses.fields(kind) if field.name in item}
    for name, value in values.items():
        if name == "obstacle":
            values[name] = Obstacle(Reason[value["reason"]], value["detail"])
        elif isinstance(value, list):
            values[name] = tuple(value)
    return kind(**values)


def _read_drift(content: Any) -> Drift | None:
    from inductor_x86q.drift import Drift, LayerDrift

    if content is None:
        return None
    found = _read(Drift, content)
    return dataclasses.replace(found, layers=tuple(_read(LayerDrift, x) for x in content["layers"]))


def _renamed(report: Report, taken: set[str]) -> Report:
    clashes = {node.name for node in report.nodes} & taken
    if not clashes:
        return report
    number = 2
    while any(f"{name}_graph{number}" in taken for name in clashes):
        number += 1

    def name(old: str) -> str:
        return f"{old}_graph{number}" if old in clashes else old

    def changed(item: Any) -> Any:
        if isinstance(item, str):
            return name(item)
        if isinstance(item, Node):
            return dataclasses.replace(item, name=name(item.name), inputs=tuple(map(name, item.inputs)))
        if isinstance(item, Kernel):
            return dataclasses.replace(item, nodes=tuple(map(name, item.nodes)))
        return item if isinstance(item, RuleCount) else dataclasses.replace(item, node=name(item.node))

    lists: dict[str, Any] = {kind: [changed(item) for item in getattr(report, kind)] for kind in _KINDS}
    return Report(**lists)


def _total(items: Iterable[Fusion | Miss]) -> int:
    return sum(item.macs or 0 for item in items)


def _count_islands(nodes: Sequence[Node]) -> int:
    """Groups of float operations that read from int8 and write to int8, by union of neighbours."""
    by_name = {node.name: node for node in nodes}
    inside = {
        n.name for n in nodes if n.kind in ("generated", "missed", "kept_float") and n.dtype.startswith(("float", "bf"))
    }
    root = {name: name for name in inside}

    def find(name: str) -> str:
        while root[name] != name:
            name = root[name]
        return name

    reads, writes = set(), set()
    for node in nodes:
        for source in node.inputs:
            if node.name in inside and source in inside:
                root[find(node.name)] = find(source)
            elif node.name in inside and by_name[source].kind in ("dequantize", "fused"):
                reads.add(node.name)
            elif source in inside and node.kind == "quantize":
                writes.add(source)
    return len({find(name) for name in reads} & {find(name) for name in writes})


# --- the table --------------------------------------------------------------------------------------------------------

_SHORT = {"uint8": "u8", "int8": "s8", "float32": "f32", "bfloat16": "bf16", "float16": "f16"}


def short_kernel(fusion: Fusion) -> str:
    """The kernel and what it does behind the product: "qconv +add +relu"."""
    name = f"q{fusion.operator}"
    return " +".join([name, *(operator for operator in fusion.absorbed if operator != "quantize")])


def short_types(fusion: Fusion) -> str:
    """Input × weight → output: "u8×s8→u8"."""
    x, w, y = (_SHORT.get(dtype, dtype) for dtype in (fusion.input_dtype, fusion.weight_dtype, fusion.output_dtype))
    return f"{x}×{w}→{y}"


def short_shape(shape: Sequence[Any]) -> str:
    return "×".join(map(str, shape))


def short_count(number: int | None) -> str:
    if number is None:
        return "?"
    for unit, size in (("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return str(number)


def _table(fused: Sequence[Fusion], width: int) -> str:
    timed = any(f.microseconds is not None for f in fused)
    rows = [["layer", "kernel", "types", "output", "MACs", *(["µs"] if timed else [])]]
    for f in fused:
        row = [f.layer, short_kernel(f), short_types(f), short_shape(f.output_shape), short_count(f.macs)]
        rows.append(row + ([f"{f.microseconds:.1f}" if f.microseconds is not None else ""] if timed else []))
    sizes = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    over = sum(sizes) + 2 * (len(sizes) - 1) - width
    for column in (0, 1):  # the widest columns give way: of a path the end tells more, of a kernel the beginning
        give = min(max(over, 0), max(sizes[column] - 16, 0))
        sizes[column], over = sizes[column] - give, over - give
    lines = []
    for row in rows:
        cells = [_cut(row[0], sizes[0], keep_end=True), _cut(row[1], sizes[1]), *row[2:]]
        aligned = [
            cell.rjust(size) if i >= 4 else cell.ljust(size)
            for i, (cell, size) in enumerate(zip(cells, sizes, strict=True))
        ]
        lines.append("  ".join(aligned).rstrip())
    return "\n".join([lines[0], "─" * min(width, max(map(len, lines))), *lines[1:]])


def _cut(text: str, size: int, keep_end: bool = False) -> str:
    if len(text) <= size:
        return text
    return "…" + text[-(size - 1) :] if keep_end else text[: size - 1] + "…"


def _grouped(misses: Sequence[Miss]) -> list[str]:
    """A line a reason, and below it the layers that it holds for."""
    by_reason: dict[str, list[str]] = {}
    for miss in misses:
        by_reason.setdefault(str(miss.obstacle), []).append(f"{miss.layer} ({miss.operator})")
    return [line for reason, layers in by_reason.items() for line in (f"  {reason}", f"    {', '.join(layers)}")]


# --- reading the graph ------------------------------------------------------------------------------------------------

_PRODUCTS: dict[Any, str] = {
    torch.ops.aten.convolution.default: "conv", torch.ops.aten.linear.default: "linear",
    torch.ops.aten.mm.default: "matmul", torch.ops.aten.addmm.default: "matmul",
    torch.ops.onednn.linear_dynamic_fp16.default: "linear", torch.ops.onednn.linear_relu_dynamic_fp16.default: "linear",
    torch.ops.aten._int_mm.default: "matmul", torch.ops.aten.bmm.default: "matmul", torch.ops.aten.baddbmm.default: "matmul",
}  # fmt: skip
_ATTENTION = "scaled_dot_product"
_RECURRENT = "mkldnn_rnn_layer"  # one direction of one layer of an LSTM


def collect(graph: fx.Graph) -> Report:
    """The report of a graph that has gone through the fuse stage (and not yet through finish)."""
    report = Report([], [], [])
    shown: set[fx.Node] = set()
    for node in graph.nodes:
        kind = _kind(node, shown)
        if kind is None:
            continue
        shown.add(node)
        node.meta["x86q_reported"] = node.name  # what replaces it in a later stage is told by that
        if kind == "fused":
            report.fused.append(_fusion(node))
        elif kind == "product":
            miss = _miss(node)
            kind = "kept_float" if miss.reason in BY_DESIGN else "missed"
            getattr(report, kind).append(miss)
        elif kind == "quantize":
            report.quantizes_left.append(node.name)
        elif kind == "dequantize":
            report.dequantizes_left.append(node.name)
        if kind in ("generated", "quantize", "dequantize"):
            report.generated.append(_operation(node))
        report.nodes.append(_described(node, kind, shown))
    report.kept_float += _weights_read_elsewhere(graph)
    report.notes = _notes(graph)
    return report


# Why a call does not give the graph's own type, for the types of which that can be said.
_GIVE_FLOAT32 = {
    torch.bfloat16: "this CPU has no bf16 instructions: {} give float32 under autocast, which is then rounded to bfloat16",
    torch.float16: "no int8 kernel gives float16: {} give float32, which is then rounded to float16",
}


def _notes(graph: fx.Graph) -> list[str]:
    notes = []
    for dtype, text in _GIVE_FLOAT32.items():
        widened = [layer(node) for node in graph.nodes if node.meta.get("x86q_float32_for") == dtype]
        if widened:
            notes.append(text.format(", ".join(widened)))
    return notes


# What is float for one of these reasons is so by design; for any other, it should have been int8.
BY_DESIGN = frozenset({Reason.NOT_QUANTIZED, Reason.NO_KERNEL})


def _kind(node: fx.Node, shown: set[fx.Node]) -> str | None:
    """What the report calls a node; None for constants and what is computed from them alone."""
    from inductor_x86q import qgraph
    from inductor_x86q.passes.fuse.call import is_call

    if node.op == "placeholder":
        return "input"
    if node.op == "output":
        return "output"
    if node.op != "call_function" or not any(source in shown for source in node.all_input_nodes):
        return None
    if is_call(node):
        return "fused"
    if _is_product(node):
        return "product"
    if qgraph.is_quantize(node) or node.target is qgraph.QUANTIZE_TOKEN:
        return "quantize"
    return "dequantize" if qgraph.is_dequantize(node) or node.target is qgraph.DEQUANTIZE_TOKEN else "generated"


def _is_product(node: fx.Node) -> bool:
    return node.target in _PRODUCTS or _operator(node).startswith(_ATTENTION) or _operator(node) == _RECURRENT


def _operator(node: fx.Node) -> str:
    """The operator's name without namespace and overload."""
    if node.op != "call_function":
        return node.op
    schema = getattr(node.target, "_schema", None)
    name = schema.name.split("::")[-1] if schema else getattr(node.target, "__name__", str(node.target))
    return _PLAIN_NAMES.get(name, name.lstrip("_"))


_PLAIN_NAMES = {
    "_low_memory_max_pool_with_offsets": "max_pool",
    "quantize_per_token": "quantize", "dequantize_per_token": "dequantize",
    "quantize_per_tensor": "quantize", "quantize_per_channel": "quantize",
    "dequantize_per_tensor": "dequantize", "dequantize_per_channel": "dequantize", "convert_element_type": "cast",
    "constant_pad_nd": "pad", "_softmax": "softmax",
}  # fmt: skip


def _miss(node: fx.Node) -> Miss:
    from inductor_x86q.passes.fuse import compute

    if _operator(node) == _RECURRENT:
        operator, macs = "lstm", _recurrent_macs(node)
    elif node.target in _PRODUCTS:
        operator, macs = _PRODUCTS[node.target], node.meta.get("x86q_macs") or compute.macs(node)
    else:
        operator, macs = "attention", _attention_macs(node)
    if operator == "matmul" and _moved_from(_operands(node)[1]).op == "get_attr":
        operator = "linear"
    return Miss(layer(node), operator, _obstacle(node), _shape(node), macs, source(node), node.name)


def _attention_macs(node: fx.Node) -> int | None:
    """Of queries with keys (…, queries, width) and of their weights with values."""
    query, key = (argument.meta["val"].shape for argument in node.args[:2])  # type: ignore[union-attr]
    total = 2 * math.prod(query) * key[-2]
    return int(total) if isinstance(total, int) else None


def _recurrent_macs(node: fx.Node) -> int | None:
    """Of a layer's input (steps, batch, width) and its hidden state, each by a matrix for each of an LSTM's four gates."""
    from inductor_x86q import qgraph

    arguments = qgraph.schema_arguments(node)
    steps, batch, width = arguments["input"].meta["val"].shape
    total = steps * batch * 4 * arguments["hidden_size"] * (width + arguments["hidden_size"])
    return int(total) if isinstance(total, int) else None


def _obstacle(node: fx.Node) -> Obstacle:
    from inductor_x86q import qgraph
    from inductor_x86q.passes.fuse import compute

    if _is_recurrent(node):
        return Obstacle(Reason.NO_KERNEL, "part of a recurrent layer, whose steps torch computes in float only")
    found = _layer_obstacle(node)
    is_float_convolution = node.target is compute.CONVOLUTION and found == Obstacle(Reason.NOT_QUANTIZED)
    if is_float_convolution and any(other.target is qgraph.QUANTIZE_TENSOR for other in node.graph.nodes):
        return Obstacle(Reason.NOT_QUANTIZED, "dynamic quantization is for linears, convolutions need calibration")
    return found


def _is_recurrent(node: fx.Node) -> bool:
    """Whether the node is an LSTM's layer or comes from a module of torch.nn.modules.rnn."""
    stack = node.meta.get("nn_module_stack") or {}
    return _operator(node) == _RECURRENT or any("torch.nn.modules.rnn." in str(kind) for _, kind in stack.values())


def _layer_obstacle(node: fx.Node) -> Obstacle:
    from inductor_x86q import _torch
    from inductor_x86q.passes.fuse import compute, half

    if node.target in half.CALLS:
        return Obstacle(Reason.NOT_QUANTIZED, f"its weight is float16: {node.target}")
    with _torch.disable_modes():  # it looks at the weights' numbers
        if node.target not in (compute.CONVOLUTION, compute.LINEAR):
            return _product_obstacle(node)
        found = compute.obstacle(node)
    assert found is not None, f"{node} is eligible and was not fused"
    return found


def _product_obstacle(node: fx.Node) -> Obstacle:
    """Of a matrix product that the normalize stage did not turn into a linear."""
    from inductor_x86q import qgraph

    if any(isinstance(size, int) and size == 0 for size in _shape(node)):
        return Obstacle(Reason.NO_KERNEL, "an empty result")
    x, weight = _operands(node)
    if node.target is torch.ops.aten._int_mm.default:
        return Obstacle(Reason.NO_KERNEL, "its integer result is read as such, or its second factor is no constant")
    source = _moved_from(weight)
    if source.op == "get_attr":
        if qgraph.is_dequantize(_moved_from(x, through_qdq=False)):
            return Obstacle(Reason.WEIGHT_NOT_QUANTIZED)
        if _holds_int8(qgraph.constant(source)):
            return Obstacle(Reason.NOT_QUANTIZED, "only its weight is int8: left to Inductor, which computes in float")
        return Obstacle(Reason.NOT_QUANTIZED)
    dequantize: Any = _moved_from(weight, through_qdq=False)
    # An input of the graph that is int8, or is quantized as weights are, is taken for one, any other for an activation.
    if source.op == "placeholder" and qgraph.is_dequantize(dequantize):
        given = _moved_from(dequantize.args[0], through_qdq=False) is source
        if not given and not _is_symmetric(qgraph.qparams(dequantize)):
            return Obstacle(Reason.NO_KERNEL, "product of two tensors that are both computed at run time")
        return Obstacle(Reason.WEIGHT_NOT_CONSTANT)
    return Obstacle(Reason.NO_KERNEL, "product of two tensors that are both computed at run time")


def _holds_int8(weight: torch.Tensor | None) -> bool:
    """Whether a float matrix holds 8-bit integers: what constant folding leaves of a weight that is scaled behind."""
    if weight is None or not weight.is_floating_point() or weight.is_mkldnn or weight.numel() < 2:
        return False
    low, high = weight.aminmax()
    return bool(-128 <= low < 0 < high <= 127) and bool((weight == weight.round()).all())


def _operands(node: fx.Node) -> tuple[fx.Node, fx.Node]:
    """The two factors of a product; of attention, queries and keys."""
    position = 1 if _operator(node) in ("addmm", "baddbmm") else 0
    return node.args[position], node.args[position + 1]  # type: ignore[return-value]


def _is_symmetric(parameters: Any) -> bool:
    return parameters.dtype == torch.int8 and isinstance(parameters.zero_point, int) and parameters.zero_point == 0


def _moved_from(node: fx.Node, through_qdq: bool = True) -> fx.Node:
    """Where the elements of `node` come from, through what only moves them and, if asked for, q/dq."""
    from inductor_x86q import qgraph
    from inductor_x86q.passes.movement import is_movement

    while is_movement(node) or (through_qdq and (qgraph.is_quantize(node) or qgraph.is_dequantize(node))):
        node = node.args[0]  # type: ignore[assignment]
    return node


def _weights_read_elsewhere(graph: fx.Graph) -> list[Miss]:
    """Quantized weights that no product reads any more: a linear that was taken apart before the passes saw it."""
    from inductor_x86q import qgraph

    found = []
    for node in graph.nodes:
        tensor = qgraph.constant(node.args[0]) if qgraph.is_dequantize(node) else None
        if tensor is None or tensor.dim() < 2 or tensor.dtype != torch.int8:
            continue
        users = [user for user in node.users if not _is_product(user)]
        if users:
            detail = f"its weight is read by {_operator(users[0])}: the product is too small for a kernel of its own"
            obstacle = Obstacle(Reason.NO_KERNEL, detail)
            macs = math.prod(qgraph.value(node).shape)
            found.append(
                Miss(layer(users[0]), "linear", obstacle, _shape(users[0]), int(macs), source(users[0]), users[0].name)
            )
    return found


def _operation(node: fx.Node) -> Operation:
    inputs = tuple(_dtype(source) for source in node.all_input_nodes if source.op != "get_attr")
    return Operation(layer(node), _operator(node), inputs, _dtype(node), _shape(node), source(node), node.name)


def _described(node: fx.Node, kind: str, shown: set[fx.Node]) -> Node:
    inputs = tuple(source.name for source in node.all_input_nodes if source in shown)
    operator = _PRODUCTS.get(node.target, _operator(node)) if kind != "input" else "input"
    return Node(node.name, kind, operator, layer(node), _dtype(node), _shape(node), inputs)


def _dtype(node: fx.Node) -> str:
    value = node.meta.get("val")
    if isinstance(value, (list, tuple)) and value:
        value = value[0]
    return _name(value.dtype) if isinstance(value, torch.Tensor) else ""


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
        node=node.name,
        input_scale=call.x_scale if call.is_static else None,
        input_zero_point=call.x_zero_point if call.is_static else None,
        output_scale=call.output_scale if call.has_int8_output else None,
        output_zero_point=call.output_zero_point if call.has_int8_output else None,
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _shape(node: fx.Node) -> tuple[Any, ...]:
    value = node.meta.get("val")
    if isinstance(value, (list, tuple)) and value:
        value = value[0]
    if not isinstance(value, torch.Tensor):
        return ()
    return tuple(size if isinstance(size, int) else str(size) for size in value.shape)


# How Dynamo writes the root of the model in a module's path, by how the model reached it.
_ROOTS = ("L__self__.", "L['self'].", "L['model'].", "L['fn'].")


def layer(node: fx.Node) -> str:
    """The path of the module that the node comes from; the node's own name where that is not known."""
    stack = node.meta.get("nn_module_stack")
    if stack:
        path = str(next(reversed(stack.values()))[0])
        for root in _ROOTS:
            path = path.removeprefix(root)
        path = path.replace("L['self'].", "").replace("_modules['", "").replace("']", "")
        if path and not path.startswith("L["):
            return path
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
