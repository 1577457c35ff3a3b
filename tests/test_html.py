"""The report's page: what it says, that it needs nothing from outside, and that it draws and filters in a browser."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from inductor_x86q.graph.reasons import Obstacle, Reason
from inductor_x86q.report import Fusion, Miss, Node, Operation, Report, html

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip


def fusion(node: str, layer: str) -> Fusion:
    return Fusion(
        layer, "onednn.qconv_pointwise.default", "conv", ("relu", "quantize"), "uint8", "int8", "uint8",
        (1, 8, 4, 4), 1000, "net.py:3", node, 0.5, 3, 0.25, 0, 12.5,
    )  # fmt: skip


def node(name: str, kind: str, dtype: str, *inputs: str, layer: str = "") -> Node:
    return Node(name, kind, name, layer or name, dtype, (1, 8, 4, 4), inputs)


@pytest.fixture
def report() -> Report:
    """x → q → a → b → d ─┬→ c (missed) → f → add, with a branch around c and f."""
    return Report(
        fused=[fusion("a", "block.conv1"), fusion("b", "block.conv2")],
        missed=[Miss("head<T>", "linear", Obstacle(Reason.SATURATES, "up to 255"), (1, 10), 80, "net.py:9", "c")],
        kept_float=[],
        quantizes_left=["q"],
        dequantizes_left=["d"],
        generated=[Operation("gate", "sigmoid", ("float32",), "float32", (1, 8), "net.py:7", "s")],
        nodes=[
            node("x", "input", "float32"),
            node("q", "quantize", "uint8", "x"),
            node("a", "fused", "uint8", "q", layer="block.conv1"),
            node("b", "fused", "uint8", "a", layer="block.conv2"),
            node("d", "dequantize", "bfloat16", "b"),
            node("c", "missed", "float32", "d", layer="head<T>"),
            node("s", "generated", "float32", "c", layer="gate"),
            node("t", "generated", "float32", "s", layer="gate"),
            node("add", "generated", "float32", "t", "d"),
            node("output", "output", "", "add"),
        ],
    )


def test_totals_misses_and_types(report: Report) -> None:
    page = report.to_html("net")
    assert "<b>2 / 3</b>layers in int8" in page
    assert '<div class="card missed"><b>1</b>' in page
    assert page.count('<path class="e int8"') == 3
    assert page.count('<path class="e bf16"') == 2
    assert page.count('<path class="e fp32"') == 4
    assert page.count('<g class="b fused"') == page.count("class=region") == 2
    assert page.count('<g class="b missed"') == 1
    assert "reduce_range=True" in page
    assert "head&lt;T&gt;" in page
    assert "head<T>" not in page
    assert "12.5" in page


def test_it_loads_nothing_and_leaves_no_placeholder(report: Report) -> None:
    page = report.to_html("net")
    assert not re.findall(r"""(?:src|href)\s*=|@import|url\(|https?://|fetch\(""", page)
    assert "<!--" not in page


def test_operations_that_follow_one_another_share_a_box(report: Report) -> None:
    boxes = html.boxes(report.nodes)
    assert [[n.name for n in box.nodes] for box in boxes if len(box.nodes) > 1] == [["s", "t"]]


def test_boxes_do_not_overlap_and_edges_lead_down(report: Report) -> None:
    boxes = html.boxes(report.nodes)
    assert len({(box.row, box.column) for box in boxes}) == len(boxes)
    assert all(source.row < box.row for box in boxes for source, _ in box.inputs)


def test_edges_that_pass_the_same_rows_take_lanes_of_their_own() -> None:
    taken: list[list[tuple[int, int]]] = []
    assert [html._free_lane(taken, *span) for span in ((0, 3), (1, 4), (3, 5))] == [0, 1, 0]


def test_nested_branches_are_drawn_beside_each_other() -> None:
    nodes = [node("x", "input", "float32")]
    for name, *sources in (("a", "x"), ("b", "a"), ("c", "b", "a"), ("d", "c", "x")):
        nodes.append(node(name, "fused", "uint8", *sources))
    page = Report([], [], [], nodes=nodes).to_html()
    lanes = re.findall(r'd="M[\d.]+ [\d.]+H([\d.]+)q', page)
    assert len(lanes) == len(set(lanes)) == 2


def test_an_empty_report_has_a_page() -> None:
    assert "No graph." in Report([], [], []).to_html()


def test_a_large_net_stays_small() -> None:
    nodes = [node("x", "input", "float32")]
    nodes += [node(f"n{i}", "fused", "uint8", nodes[-1].name if i == 0 else f"n{i - 1}") for i in range(1000)]
    report = Report([fusion(n.name, f"layers.{n.name}") for n in nodes[1:]], [], [], nodes=nodes)
    assert len(report.to_html()) < 2_000_000


@pytest.mark.skipif(BROWSER is None, reason="needs chromium")
@pytest.mark.parametrize(
    ("words", "rows", "dimmed"), [("", 3, 0), ("conv2", 1, 8), ("saturates", 0, 8), ("overflow", 1, 8)]
)
def test_it_draws_and_filters_in_a_browser(report: Report, tmp_path: Path, words: str, rows: int, dimmed: int) -> None:
    page = tmp_path / "page.html"
    page.write_text(report.to_html("net"))
    assert BROWSER is not None
    command = [BROWSER, *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", f"{page.as_uri()}#{words}"]
    drawn = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    body = drawn[drawn.index('<tbody id="rows">') : drawn.index("</tbody>")]
    shown = [row for row in re.findall(r"<tr ([^>]*)>", body) if "hidden" not in row]
    assert len(shown) == rows
    assert len(re.findall(r'<g class="b [a-z_]+ off"', drawn)) == dimmed
