"""The tables and the picture of measurements in README.md and the pages, made of `tools/benchmarks/*.json`.

    python -m inductor_x86q.tools.results           # prints every table
    python -m inductor_x86q.tools.results --write   # puts them between their markers, and draws the picture

A file there is what `x86q bench --json` or `x86q coverage --json` wrote, with a `title` and `notes` added by hand. Its
`source` says where the figures are from.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from inductor_x86q.tools import bench
from inductor_x86q.tools.engines import BASELINE
from inductor_x86q.tools.sequences import NETWORKS

FOLDER = Path(__file__).parent / "benchmarks"
ROOT = Path(__file__).parent.parent.parent
PAGES = (ROOT / "README.md", FOLDER / "README.md")
PICTURE = FOLDER / "latency.svg"

ENGINES = {
    BASELINE: "float32 Inductor",
    "stock-int8": "PyTorch's own int8",
    "x86q": "x86q",
    "x86q-max-autotune": "x86q, `max-autotune`",
    "x86q-package": "x86q, package",
    "x86q-package-max-autotune": "x86q, package, `max-autotune`",
    "openvino-int8": "OpenVINO int8",
    "onnxruntime-int8": "ONNX Runtime int8",
    "x86q-dynamic": "x86q, per token",
    "onnxruntime-dynamic": "ONNX Runtime dynamic",
    "torch-dynamic": "PyTorch's `quantize_dynamic`",
}
DRAWN = ("mobilenet_v2", "efficientnet_b0", "resnet50", "vit_b_16")
_BLOCK = re.compile(r"(<!-- python -m inductor_x86q.tools.results: ([\w-]+) -->\n).*?(<!-- -->)", re.DOTALL)


def load(name: str) -> dict[str, Any]:
    """One file of measurements."""
    found: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_text())
    return found


def _markdown(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    names = list(header)
    lines = [names, ["---", *["---:"] * (len(names) - 1)], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _number(value: float) -> str:
    """Up to three digits, and all in front of the point: 1.36, 9.8, 11.6, 1084."""
    return "–" if math.isnan(value) else f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def latency(body: dict[str, Any]) -> str:
    """Milliseconds a call, a row for a network and a column for an engine, the smallest bold."""
    table = bench.from_json(body)
    engines = [name for name in ENGINES if any(r.engine == name for rows in table.values() for r in rows)]
    lines = []
    for network, results in table.items():
        medians = {r.engine: r.median for r in results if not math.isnan(r.median)}
        best = min(medians.values())
        cells = [(_number(value), value == best) for value in (medians.get(name, math.nan) for name in engines)]
        lines.append([network, *(f"**{cell}**" if bold else cell for cell, bold in cells)])
    return _markdown(["ms", *(ENGINES[name] for name in engines)], lines)


def means(body: dict[str, Any]) -> str:
    """How many times as fast as float32 each engine is, and ours as the others."""
    table = bench.from_json(body)
    lines = []
    for ours, baseline in (
        ("x86q", "stock-int8"),
        ("x86q", "openvino-int8"),
        ("x86q", "onnxruntime-int8"),
        ("x86q", BASELINE),
        ("x86q-max-autotune", "x86q"),
        ("x86q-max-autotune", "openvino-int8"),
        ("x86q-dynamic", "onnxruntime-dynamic"),
        ("x86q-dynamic", "torch-dynamic"),
    ):
        mean = bench.geometric_means(table, baseline).get(ours)
        speeds = [b / a for a, b in ((_median(rows, ours), _median(rows, baseline)) for rows in table.values())]
        measured = [speed for speed in speeds if not math.isnan(speed)]
        if mean is not None and len(measured) > 1:
            spread = f"{min(measured):.2f} to {max(measured):.2f}"
            lines.append(f"- {ENGINES[ours]} is {mean:.2f} times as fast as {ENGINES[baseline]} ({spread})\n")
    return "".join(["Geometric means, and the range over the networks that both ran:\n\n", *lines]) if lines else ""


def _median(results: list[bench.Result], engine: str) -> float:
    return next((r.median for r in results if r.engine == engine), math.nan)


def starts(body: dict[str, Any]) -> str:
    """Seconds of the first call: with empty caches, in a second process, and from a package."""
    columns = {
        "PyTorch's own int8, empty caches": ("stock-int8", "cold_seconds"),
        "x86q, empty caches": ("x86q", "cold_seconds"),
        "x86q, second process": ("x86q", "warm_seconds"),
        "x86q, package": ("x86q-package", "warm_seconds"),
    }
    lines = []
    for network, results in bench.from_json(body).items():
        found = {r.engine: r for r in results}
        lines.append([network, *(f"{getattr(found[engine], field):g}" for engine, field in columns.values())])
    return _markdown(["seconds", *columns], lines)


def compiling(body: dict[str, Any]) -> str:
    """Seconds from the float model to the first result, where they were measured."""
    table = bench.from_json(body)
    ran = {r.engine for results in table.values() for r in results}
    engines = [engine for engine in ("stock-int8", "x86q", "x86q-max-autotune", "x86q-dynamic") if engine in ran]
    lines = []
    for network, results in table.items():
        seconds = {r.engine: r.compile_seconds for r in results if not math.isnan(r.compile_seconds)}
        if seconds:
            lines.append([network, *(f"{seconds[engine]:.0f}" if engine in seconds else "–" for engine in engines)])
    return _markdown(["seconds to the first result", *(ENGINES[name] for name in engines)], lines) if lines else ""


def coverage(body: dict[str, Any]) -> str:
    """What of each network is int8, and the kernel calls of the generated code."""
    header = [
        "network",
        "layers",
        "of them int8",
        "multiply-accumulates in int8",
        "int8 + other calls",
        "PyTorch's own",
    ]
    return _markdown(
        header,
        (
            [one["network"], str(one["layers"]), str(one["int8_layers"]), f"{one['int8_share_of_macs']:.0%}",
             f"{one['int8_calls']} + {one['float_kernels']}", one["stock"]]
            for one in body["rows"]
        ),
    )  # fmt: skip


def budgets(body: dict[str, Any]) -> str:
    """What a search for a budget of accuracy gives in each engine: how near to float32, at what price."""
    header = [
        "network, drop allowed",
        "engine",
        "all in int8",
        "found",
        "layers out of int8",
        "evaluations",
        "seconds",
        "ms",
    ]
    return _markdown(
        header,
        (
            [f"{one['network']}, {one['max_drop']:g}", ENGINES[one["engine"]], f"{one['default']:.4f}", f"{one['metric']:.4f}",
             *(f"{one[name]:g}" for name in ("moved", "evaluations", "seconds", "milliseconds"))]
            for one in body["budgets"]
        ),
    )  # fmt: skip


def _where(body: dict[str, Any]) -> str:
    """What the figures of a file depend on, in a line."""
    machine = body["machine"]
    vnni = "" if "VNNI" in machine["name"] else f", {'with' if machine['vnni'] else 'without'} VNNI"
    parts = [f"{machine['name']}{vnni}", f"torch {machine['torch'].split('+')[0]}", body["date"]]
    if settings := body.get("settings"):
        parts += [
            f"batch {settings['batch']}",
            ("{length} tokens or steps" if set(body["results"]) <= set(NETWORKS) else "{size}×{size} pixels").format(
                **settings
            ),
            f"{settings['threads']} threads",
        ]
    return ", ".join(parts)


def _section(name: str) -> str:
    """One file: its table, where and when it was measured, and what was found."""
    body = load(name)
    if "rows" in body:
        shown = [coverage(body)]
    elif "budgets" in body:
        shown = [budgets(body)]
    elif any(row.get("warm_seconds") is not None for rows in body["results"].values() for row in rows):
        shown = [starts(body)]
    else:
        shown = [latency(body), means(body), compiling(body)]
    notes = "".join(f"- {note}\n" for note in body.get("notes", ()))
    parts = (
        f"## {body.get('title', name)}\n",
        f"{_where(body)}. Source: {body['source']} (`{name}.json`).\n",
        *shown,
        notes,
    )
    return "\n".join(part for part in parts if part)


def _everything() -> str:
    return "\n" + "\n".join(_section(path.stem) for path in sorted(FOLDER.glob("*.json"))) + "\n"


def _main_table() -> str:
    body = load("zen4-batch-1")
    return f"\n{_where(body)}:\n\n{latency(body)}\n{means(body)}"


def _text_table() -> str:
    body = load("zen4-text")
    return f"\nThe same for text, {body['settings']['length']} tokens:\n\n{latency(body)}"


PARTS: dict[str, Callable[[], str]] = {"latency": _main_table, "text": _text_table, "everything": _everything}


def filled(text: str) -> str:
    """A page with the tables as the files give them."""
    return _BLOCK.sub(lambda match: match[1] + PARTS[match[2]]() + match[3], text)


# --- the picture ------------------------------------------------------------------------------------------------------

_COLOURS = {
    BASELINE: "#b8b8b8", "stock-int8": "#8d9db6", "openvino-int8": "#8d9db6", "onnxruntime-int8": "#8d9db6",
    "x86q": "#e3a857", "x86q-max-autotune": "#d1495b",
}  # fmt: skip
_WIDTH, _BAR, _LABEL, _LENGTH = 430, 17, 140, 220


def picture(name: str = "zen4-batch-1") -> str:
    """Bars of milliseconds, a panel for a network, in SVG."""
    body = load(name)
    table, panel = bench.from_json(body), 34 + len(_COLOURS) * (_BAR + 3)
    height = panel * math.ceil(len(DRAWN) / 2) + 30
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{2 * _WIDTH}" height="{height}" font-family="sans-serif" '
        'font-size="12" fill="#222">',
        '<rect width="100%" height="100%" rx="6" fill="#fff"/>',
    ]
    for number, network in enumerate(DRAWN):
        left, top = 15 + number % 2 * _WIDTH, 8 + number // 2 * panel
        parts += [f'<text x="{left}" y="{top + 16}" font-weight="bold">{network}</text>']
        parts += _bars({r.engine: r.median for r in table[network]}, left, top + 24)
    caption = f"milliseconds a call, batch {body['settings']['batch']}; {body['machine']['name']}"
    parts += [f'<text x="15" y="{height - 10}" fill="#666">{escape(caption)}</text>', "</svg>"]
    return "\n".join(parts) + "\n"


def _bars(medians: dict[str, float], left: int, top: int) -> list[str]:
    longest, parts = max(value for value in medians.values() if not math.isnan(value)), []
    for row, (engine, colour) in enumerate((name, _COLOURS[name]) for name in ENGINES if name in _COLOURS):
        y, value = top + row * (_BAR + 3), medians.get(engine, math.nan)
        length = 0 if math.isnan(value) else max(1, round(_LENGTH * value / longest))
        label = ENGINES[engine].replace("`", "")
        parts += [
            f'<text x="{left + _LABEL - 6}" y="{y + 13}" text-anchor="end">{escape(label)}</text>',
            f'<rect x="{left + _LABEL}" y="{y}" width="{length}" height="{_BAR}" fill="{colour}"/>',
            f'<text x="{left + _LABEL + length + 5}" y="{y + 13}">{_number(value)}</text>',
        ]
    return parts


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        for page in PAGES:
            page.write_text(filled(page.read_text()))
        PICTURE.write_text(picture())
    else:
        print(_everything(), end="")
