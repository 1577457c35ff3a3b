"""The report as one page: totals, the graph as SVG, a table of all layers, and a search over both.

The graph flows from top to bottom, a row a step. Operations that follow one another alone share a box; an edge that
skips rows takes a lane of its own to the right of what it passes.
"""

from __future__ import annotations

import dataclasses
import html
from collections.abc import Iterable, Sequence
from importlib import resources

from inductor_x86q.report.model import Content, Fusion, Miss, Node, Operation
from inductor_x86q.report.text import short_count, short_kernel, short_shape, short_types

WIDTH, HEIGHT, GAP, ROW, LANE = 250, 46, 24, 76, 12


@dataclasses.dataclass
class Box:
    """What is drawn as one: a node, or a chain of generated operations."""

    nodes: list[Node]
    inputs: list[tuple[Box, str]] = dataclasses.field(default_factory=list)  # with the type of the edge
    row: int = 0
    column: float = 0.0

    @property
    def kind(self) -> str:
        return self.nodes[0].kind

    @property
    def x(self) -> float:
        return self.column * (WIDTH + GAP)

    @property
    def y(self) -> float:
        return self.row * ROW


def page(report: Content, title: str) -> str:
    """The page's HTML; it loads nothing from anywhere."""
    template = (resources.files(__package__) / "page.html").read_text(encoding="utf-8")
    parts = {
        "TITLE": html.escape(title),
        "TOTALS": _totals(report),
        "TIMED": "timed" if report.kernels else "untimed",
        "ROWS": _rows(report),
        "GRAPH": _graph(report),
        "PASSES": "".join(
            f"<tr><td>{_e(c.stage)}</td><td>{_e(c.rule)}</td><td class=n>{c.matches}</td></tr>" for c in report.passes
        ),
    }
    for name, text in parts.items():
        template = template.replace(f"<!--{name}-->", text)
    return template


def _e(text: object) -> str:
    return html.escape(str(text))


def _totals(report: Content) -> str:
    cards = [
        (f"{report.int8_share_of_macs:.1%}", "of multiply-accumulates in int8", "int8"),
        (f"{len(report.fused)} / {report.layers}", "layers in int8", "int8"),
        (str(len(report.missed)), "missed", "missed" if report.missed else ""),
        (str(len(report.kept_float)), "float by design", "float" if report.kept_float else ""),
        (f"{len(report.quantizes_left)} + {len(report.dequantizes_left)}", "quantize + dequantize left", ""),
        (str(report.float_islands), "float islands", "float" if report.float_islands else ""),
    ]
    if report.microseconds is not None:
        cards.append((f"{report.microseconds / 1000:.2f} ms", "in kernels", ""))
    return "".join(f'<div class="card {kind}"><b>{_e(value)}</b>{_e(label)}</div>' for value, label, kind in cards)


# --- the table --------------------------------------------------------------------------------------------------------


def _rows(report: Content) -> str:
    order = {node.name: position for position, node in enumerate(report.nodes)}
    layers: list[tuple[Fusion | Miss, str]] = [(f, "fused") for f in report.fused]
    layers += [(m, "kept_float") for m in report.kept_float]
    layers.sort(key=lambda item: order.get(item[0].node, len(order)))
    items: list[tuple[Fusion | Miss | Operation, str]] = [(m, "missed") for m in report.missed]
    items += layers
    items += [(o, "generated") for o in report.generated]
    slowest = max((item.microseconds or 0 for item, _ in items), default=0)
    return "".join(_row(item, kind, slowest) for item, kind in items)


def _row(item: Fusion | Miss | Operation, kind: str, slowest: float) -> str:
    if isinstance(item, Fusion):
        what, types, note = short_kernel(item), short_types(item), _parameters(item)
    elif isinstance(item, Miss):
        what, types, note = item.operator, "float", str(item.obstacle)
    else:
        what, types, note = item.operator, f"{'×'.join(item.input_dtypes)}→{item.output_dtype}", "generated kernel"
    macs = "" if isinstance(item, Operation) else short_count(item.macs)
    time = ""
    if item.microseconds is not None:
        share = 100 * item.microseconds / slowest if slowest else 0
        time = f'<i class=bar style="width:{share:.0f}%"></i><span>{item.microseconds:.1f}</span>'
    cells = (what, types, short_shape(item.output_shape), macs)
    return (
        f'<tr class="{kind}" data-node="{_e(item.node)}" data-layer="{_e(item.layer)}" title="{_e(item.source)}">'
        + f"<td><bdi>{_e(item.layer)}</bdi></td>"
        + "".join(f"<td>{_e(cell)}</td>" for cell in cells)
        + f"<td class=time>{time}</td><td class=note>{_e(note)}</td></tr>"
    )


