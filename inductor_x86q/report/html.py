"""The report as one page: totals, a table of all layers, the graph and a panel for what is selected.

Totals and table are written here, so that they stand there before any script runs. The rest is drawn by the scripts in
page/ from what html_data.py gives them; dagre lays the graph out. All of it is written into the one file. What a model
or a user named is text in it and never markup; besides, the page's policy lets no script run but the page's own, and
loads nothing.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from collections.abc import Sequence
from importlib import resources

from inductor_x86q.report import html_data
from inductor_x86q.report.compare import Change, changes
from inductor_x86q.report.html_data import Item, before_text, grid
from inductor_x86q.report.model import Content, Fusion, LayerDrift, Miss, Operation
from inductor_x86q.report.text import short_count, short_kernel, short_shape, short_types

SCRIPTS = ("blocks.js", "graph.js", "view.js", "panel.js", "main.js")  # in the order in which they use each other


def page(report: Content, title: str, compare: Content | None = None) -> str:
    """The page's HTML; `compare` is the report of before, with which this one is compared."""
    found = changes(compare, report) if compare is not None else []
    script = _script()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    parts = {
        "POLICY": f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'",
        "STYLE": _file("style.css"),
        "TITLE": html.escape(title),
        "TOTALS": _totals(report, compare),
        "TABLE": " ".join(["timed" if report.kernels else "untimed", "compared" if compare is not None else "single"]),
        "ROWS": _rows(report, found),
        "PASSES": "".join(
            f"<tr><td>{_e(c.stage)}</td><td>{_e(c.rule)}</td><td class=n>{c.matches}</td></tr>" for c in report.passes
        ),
        "NOTES": "".join(f"<p class=remark>{_e(note)}</p>" for note in dict.fromkeys(report.notes)) + _accuracy(report),
        "DATA": json.dumps(html_data.page_data(report, found), separators=(",", ":")).replace("<", "\\u003c"),
        "SCRIPT": script,
    }
    return re.sub(r"<!--([A-Z]+)-->", lambda match: parts[match.group(1)], _file("template.html"))


def frame(page: str, height: int = 720) -> str:
    """A page inside of another, for notebooks: it neither sees nor styles what is around it."""
    style = f"width: 100%; height: {height}px; border: 1px solid #8884; border-radius: 6px"
    return f'<iframe title="int8 report" style="{style}" sandbox="allow-scripts" srcdoc="{html.escape(page)}"></iframe>'


def _file(name: str) -> str:
    return (resources.files(__package__) / "page" / name).read_text(encoding="utf-8")


def _script() -> str:
    """dagre under its licence, without the link to its source map, and the page's own scripts."""
    dagre = _file("dagre.min.js").partition("//# sourceMappingURL")[0]
    own = "".join(map(_file, SCRIPTS))
    return f"/* dagre\n{_file('dagre.LICENSE.txt')}*/\n{dagre}\n{own}"


def _e(text: object) -> str:
    return html.escape(str(text))


def _totals(report: Content, before: Content | None) -> str:
    cards = _cards(report)
    old = {label: value for value, label, _ in _cards(before)} if before is not None else {}
    parts = []
    for value, label, kind in cards:
        was = f"<span class=was>was {_e(old[label])}</span>" if old.get(label, value) != value else ""
        parts.append(f'<div class="card {kind}"><b>{_e(value)}{was}</b>{_e(label)}</div>')
    return "".join(parts)


def _cards(report: Content) -> list[tuple[str, str, str]]:
    """Value, label and kind of each."""
    cards = [
        (f"{report.int8_share_of_macs:.1%}", "of multiply-accumulates in int8", "int8"),
        (f"{len(report.fused)} / {report.layers}", "layers in int8", "int8"),
        (str(len(report.missed)), "missed", "missed" if report.missed else ""),
        (str(len(report.kept_float)), "float by design", "float" if report.kept_float else ""),
        (f"{len(report.quantizes_left)} + {len(report.dequantizes_left)}", "quantize + dequantize left", ""),
        (str(report.float_subgraphs), "float subgraphs", "float" if report.float_subgraphs else ""),
    ]
    if report.microseconds is not None:
        cards.append((f"{report.microseconds / 1000:.2f} ms", "in kernels", ""))
    return cards


