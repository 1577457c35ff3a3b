"""What the page's script draws and shows: the graph, what the side panel says of each node, the generated code.

graph     boxes in the graph's order: {"names", "kind", "path", "layer", "title", "region", "corner", "in": [[box, type]]};
          a box is a node or a chain of generated operations of one module, its path that module's
items     what the panel says, by the node's name: {"title", "kind", "layer", "facts": [[label, text]], "reason",
          "code": numbers into `code`, "change": [kind, before]}
nodes     [name, operator, type, shape] of every node
bars      [node, number, text], in the order in which they run: measured microseconds of each kernel's call, or where
          nothing was `timed` the multiply-accumulates of each layer
drift     [layer, what int8 costs there]
code      {"name", "call", "kernel"}: the kernel is a number into `kernels`, null for a library's operator
kernels   C++, each text once
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from inductor_x86q.report.compare import Change, described
from inductor_x86q.report.model import Content, Fusion, Miss, Node, Operation
from inductor_x86q.report.text import short_count, short_kernel, short_shape, short_types

Item = Fusion | Miss | Operation
LONGEST_KERNEL = 20_000


@dataclasses.dataclass
class Box:
    """What is drawn as one: a node, or a chain of generated operations of one module."""

    nodes: list[Node]
    path: str
    inputs: list[tuple[int, str]]  # a box's number, the type of the edge


def page_data(report: Content, changes: Sequence[Change] = ()) -> dict[str, Any]:
    by_node = {change.after.node: change for change in changes if change.after is not None}
    kinds: tuple[tuple[str, Sequence[Item]], ...] = (
        ("fused", report.fused), ("missed", report.missed), ("kept_float", report.kept_float),
        ("generated", report.generated),
    )  # fmt: skip
    items = {item.node: (item, kind) for kind, found in kinds for item in found}
    calls: dict[str, list[int]] = {}
    for number, call in enumerate(report.code):
        for node in call.nodes:
            calls.setdefault(node, []).append(number)
    kernels = list(dict.fromkeys(call.kernel for call in report.code if call.kernel))
    place = {kernel: number for number, kernel in enumerate(kernels)}
    return {
        "graph": [_drawn(box, items) for box in boxes(report.nodes)],
        "items": [
            [node, _item(item, kind, calls.get(node, []), by_node.get(node))] for node, (item, kind) in items.items()
        ],
        "nodes": [[n.name, n.operator, n.dtype, short_shape(n.shape)] for n in report.nodes],
        "code": [{"name": c.name, "call": c.call, "kernel": place.get(c.kernel)} for c in report.code],
        "kernels": [_shortened(kernel) for kernel in kernels],
        "drift": _drift(report),
        "bars": _bars(report),
        "timed": bool(report.kernels),
    }


def _shortened(kernel: str) -> str:
    """Inductor unrolls some loops into megabytes; the beginning says it."""
    if len(kernel) <= LONGEST_KERNEL:
        return kernel
    return f"{kernel[:LONGEST_KERNEL]}\n... {len(kernel) - LONGEST_KERNEL:,} characters more: cpp_code(layer=...) or x86q code --layer shows all"


def _bars(report: Content) -> list[tuple[str, float, str]]:
    if report.kernels:
        return [
            (kernel.nodes[0], kernel.microseconds, f"{', '.join(kernel.layers)}: {kernel.microseconds:.1f} µs")
            for kernel in report.kernels
            if kernel.nodes
        ]
    layers: list[Fusion | Miss] = [*report.fused, *report.missed, *report.kept_float]
    place = {node.name: position for position, node in enumerate(report.nodes)}
    layers.sort(key=lambda layer: place.get(layer.node, len(place)))
    return [(layer.node, layer.macs, f"{layer.layer}: {short_count(layer.macs)}") for layer in layers if layer.macs]


def _drift(report: Content) -> list[list[str]]:
    """Layer, and what int8 costs there."""
    if report.drift is None:
        return []
    return [
        [x.layer, f"{'exact' if x.here is None else f'{x.here:.1f} dB'} here, {x.share:.0%} of the output's noise"]
        for x in report.drift.layers
    ]


# --- the graph --------------------------------------------------------------------------------------------------------


def boxes(nodes: Sequence[Node]) -> list[Box]:
    """The graph's boxes, sources first. Generated operations of one module that follow one another alone share one."""
    users: dict[str, list[Node]] = {node.name: [] for node in nodes}
    for node in nodes:
        for name in node.inputs:
            users[name].append(node)
    by_name = {node.name: node for node in nodes}
    paths = modules(nodes)
    owner: dict[str, int] = {}
    found: list[Box] = []
    for node in nodes:
        source = by_name[node.inputs[0]] if len(node.inputs) == 1 else None
        if source is not None and len(users[source.name]) == 1 and _is_chain(source, node, paths):
            number = owner[source.name]
            found[number].nodes.append(node)
        else:
            number = len(found)
            inputs = [(owner[name], by_name[name].dtype) for name in node.inputs]
            found.append(Box([node], paths[node.name], inputs))
        owner[node.name] = number
    return found


