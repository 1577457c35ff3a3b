"""The report's page as text: what it says, what it compares, that it needs nothing from outside and lets nothing in."""

from __future__ import annotations

import dataclasses
import html as markup
import json
import re

import pytest

from inductor_x86q.graph.reasons import Obstacle, Reason
from inductor_x86q.report import Code, Fusion, Miss, Node, Operation, Report, html, html_data
from inductor_x86q.report.compare import changes


def fusion(node: str, layer: str) -> Fusion:
    return Fusion(
        layer, "onednn.qconv_pointwise.default", "conv", ("relu", "quantize"), "uint8", "int8", "uint8",
        (1, 8, 4, 4), 1000, "net.py:3", node, 0.5, 3, 0.25, 0, 12.5,
    )  # fmt: skip


def miss(node: str, layer: str) -> Miss:
    return Miss(layer, "linear", Obstacle(Reason.SATURATES, "up to 255"), (1, 10), 80, "net.py:9", node)


def node(name: str, kind: str, dtype: str, *inputs: str, layer: str = "") -> Node:
    return Node(name, kind, name, layer or name, dtype, (1, 8, 4, 4), inputs)


@pytest.fixture
def report() -> Report:
    """x → q → a → b → d ─┬→ c (missed) → s → t → add, with a branch around c, s and t."""
    return Report(
        fused=[fusion("a", "block.conv1"), fusion("b", "block.conv2")],
        missed=[miss("c", "head<T>")],
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


def data_of(page: str) -> dict:
    return json.loads(page.split('id="data">')[1].split("</script>")[0])


def test_totals_misses_and_types(report: Report) -> None:
    page = report.to_html("net")
    assert "<b>2 / 3</b>layers in int8" in page
    assert '<div class="card missed"><b>1</b>' in page
    assert "reduce_range=True" in page
    assert page.index('<tr class="missed"') < page.index('<tr class="fused"')
    assert "12.5" in page
    types = [kind for box in data_of(page)["graph"] for _, kind in box["in"]]
    assert (types.count("uint8"), types.count("bfloat16"), types.count("float32")) == (3, 2, 4)


def test_it_loads_nothing_and_leaves_no_placeholder(report: Report) -> None:
    page = report.to_html("net")
    assert not re.findall(r"""(?:src|href)\s*=|@import|url\((?!#)|https?://|fetch\(|sourceMappingURL""", page)
    assert "<!--" not in page
    assert "default-src 'none'" in page


def test_names_are_text_wherever_they_stand() -> None:
    evil = "</script><script>alert(1)</script><!--<img src=x onerror=alert(1)>\"'&"
    layer = dataclasses.replace(fusion("a", evil), source=evil, kernel=evil)
    hostile = Report(
        fused=[layer],
        missed=[Miss(evil, evil, Obstacle(Reason.SATURATES, evil), (evil,), 1, evil, "b")],
        kept_float=[],
        generated=[Operation(evil, evil, (evil,), evil, (evil,), evil, "c")],
        nodes=[node("a", "fused", evil, layer=evil), node("b", "missed", "uint8", "a", layer=evil)],
        code=[Code(evil, ("a",), evil, evil)],
        notes=[evil],
    )
    page = hostile.to_html(evil, compare=hostile)
    assert evil not in page
    assert page.count("<script") == page.count("</script>") == 2
    assert "<img" not in page
    assert "<!--" not in page
    assert data_of(page)["code"][0]["call"] == evil


def test_operations_of_one_module_that_follow_one_another_share_a_box(report: Report) -> None:
    boxes = html_data.boxes(report.nodes)
    assert [[n.name for n in box.nodes] for box in boxes if len(box.nodes) > 1] == [["s", "t"]]


def test_what_no_module_made_stands_in_the_module_around_it() -> None:
    """Between two layers of one block in that block, between two blocks in neither."""
    nodes = [
        node("x", "input", "float32"),
        node("q0", "quantize", "uint8", "x"),
        node("a", "fused", "float32", "q0", layer="layers.0.fc1"),
        node("q1", "quantize", "uint8", "a"),
        node("view", "generated", "uint8", "q1"),
        node("b", "fused", "float32", "view", layer="layers.0.fc2"),
        node("q2", "quantize", "uint8", "b"),
        node("c", "fused", "float32", "q2", layer="layers.1.fc1"),
        node("output", "output", "", "c"),
    ]
    found = {box.nodes[0].name: box.path for box in html_data.boxes(nodes)}
    assert found["q0"] == found["x"] == found["output"] == ""
    assert found["q1"] == found["view"] == "layers.0"
    assert found["q2"] == "layers"
    assert found["a"] == "layers.0.fc1"


def test_an_empty_report_has_a_page() -> None:
    assert "No graph." in Report([], [], []).to_html()


def test_a_large_net_stays_small() -> None:
    nodes = [node("x", "input", "float32")]
    nodes += [node(f"n{i}", "fused", "uint8", nodes[-1].name if i == 0 else f"n{i - 1}") for i in range(1000)]
    nodes[1] = dataclasses.replace(nodes[1], inputs=("x",))
    code = [Code("cpp_fused", (n.name,), f"cpp_fused({n.name});", "int x;" * 500) for n in nodes[1:]]
    report = Report([fusion(n.name, f"layers.{n.name}") for n in nodes[1:]], [], [], nodes=nodes, code=code)
    assert len(report.to_html()) < 2_000_000


def test_code_stands_once_and_the_longest_is_cut(report: Report) -> None:
    kernel, longest = "void kernel() {}", "x = 1;" * 10_000
    report.code = [
        Code("cpp_a", ("a",), "cpp_a(buf0);", kernel),
        Code("cpp_a", ("b",), "cpp_a(buf1);", kernel),
        Code("cpp_c", ("c",), "cpp_c(buf2);", longest),
        Code("qconv", ("c",), "qconv(buf3);", ""),
    ]
    data = data_of(report.to_html())
    assert [call["kernel"] for call in data["code"]] == [0, 0, 1, None]
    assert data["kernels"][0] == kernel
    assert len(data["kernels"][1]) < len(longest)
    assert "40,000 characters more" in data["kernels"][1]
    assert dict(data["items"])["c"]["code"] == [2, 3]


# --- comparing --------------------------------------------------------------------------------------------------------


def test_changes_by_layer(report: Report) -> None:
    after = Report(
        fused=[fusion("a2", "block.conv1"), dataclasses.replace(fusion("c2", "head<T>"), operator="linear")],
        missed=[miss("b2", "block.conv2"), miss("z", "extra")],
        kept_float=[],
    )
    before = dataclasses.replace(report, fused=[*report.fused, fusion("old", "old")])
    found = {(change.after or change.before).layer: change.kind for change in changes(before, after)}  # type: ignore[union-attr]
    assert found == {"block.conv1": "same", "head<T>": "gained", "block.conv2": "lost", "extra": "new", "old": "gone"}


def test_another_kernel_is_a_change_another_scale_is_none() -> None:
    one = fusion("a", "conv")
    for changed, kind in (
        (dataclasses.replace(one, absorbed=()), "changed"),
        (dataclasses.replace(one, output_dtype="float32"), "changed"),
        (dataclasses.replace(one, output_scale=0.75, microseconds=99.0), "same"),
    ):
        assert changes(Report([one], [], []), Report([changed], [], []))[0].kind == kind


def test_layers_of_one_path_are_matched_in_the_graphs_order() -> None:
    nodes = [node("p", "fused", "uint8"), node("q", "missed", "float32", "p")]
    report = Report([fusion("p", "attention")], [miss("q", "attention")], [], nodes=nodes)
    assert [change.kind for change in changes(report, report)] == ["same", "same"]


def test_the_page_says_what_has_changed(report: Report) -> None:
    after = dataclasses.replace(report, fused=report.fused[:1], missed=[*report.missed, miss("b", "block.conv2")])
    page = after.to_html("net", compare=report)
    assert "<b>2<span class=was>was 1</span></b>missed" in page
    assert "was 2 / 3</span></b>layers in int8" in page
    assert "<td class=before>lost: qconv +relu, u8×s8→u8, 12.5 µs</td>" in page
    assert "<td class=before>12.5 µs</td>" in page  # of what is as it was, its time
    assert len(re.findall("<tr [^>]*data-change=", page)) == 1
    assert not re.findall("<tr [^>]*data-change=", report.to_html("net", compare=report))
    assert "class=was" not in report.to_html("net")


# --- other viewers ---------------------------------------------------------------------------------------------------


def test_the_graph_for_model_explorer(report: Report) -> None:
    graph = json.loads(report.to_model_explorer("net"))["graphs"][0]
    nodes = {node["id"]: node for node in graph["nodes"]}
    assert list(nodes) == [node.name for node in report.nodes]
    assert all(edge["sourceNodeId"] in nodes for node in nodes.values() for edge in node["incomingEdges"])
    assert (nodes["a"]["label"], nodes["a"]["namespace"]) == ("qconv +relu", "block/conv1")
    assert nodes["c"]["style"]["backgroundColor"] == "#d11a2a"
    assert "reduce_range=True" in dict((a["key"], a["value"]) for a in nodes["c"]["attrs"])["why not int8"]


# --- notebooks --------------------------------------------------------------------------------------------------------


def test_a_notebook_shows_the_page_in_a_frame(report: Report) -> None:
    frame = report._repr_html_()
    attributes = re.fullmatch(r'<iframe [^<>]*sandbox="allow-scripts" srcdoc="([^"]*)"></iframe>', frame)
    assert attributes is not None
    assert markup.unescape(attributes.group(1)) == report.to_html()


def test_the_scripts_of_the_page_are_all_in_it(report: Report) -> None:
    page = report.to_html()
    for name in html.SCRIPTS:
        assert html._file(name) in page
    assert "Permission is hereby granted" in page  # dagre's licence goes where dagre goes
