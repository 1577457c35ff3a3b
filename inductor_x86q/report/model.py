"""What a report holds: the items, and the totals over them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

from inductor_x86q.graph.disjoint_sets import DisjointSets
from inductor_x86q.graph.reasons import Obstacle, Reason
from inductor_x86q.report import tables
from inductor_x86q.report.tables import Column, Table


@dataclasses.dataclass(frozen=True)
class Fusion:
    """An int8 kernel and what it stands for. Shapes are strings where a size is not known when compiling."""

    layer: str  # the module's path in the model
    kernel: str  # e.g. onednn.qconv_pointwise
    operator: str  # "conv", "linear", "attention", "embedding", or a recurrent layer's steps: "lstm", "gru", "rnn_tanh", "rnn_relu"
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
    computed_by: str = ""  # the kernel of ours that computes it, where one does


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
class Code:
    """A call in the generated code, and the kernel that it calls."""

    name: str
    nodes: tuple[str, ...]
    call: str
    kernel: str  # its C++; empty where the call is of a library's operator


@dataclasses.dataclass(frozen=True)
class RuleCount:
    """How often a rule of a stage matched; seconds are those of its whole stage."""

    stage: str
    rule: str
    matches: int
    seconds: float


@dataclasses.dataclass(frozen=True)
class LayerDrift:
    """One convolution, linear or matrix product. Signal-to-noise ratios in dB; None where nothing differs."""

    layer: str
    operator: str
    here: float | None  # of its result, all layers in int8
    alone: float | None  # of the model's output, no other layer in int8
    share: float  # of the noise that all layers cause alone, 0 to 1


@dataclasses.dataclass(frozen=True)
class Drift:
    """Signal-to-noise ratios against float32 in dB, None where nothing differs; `layers` has the worst first."""

    output: float | None  # of the quantized graph's output
    layers: tuple[LayerDrift, ...]
    weights: bool  # whether the rounding of weights is in it
    exclude: tuple[str, ...] = ()  # the worst layers, where excluding these few pays
    excluded: float | None = None  # of the output then

    def __str__(self) -> str:
        return tables.plain(self.__rich__(), tables.UNLIMITED)

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """What Jupyter shows of it."""
        printer.text(str(self))

    def __rich__(self) -> Any:
        numbers = ("at the layer", "at the output, alone", "share of the noise")
        table = Table(Column("layer", style="cyan"), "operator", *(Column(title, right=True) for title in numbers))
        for x in self.layers:
            table.add(x.layer, x.operator, _db(x.here), _db(x.alone), f"{x.share:.0%}")
        lines = [f"exclude={list(self.exclude)!r} pays: {_db(self.excluded)} at the output"] if self.exclude else []
        if not self.weights:
            lines.append(
                "what the rounding of weights costs is not in it: that needs the float model, with channels as they are in the graph"
            )
        title = f"drift from float32, as signal-to-noise ratio: {_db(self.output)} at the output"
        return tables.group(title, table, *lines)


def _db(ratio: float | None) -> str:
    return "exact" if ratio is None else f"{ratio:.1f} dB"


@dataclasses.dataclass(frozen=True)
class Moved:
    """A layer that a search for a budget of accuracy moved out of int8, why, and what that costs."""

    layer: str
    dtype: str  # bfloat16 or float32
    share_of_noise: float  # of what all layers in int8 cause alone
    share_of_macs: float  # of the network's multiply-accumulates
    int8_microseconds: float | None = None  # None: not measured
    microseconds: float | None = None  # in `dtype`


@dataclasses.dataclass(frozen=True)
class Step:
    """A graph that the search has tried."""

    what: str
    metric: float
    share_of_macs: float  # out of int8
    milliseconds: float | None  # of a call, as the times of its layers make it


@dataclasses.dataclass(frozen=True)
class Tuning:
    """What the search for a budget found; the graph that `quantize` returned has it as `tuning`."""

    float_metric: float
    int8_metric: float  # with every layer in int8 and no correction but those that were asked for
    metric: float  # of the graph that was returned, on the same data
    max_drop: float
    moved: tuple[Moved, ...]
    corrected: tuple[str, ...]  # what was taken of accuracy="best"
    evaluations: int
    seconds: float
    interrupted: bool = False
    steps: tuple[Step, ...] = ()  # in the order in which they were tried
    before: Drift | None = None  # of int8 throughout; None where nothing had to be changed
    after: Drift | None = None

    @property
    def share_of_macs(self) -> float:
        """Of the multiply-accumulates, what moved out of int8."""
        return sum(layer.share_of_macs for layer in self.moved)

    @property
    def arguments(self) -> dict[str, Any]:
        """What gives the same graph without a search, beside the other arguments of `quantize`."""
        modes = {x.layer: "float" if x.dtype == "float32" else x.dtype for x in self.moved}
        return {
            **({"accuracy": list(self.corrected)} if self.corrected else {}),
            **({"config": modes} if modes else {}),
        }

    def summary(self) -> list[str]:
        """What is to be said beside the table of layers, a line each."""
        lines = [
            f"metric: float32 {self.float_metric:.4g}, int8 {self.int8_metric:.4g}, now {self.metric:.4g}; a drop of "
            f"{self.max_drop:.4g} is allowed ({self.evaluations} evaluations, {self.seconds:.0f} s)"
        ]
        if self.interrupted:
            lines.append("interrupted: fewer layers out of int8 might have been enough")
        if self.before is not None and self.after is not None:
            lines.append(f"drift at the output: {_db(self.before.output)} before, {_db(self.after.output)} after")
        if self.arguments:
            text = ", ".join(f"{name}={value!r}" for name, value in self.arguments.items())
            lines.append(f"the same without a search: quantize(..., {text})")
        return lines if self.moved else [*lines, "every layer is in int8"]

    def __str__(self) -> str:
        return tables.plain(self.__rich__(), tables.UNLIMITED)

    def __rich__(self) -> Any:
        titles = ("of the noise", "of the MACs", "µs in int8", "µs now")
        table = Table(Column("layer", style="cyan"), "now in", *(Column(title, right=True) for title in titles))
        for x in self.moved:
            times = ("" if time is None else f"{time:.1f}" for time in (x.int8_microseconds, x.microseconds))
            table.add(x.layer, x.dtype, f"{x.share_of_noise:.0%}", f"{x.share_of_macs:.1%}", *times)
        return tables.group(*([table] if self.moved else []), *self.summary())


@dataclasses.dataclass
class Content:
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
    code: list[Code] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)
    drift: Drift | None = None  # where it was asked for
    tuning: Tuning | None = None  # where the graph was made within a budget of accuracy

    def extend(self, other: Content) -> None:
        """Adds what another graph of the same model became; its nodes get new names where both use one."""
        other = _renamed(other, {node.name for node in self.nodes})
        for name in KINDS:
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
    def float_subgraphs(self) -> int:
        """How many groups of connected float operations stand between int8 and int8."""
        return _count_float_subgraphs(self.nodes)

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
            "float_subgraphs": self.float_subgraphs,
            "microseconds": self.microseconds,
        }


KINDS: dict[str, Any] = {
    "fused": Fusion, "missed": Miss, "kept_float": Miss, "quantizes_left": str, "dequantizes_left": str,
    "generated": Operation, "nodes": Node, "passes": RuleCount, "kernels": Kernel, "code": Code, "notes": str,
}  # fmt: skip


def _renamed(report: Content, taken: set[str]) -> Content:
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
        if isinstance(item, (Kernel, Code)):
            return dataclasses.replace(item, nodes=tuple(map(name, item.nodes)))
        return item if isinstance(item, RuleCount) else dataclasses.replace(item, node=name(item.node))

    lists: dict[str, Any] = {kind: [changed(item) for item in getattr(report, kind)] for kind in KINDS}
    return Content(**lists)


def _total(items: Iterable[Fusion | Miss]) -> int:
    return sum(item.macs or 0 for item in items)


def _count_float_subgraphs(nodes: Sequence[Node]) -> int:
    """Groups of float operations that read from int8 and write to int8."""
    by_name = {node.name: node for node in nodes}
    inside = {
        n.name for n in nodes if n.kind in ("generated", "missed", "kept_float") and n.dtype.startswith(("float", "bf"))
    }
    subgraphs: DisjointSets[str] = DisjointSets()
    reads, writes = set(), set()
    for node in nodes:
        for source in node.inputs:
            if node.name in inside and source in inside:
                subgraphs.join(source, node.name)
            elif node.name in inside and by_name[source].kind in ("dequantize", "fused"):
                reads.add(node.name)
            elif source in inside and node.kind == "quantize":
                writes.add(source)
    return len({subgraphs.root(name) for name in reads} & {subgraphs.root(name) for name in writes})