def _parameters(fusion: Fusion) -> str:
    """Scale @ zero point of input and output."""
    return f"{_grid(fusion.input_scale, fusion.input_zero_point, 'dynamic')} → " + _grid(
        fusion.output_scale, fusion.output_zero_point, fusion.output_dtype
    )


def _grid(scale: float | None, zero_point: int | None, otherwise: str) -> str:
    return otherwise if scale is None else f"{scale:.3g} @ {zero_point}"


# --- the graph --------------------------------------------------------------------------------------------------------


def boxes(nodes: Sequence[Node]) -> list[Box]:
    """The graph's boxes with their places, sources first."""
    users: dict[str, list[Node]] = {node.name: [] for node in nodes}
    for node in nodes:
        for name in node.inputs:
            users[name].append(node)
    by_name = {node.name: node for node in nodes}
    owner: dict[str, Box] = {}
    found: list[Box] = []
    for node in nodes:
        source = by_name[node.inputs[0]] if len(node.inputs) == 1 else None
        alone = source is not None and len(users[source.name]) == 1
        if alone and source is not None and node.kind == source.kind == "generated":
            box = owner[source.name]
            box.nodes.append(node)
        else:
            box = Box([node])
            found.append(box)
            for name in node.inputs:
                box.inputs.append((owner[name], by_name[name].dtype))
        owner[node.name] = box
    _place(found)
    return found


def _place(found: list[Box]) -> None:
    rows: dict[int, list[Box]] = {}
    for box in found:
        box.row = 1 + max((source.row for source, _ in box.inputs), default=-1)
    earliest_use: dict[int, int] = {}
    for box in found:
        for source, _ in box.inputs:
            earliest_use[id(source)] = min(earliest_use.get(id(source), box.row), box.row)
    for box in found:
        if not box.inputs and id(box) in earliest_use:
            box.row = earliest_use[id(box)] - 1  # an input stands where it is first read
        rows.setdefault(box.row, []).append(box)
    for _, row in sorted(rows.items()):
        row.sort(key=lambda box: sum(s.column for s, _ in box.inputs) / max(len(box.inputs), 1))
        for position, box in enumerate(row):
            box.column = position


def _graph(report: Content) -> str:
    found = boxes(report.nodes)
    if not found:
        return "<p>No graph.</p>"
    fused = {fusion.node: fusion for fusion in report.fused}
    misses = {miss.node: miss for miss in (*report.missed, *report.kept_float)}
    timed: list[Fusion | Miss | Operation] = [*report.fused, *report.missed, *report.kept_float, *report.generated]
    times = {item.node: item.microseconds for item in timed}
    edges, right = _edges(found)
    drawn = "".join(_drawn(box, fused, misses, times) for box in found)
    width, height = right + 20, max(box.y for box in found) + HEIGHT + 20
    size = f'viewBox="-10 -10 {width:.0f} {height:.0f}" width="{width:.0f}" height="{height:.0f}"'
    return f"<svg id=graph {size}>{edges}{drawn}</svg>"


