"""The graph as JSON for model-explorer, a viewer of large graphs: its graph collection with one graph in it."""

from __future__ import annotations

import json
from typing import Any

from inductor_x86q.report.html_data import facts, modules
from inductor_x86q.report.model import Content, Fusion, Miss, Node, Operation
from inductor_x86q.report.text import short_kernel, short_shape

_COLORS = {
    "fused": "#cdebd5",
    "missed": "#d11a2a",
    "kept_float": "#fbdcb0",
    "quantize": "#dde3fb",
    "dequantize": "#dde3fb",
}


def write(report: Content, title: str) -> str:
    described: list[Fusion | Miss | Operation] = [
        *report.fused, *report.missed, *report.kept_float, *report.generated
    ]  # fmt: skip
    items = {item.node: item for item in described}
    paths = modules(report.nodes)
    nodes = [_node(node, paths[node.name], items.get(node.name)) for node in report.nodes]
    return json.dumps({"label": title, "graphs": [{"id": title, "nodes": nodes}]}, indent=1)


def _node(node: Node, path: str, item: Fusion | Miss | Operation | None) -> dict[str, Any]:
    attributes = facts(item) if item is not None else [("type", node.dtype), ("shape", short_shape(node.shape))]
    if isinstance(item, Miss):
        attributes = [("why not int8", str(item.obstacle)), *attributes]
    edges = [
        {"sourceNodeId": name, "sourceNodeOutputId": "0", "targetNodeInputId": str(position)}
        for position, name in enumerate(node.inputs)
    ]
    output = [{"key": "tensor_shape", "value": f"{node.dtype}[{', '.join(map(str, node.shape))}]"}]
    return {
        "id": node.name,
        "label": short_kernel(item) if isinstance(item, Fusion) else node.operator,
        "namespace": path.replace("/", "_").replace(".", "/"),
        "attrs": [{"key": key, "value": value} for key, value in attributes if value],
        "incomingEdges": edges,
        "outputsMetadata": [{"id": "0", "attrs": output}],
        "style": {"backgroundColor": _COLORS[node.kind]} if node.kind in _COLORS else {},
    }