def _is_chain(source: Node, node: Node, paths: Mapping[str, str]) -> bool:
    return node.kind == source.kind == "generated" and paths[source.name] == paths[node.name]


def modules(nodes: Sequence[Node]) -> dict[str, str]:
    """The module of each node, by its name.

    Of what the passes made and what stands in no module, the layer is the node's own name; it belongs to the module
    that holds both what it reads and what reads it. Inputs and outputs stand in none.
    """
    below: dict[str, list[str]] = {node.name: [] for node in nodes}  # the modules of what reads it
    above: dict[str, str] = {}
    for node in nodes:
        known = _module(node)
        above[node.name] = _common([above[name] for name in node.inputs]) if known is None else known
    found: dict[str, str] = {}
    for node in reversed(nodes):
        known, readers = _module(node), below[node.name]
        found[node.name] = _common([above[node.name], *readers]) if known is None else known
        for name in node.inputs:
            below[name].append(_common(readers) if known is None else known)
    return found


def _module(node: Node) -> str | None:
    if node.kind in ("input", "output"):
        return ""
    return None if node.layer == node.name else node.layer


def _common(paths: Sequence[str]) -> str:
    """The innermost module that holds all of them."""
    shared = itertools.takewhile(
        lambda parts: len(set(parts)) == 1, zip(*(path.split(".") for path in paths), strict=False)
    )
    return ".".join(parts[0] for parts in shared)


def _drawn(box: Box, items: Mapping[str, tuple[Item, str]]) -> dict[str, Any]:
    node = box.nodes[0]
    item = items[node.name][0] if node.name in items else None
    if isinstance(item, Fusion):
        title = short_kernel(item)
    elif isinstance(item, Miss):
        title = f"{item.operator} in float: {item.reason.name.lower().replace('_', ' ')}"
    else:
        title = " · ".join(dict.fromkeys(n.operator for n in box.nodes if n.operator != "getitem")) or "getitem"
    times = [i.microseconds for i in (items[n.name][0] for n in box.nodes if n.name in items) if i.microseconds]
    return {
        "names": [n.name for n in box.nodes],
        "kind": node.kind,
        "path": box.path,
        "layer": node.layer,
        "title": title,
        "region": isinstance(item, Fusion) and bool(item.absorbed),
        "corner": f"{max(times):.0f} µs" if times else short_shape(box.nodes[-1].shape),
        "in": [list(source) for source in box.inputs],
    }


# --- the panel --------------------------------------------------------------------------------------------------------


def _item(item: Item, kind: str, calls: list[int], change: Change | None) -> dict[str, Any]:
    return {
        "title": item.layer,
        "kind": kind,
        "facts": [[label, text] for label, text in facts(item) if text],
        "reason": str(item.obstacle) if isinstance(item, Miss) else "",
        "code": calls,
        "change": [change.kind, before_text(change)] if change is not None and change.kind != "same" else None,
    }


def before_text(change: Change) -> str:
    """What the layer was before, with its time; only the time where nothing else changed."""
    before = change.before
    if before is None:
        return "not there"
    time = [] if before.microseconds is None else [f"{before.microseconds:.1f} µs"]
    return ", ".join(time if change.kind == "same" else [described(before), *time])


def facts(item: Item) -> list[tuple[str, str]]:
    time = "" if item.microseconds is None else f"{item.microseconds:.1f} µs"
    if isinstance(item, Operation):
        types = f"{', '.join(item.input_dtypes)} → {item.output_dtype}"
        first = [("operator", item.operator), ("runs in", "a kernel that Inductor generates"), ("types", types)]
        time += " for the whole kernel" if time else ""
    elif isinstance(item, Fusion):
        first = [
            ("kernel", item.kernel), ("computed by", item.computed_by or _library(item)), ("computes", " → ".join([item.operator, *item.absorbed])), ("types", short_types(item)),
            ("input", grid(item.input_scale, item.input_zero_point, "scale computed at run time")),
            ("output", grid(item.output_scale, item.output_zero_point, item.output_dtype)),
        ]  # fmt: skip
    else:
        first = [("operator", f"{item.operator}, in float")]
    macs = "" if isinstance(item, Operation) else short_count(item.macs)
    rest = [("shape", short_shape(item.output_shape)), ("MACs", macs), ("time", time), ("source", item.source)]
    return [*first, *rest, ("node", item.node)]


def _library(fusion: Fusion) -> str:
    """What computes an operator that no kernel of ours does."""
    return "oneDNN" if fusion.kernel.startswith("onednn.") else "a kernel that Inductor generates"


def grid(scale: float | None, zero_point: int | None, otherwise: str) -> str:
    """Scale @ zero point, or what is said where there is none."""
    return otherwise if scale is None else f"{scale:.3g} @ {zero_point}"