def _edges(found: Sequence[Box]) -> tuple[str, float]:
    """The edges, and how far the drawing reaches to the right."""
    widest: dict[int, float] = {}
    for box in found:
        widest[box.row] = max(widest.get(box.row, 0.0), box.x + WIDTH)
    right = max(widest.values())
    taken: list[list[tuple[int, int]]] = []
    drawn = []
    long = [(source, box, dtype) for box in found for source, dtype in box.inputs if box.row - source.row > 1]
    for source, box, dtype in sorted(long, key=lambda edge: edge[1].row - edge[0].row):
        lane = _free_lane(taken, source.row, box.row)
        x = max(widest.get(row, 0.0) for row in range(source.row, box.row + 1)) + GAP / 2 + lane * LANE
        right = max(right, x + GAP)
        drawn.append(_path(_detour(source, box, x), source, box, dtype))
    for box in found:
        for source, dtype in box.inputs:
            if box.row - source.row == 1:
                x1, y1, x2, y2 = source.x + WIDTH / 2, source.y + HEIGHT, box.x + WIDTH / 2, box.y
                middle = (y1 + y2) / 2
                drawn.append(_path(f"M{x1} {y1}C{x1} {middle} {x2} {middle} {x2} {y2}", source, box, dtype))
    return "".join(drawn), right


def _free_lane(taken: list[list[tuple[int, int]]], first: int, last: int) -> int:
    for lane, spans in enumerate(taken):
        if all(last <= start or end <= first for start, end in spans):
            spans.append((first, last))
            return lane
    taken.append([(first, last)])
    return len(taken) - 1


def _detour(source: Box, target: Box, x: float) -> str:
    y1, y2 = source.y + HEIGHT - 12, target.y + 12
    return f"M{source.x + WIDTH} {y1}H{x - 6:.0f}q6 0 6 6V{y2 - 6:.0f}q0 6 -6 6H{target.x + WIDTH + 3}"


def _path(points: str, source: Box, target: Box, dtype: str) -> str:
    kind = {"uint8": "int8", "int8": "int8", "bfloat16": "bf16", "float16": "bf16"}.get(dtype, "fp32")
    names = f"{source.nodes[-1].name} → {target.nodes[0].name}: {dtype}"
    return f'<path class="e {kind}" d="{points}"><title>{_e(names)}</title></path>'


def _drawn(box: Box, fused: dict[str, Fusion], misses: dict[str, Miss], times: dict[str, float | None]) -> str:
    node = box.nodes[0]
    fusion, miss = fused.get(node.name), misses.get(node.name)
    if fusion is not None:
        first, second = short_kernel(fusion), f"{fusion.layer}"
    elif miss is not None:
        first, second = f"{miss.operator} in float: {miss.reason.name.lower().replace('_', ' ')}", miss.layer
    else:
        first = " · ".join(dict.fromkeys(n.operator for n in box.nodes if n.operator != "getitem")) or "getitem"
        second = node.layer if node.layer != node.name else ""
    time = times.get(node.name)
    shape = short_shape(box.nodes[-1].shape)
    corner = f"{time:.0f} µs" if time is not None else shape
    detail = (
        [n.name for n in box.nodes] + ([str(miss.obstacle)] if miss else []) + ([_parameters(fusion)] if fusion else [])
    )
    names, layers = (
        " ".join(dict.fromkeys(texts)) for texts in ((n.name for n in box.nodes), (n.layer for n in box.nodes))
    )
    attributes = f'data-node="{_e(names)}" data-layer="{_e(layers)}"'
    parts = [
        f'<g class="b {box.kind}" {attributes} transform="translate({box.x:.0f} {box.y:.0f})">',
        f"<title>{_e(chr(10).join([*detail, shape]))}</title><rect width={WIDTH} height={HEIGHT} rx=6 />",
        *_absorbed_frames(fusion),
        f"<text x=10 y=18>{_e(_cut(first, 36))}</text>",
        f"<text class=l x=10 y=36>{_e(_cut(second, max(8, 32 - len(corner))))}</text>",
        f'<text class=s x={WIDTH - 8} y=36 text-anchor="end">{_e(corner)}</text></g>',
    ]
    return "".join(parts)


def _absorbed_frames(fusion: Fusion | None) -> Iterable[str]:
    """A second frame around a call that does more than the product: a fused region."""
    if fusion is not None and fusion.absorbed:
        yield f"<rect class=region x=-4 y=-4 width={WIDTH + 8} height={HEIGHT + 8} rx=9 />"


def _cut(text: str, size: int) -> str:
    return text if len(text) <= size else text[: size // 3] + "…" + text[-(size - size // 3 - 1) :]