def _accuracy(report: Content) -> str:
    """The search for a budget, and the drift of each layer, before it and now."""
    tuning, drift = report.tuning, report.drift
    before = tuning.before if tuning is not None else None
    after = drift or (tuning.after if tuning is not None else None)
    if tuning is None and after is None:
        return ""
    title = "accuracy: what int8 costs, layer by layer"
    parts = [f"<p>{_e(line)}</p>" for line in tuning.summary()] if tuning is not None else []
    if tuning is not None and tuning.moved:
        rows = [
            [
                x.layer,
                x.dtype,
                f"{x.share_of_noise:.0%}",
                f"{x.share_of_macs:.1%}",
                *map(_time, (x.int8_microseconds, x.microseconds)),
            ]
            for x in tuning.moved
        ]
        parts.append(_plain_table(["layer", "now in", "of the noise", "of the MACs", "µs in int8", "µs now"], rows))
    if after is not None:
        was = {x.layer: x for x in (before.layers if before is not None else ())}
        now = {x.layer: x for x in after.layers}
        rows = [
            [name, *(_ratio(found.get(name)) for found in ((was, now) if was else (now,)))] for name in {**was, **now}
        ]
        columns = ["before", "now"] if was else ["signal-to-noise ratio at the output, of this layer alone"]
        parts.append(_plain_table(["layer", *columns], rows))
    return f"<details class=remark id=accuracy><summary>{title}</summary>{''.join(parts)}</details>"


def _plain_table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{_e(title)}" for title in titles)
    body = "".join("<tr>" + "".join(f"<td>{_e(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _time(microseconds: float | None) -> str:
    return "" if microseconds is None else f"{microseconds:.1f}"


def _ratio(layer: LayerDrift | None) -> str:
    if layer is None:
        return "not in int8"
    return "exact" if layer.alone is None else f"{layer.alone:.1f} dB"


# --- the table --------------------------------------------------------------------------------------------------------


def _rows(report: Content, found: Sequence[Change]) -> str:
    order = {node.name: position for position, node in enumerate(report.nodes)}
    layers: list[tuple[Item, str]] = [(f, "fused") for f in report.fused]
    layers += [(m, "kept_float") for m in report.kept_float]
    layers.sort(key=lambda item: order.get(item[0].node, len(order)))
    items: list[tuple[Item, str]] = [(m, "missed") for m in report.missed]
    items += layers
    items += [(o, "generated") for o in report.generated]
    slowest = max((item.microseconds or 0 for item, _ in items), default=0)
    of_node = {change.after.node: change for change in found if change.after is not None}
    rows = [_row(item, kind, slowest, of_node.get(item.node)) for item, kind in items]
    rows += [_row(change.before, "gone", slowest, change) for change in found if change.before and not change.after]
    return "".join(rows)


def _row(item: Item, kind: str, slowest: float, change: Change | None) -> str:
    macs = "" if isinstance(item, Operation) else short_count(item.macs)
    time = ""
    if item.microseconds is not None and kind != "gone":
        share = 100 * item.microseconds / slowest if slowest else 0
        time = f'<i class=bar style="width:{share:.0f}%"></i><span>{item.microseconds:.1f}</span>'
    changed = f' data-change="{change.kind}"' if change is not None and change.kind != "same" else ""
    before = f"<td class=before>{_e(_before(change))}</td>"
    return (
        f'<tr class="{kind}" data-node="{_e(item.node)}" data-layer="{_e(item.layer)}"{changed} '
        + f'title="{_e(item.source)}" tabindex=-1>'
        + f"<td><bdi>{_e(item.layer)}</bdi></td>{before}"
        + _computed_by(item)
        + f"<td>{macs}</td><td class=time>{time}</td><td class=note>{_e(_parameters(item))}</td></tr>"
    )


def _computed_by(item: Item) -> str:
    """Kernel, types and shape; of what is not int8 the reason stands in their place."""
    if isinstance(item, Miss):
        return f"<td class=reason colspan=3><div><b>{_e(item.operator)}</b>{_e(item.obstacle)}</div></td>"
    if isinstance(item, Fusion):
        cells = (short_kernel(item), short_types(item))
    else:
        cells = (item.operator, f"{'×'.join(item.input_dtypes)}→{item.output_dtype}")
    return "".join(f"<td>{_e(cell)}</td>" for cell in (*cells, short_shape(item.output_shape)))


def _before(change: Change | None) -> str:
    if change is None or change.kind == "same":
        return "" if change is None else before_text(change)
    return f"{change.kind}: {before_text(change)}"


def _parameters(item: Item) -> str:
    """Scale @ zero point of input and output."""
    if not isinstance(item, Fusion):
        return ""
    return f"{grid(item.input_scale, item.input_zero_point, 'dynamic')} → " + grid(
        item.output_scale, item.output_zero_point, item.output_dtype
    )
