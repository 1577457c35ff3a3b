"""The report's page in a browser: it opens without network, folds, searches, selects, compares; keys do what clicks do."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import browser
import pytest
from test_html import fusion, miss, node, report  # noqa: F401

from inductor_x86q.report import Code, Kernel, Miss, Report

pytestmark = pytest.mark.skipif(browser.PATH is None, reason="no chromium, chromium-browser or google-chrome found")

RED = "rgb(209, 26, 42)"


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[browser.Browser]:
    started = browser.Browser(tmp_path_factory.mktemp("chromium"))
    yield started
    started.close()


class Page:
    """A report's page, opened. Everything is asked of what is drawn."""

    def __init__(self, chromium: browser.Browser, directory: Path) -> None:
        self.browser, self._path = chromium, directory / "page.html"

    def open(self, text: str, words: str = "") -> Page:
        self._path.write_text(text)
        self.browser.errors.clear()
        self.browser.theme("light")
        self.browser.open("about:blank")  # a change of the words alone would load nothing
        self.browser.open(self._path.as_uri() + (f"#{words}" if words else ""))
        return self

    def names(self, selector: str) -> list[str]:
        return self.browser.run(f"[...document.querySelectorAll({selector!r})].map(e => e.getAttribute('aria-label'))")

    def text(self, selector: str) -> str:
        return self.browser.run(f"document.querySelector({selector!r}).innerText")

    def count(self, selector: str) -> int:
        return self.browser.run(f"document.querySelectorAll({selector!r}).length")

    def color(self, selector: str, what: str) -> str:
        return self.browser.run(f"getComputedStyle(document.querySelector({selector!r}))[{what!r}]")

    def click_box(self, name: str) -> None:
        self.browser.click(f"[...document.querySelectorAll('.b')].find(b => b.getAttribute('aria-label').includes({name!r}))"
                           ".querySelector('text')")  # fmt: skip

    def type(self, words: str) -> None:
        self.browser.run("search.value = ''; search.focus()")
        self.browser.type(words)

    def rows(self) -> list[str]:
        return self.browser.run("rows.filter(r => r.offsetParent !== null).map(r => r.dataset.layer)")

    def transform(self) -> str:
        return self.browser.run("view.world.getAttribute('transform')")


@pytest.fixture
def page(chromium: browser.Browser, tmp_path: Path) -> Iterator[Page]:
    opened = Page(chromium, tmp_path)
    yield opened
    assert chromium.errors == []


@pytest.fixture
def deep() -> Report:
    """Twelve layers of three linears, each between quantize and dequantize; one is missed, in layers.7."""
    nodes, fused, missed, code, kernels = [node("x", "input", "float32")], [], [], [], []
    last = "x"
    for layer in range(12):
        for part in range(3):
            name, path = f"n{layer}_{part}", f"model.layers.{layer}.fc{part}"
            nodes.append(node(f"q{layer}_{part}", "quantize", "uint8", last))
            is_missed = (layer, part) == (7, 1)
            if is_missed:
                missed.append(miss(name, path))
            else:
                fused.append(fusion(name, path))
            nodes.append(node(name, "missed" if is_missed else "fused", "float32", f"q{layer}_{part}", layer=path))
            code.append(Code("cpp_gemm", (name,), f"cpp_gemm({name}_buffer);", "void cpp_gemm(float*) { return; }"))
            kernels.append(Kernel("cpp_gemm", (path,), (name,), 10.0 * (layer + 1)))
            last = name
    nodes.append(node("output", "output", "", last))
    return Report(fused, missed, [], nodes=nodes, code=code, kernels=kernels)


def test_it_opens_with_table_graph_and_histogram(page: Page, deep: Report) -> None:
    page.open(deep.to_html("net"))
    assert page.rows()[0] == "model.layers.7.fc1"
    assert len(page.rows()) == 36
    assert page.count("#histogram rect") == 36
    assert "time by layer" in page.text("#histogram")
    assert "block model.layers.3: 3 int8, folded" in page.names(".block")
    assert page.count(".e") >= page.count(".b:not(.open)") - 1
    assert page.count("path[d*=NaN]") == 0


def test_a_numbered_layer_keeps_the_name_in_front_of_its_number(page: Page) -> None:
    layers = ["encoder.layers.0.mlp.0", "encoder.layers.0.mlp.3", "encoder.layers.0.out"]
    nodes = [node("x", "input", "float32")]
    for number, layer in enumerate(layers):
        nodes.append(node(f"n{number}", "fused", "uint8", nodes[-1].name, layer=layer))
    page.open(
        Report([fusion(f"n{number}", layer) for number, layer in enumerate(layers)], [], [], nodes=nodes).to_html()
    )
    page.browser.run("setAll(true)")
    texts = page.browser.run("[...document.querySelectorAll('.b:not(.block) .l')].map(e => e.textContent)")
    assert {"mlp.0", "mlp.3", "out"} <= set(texts)


def test_boxes_lie_apart(page: Page, deep: Report) -> None:
    page.open(deep.to_html("net"))
    page.browser.run("setAll(true)")
    overlaps = """(() => {
      const boxes = [...document.querySelectorAll('.b:not(.open) > rect:first-of-type')].map(r => r.getBoundingClientRect());
      const apart = (a, b) => a.right <= b.left || b.right <= a.left || a.bottom <= b.top || b.bottom <= a.top;
      return [boxes.length, boxes.flatMap((a, i) => boxes.slice(i + 1).filter(b => !apart(a, b))).length];
    })()"""
    assert page.browser.run(overlaps) == [74, 0]


def test_a_block_opens_and_folds_by_a_click(page: Page, deep: Report) -> None:
    page.open(deep.to_html("net"))
    before = page.count(".b")
    page.click_box("block model.layers.0: ")
    assert "block model.layers.0, open" in page.names(".block")
    assert page.count(".b") == before + 5  # three linears, and the quantizes between them
    assert "model.layers.0" in page.text("#panel h2")
    page.click_box("block model.layers.0, open")
    assert page.count(".b") == before
    page.browser.click("document.getElementById('fold')")
    assert page.count(".b.block") == 1
    page.browser.click("document.getElementById('unfold')")
    assert page.count(".b.fused") == 35


def test_a_miss_is_red_in_table_and_graph(page: Page, deep: Report) -> None:
    page.open(deep.to_html("net"))
    assert page.color(".b.missed > rect", "fill") == RED  # its blocks are open from the start
    assert page.color("#rows .missed td.reason", "color") == RED
    page.browser.run("setAll(false)")
    assert page.count(".b.missed") == 0
    assert page.names(".b.has-missed") == ["block model.layers: 1 missed, 35 int8, folded"]
    assert page.color(".b.has-missed > rect", "stroke") == RED
    page.browser.click("document.querySelector('#rows .missed td')")
    assert page.color(".b.missed > rect", "fill") == RED
    assert "reduce_range=True" in page.text("#panel .reason.missed")


@pytest.mark.parametrize(
    ("words", "rows", "dimmed"), [("", 3, 0), ("conv2", 1, 8), ("saturates", 0, 8), ("overflow", 1, 8)]
)
def test_search_filters_and_dims(page: Page, report: Report, words: str, rows: int, dimmed: int) -> None:  # noqa: F811
    page.open(report.to_html("net"), words)
    assert len(page.rows()) == rows
    assert page.count(".b.off:not(.open)") == dimmed
    page.open(report.to_html("net")).type(words)
    assert len(page.rows()) == rows
    assert page.count(".b.off:not(.open)") == dimmed


def test_search_goes_into_folded_blocks(page: Page, deep: Report) -> None:
    page.open(deep.to_html("net"))
    page.type("layers.9.fc2")
    assert page.rows() == ["model.layers.9.fc2"]
    assert "block model.layers.9: 3 int8, folded" in page.names(".b.block:not(.off)")
    page.browser.press("Enter")
    assert page.text("#panel h2") == "model.layers.9.fc2"
    assert [name.split(",")[1] for name in page.names(".b.on")] == [" model.layers.9.fc2"]


def test_the_panel_has_kernel_numbers_code_and_time(page: Page, deep: Report) -> None:
    page.open(deep.to_html("net"))
    page.click_box("block model.layers.0: ")
    page.click_box("model.layers.0.fc1,")
    shown = page.text("#panel")
    for part in ("onednn.qconv_pointwise.default", "conv → relu → quantize", "0.5 @ 3", "12.5 µs", "net.py:3"):
        assert part in shown
    assert page.text("#panel pre.call") == "cpp_gemm(n0_1_buffer);"
    assert page.text("#panel pre.kernel") == "void cpp_gemm(float*) { return; }"
    assert page.browser.run("document.querySelector('#rows .on').dataset.layer") == "model.layers.0.fc1"
    page.browser.click("document.querySelector('#panel li button')")  # what it reads
    assert page.text("#panel h2") == "q0_1"
    page.browser.press("Escape")
    assert page.browser.run("panel.hidden")


def test_without_code_the_panel_says_how_to_get_it(page: Page, report: Report) -> None:  # noqa: F811
    page.open(report.to_html())
    page.browser.run("selectRow(rows[1])")
    assert "x86q explain --code" in page.text("#panel")


def test_a_bar_of_the_histogram_selects_its_layer(page: Page, deep: Report) -> None:
    page.open(deep.to_html())
    page.browser.click("document.querySelectorAll('#histogram rect')[35]")
    assert page.text("#panel h2") == "model.layers.11.fc2"


def test_zoom_and_pan(page: Page, deep: Report) -> None:
    page.open(deep.to_html())
    seen = [page.transform()]
    page.browser.wheel(1000, 500, 120)
    seen.append(page.transform())
    page.browser.wheel(1000, 500, 120, control=True)
    seen.append(page.transform())
    x, y = page.browser.run(
        "(r => [r.x + r.width / 2, r.y + r.height / 2])(document.querySelector('.block:not(.open)').getBoundingClientRect())"
    )
    page.browser.drag((x, y), (x + 40, y + 8))
    seen.append(page.transform())
    page.browser.click("document.getElementById('larger')")
    seen.append(page.transform())
    page.browser.click("document.getElementById('fit')")
    seen.append(page.transform())
    assert len(set(seen)) == len(seen)
    assert page.browser.run("panel.hidden")  # a drag is no click
    inside = (
        "(b => b.top >= svg.getBoundingClientRect().top && b.bottom <= innerHeight)(view.world.getBoundingClientRect())"
    )
    assert page.browser.run(inside)


def test_the_keyboard_reaches_everything(page: Page, deep: Report) -> None:
    page.open(deep.to_html())
    active = "document.activeElement"
    page.browser.press("/")
    assert page.browser.run(f"{active}.id") == "search"
    page.browser.run("rows[0].focus()")
    page.browser.press("ArrowDown")
    page.browser.press("Enter")
    assert page.text("#panel h2") == "model.layers.0.fc0"
    page.browser.press("Escape")
    seen = set()
    for _ in range(20):
        page.browser.press("Tab")
        seen.add(page.browser.run(f"{active}.id || {active}.tagName"))
    assert {"fold", "unfold", "fit", "g"} <= seen
    page.browser.run("roam([...shown.values()][0])")
    for _ in range(20):
        page.browser.press("ArrowDown")
        if page.browser.run(f"{active}.getAttribute('aria-label')").startswith("block model.layers.1:"):
            break
    assert page.browser.run(f"{active}.getAttribute('aria-expanded')") == "false"
    page.browser.press("Enter")
    assert page.browser.run(f"{active}.getAttribute('aria-label')") == "block model.layers.1, open"
    page.browser.press("Enter")
    assert page.browser.run(f"{active}.getAttribute('aria-expanded')") == "false"


def test_dark_and_light(page: Page, report: Report) -> None:  # noqa: F811
    page.open(report.to_html())
    light = page.color("body", "backgroundColor")
    page.browser.theme("dark")
    assert page.color("body", "backgroundColor") != light
    assert page.color("body", "color") != "rgb(27, 31, 36)"
    assert page.color(".b.missed > rect", "fill") == RED


def test_hostile_names_are_shown_and_do_nothing(page: Page, report: Report) -> None:  # noqa: F811
    evil = "</script><script>hacked = 1</script><img src=x onerror='hacked = 1'>\"><svg onload=hacked=1>"
    layers = [dataclasses.replace(fusion("a", evil), source=evil, kernel=evil), fusion("b", "__proto__.constructor")]
    hostile = dataclasses.replace(
        report,
        fused=layers,
        missed=[dataclasses.replace(miss("c", evil), operator=evil)],
        nodes=[
            dataclasses.replace(n, layer=evil, operator=evil) if n.name in "ac" else n
            for n in (
                dataclasses.replace(n, layer="__proto__.constructor") if n.name == "b" else n for n in report.nodes
            )
        ],
        notes=[evil],
        code=[Code(evil, ("a",), evil, evil)],
    )
    page.open(hostile.to_html(evil, compare=hostile))
    page.browser.run("setAll(true)")
    page.browser.run("selectRow(rows.find(row => row.dataset.node === 'a'))")
    assert page.text("#panel h2") == evil
    assert page.text("h1") == evil
    assert page.text("#panel pre.kernel") == evil
    assert page.browser.run("typeof hacked") == "undefined"
    assert page.count("img") == page.count("svg svg") == 0
    page.browser.run("document.body.setAttribute('onclick', 'hacked = 1'); document.body.click()")
    assert page.browser.run("typeof hacked") == "undefined"  # what got in all the same would not run
    page.browser.errors.clear()  # the browser reports that it refused


def test_comparing_shows_what_changed(page: Page, deep: Report) -> None:
    after = dataclasses.replace(
        deep,
        fused=[f for f in deep.fused if f.node != "n3_0"],
        kept_float=[Miss("model.layers.3.fc0", "linear", miss("x", "x").obstacle, (1, 10), 80, "", "n3_0")],
        nodes=[dataclasses.replace(n, kind="kept_float") if n.name == "n3_0" else n for n in deep.nodes],
    )
    page.open(after.to_html("net", compare=deep))
    page.browser.click("document.getElementById('changes')")
    assert page.rows() == ["model.layers.3.fc0"]
    assert "lost: qconv +relu" in page.text("#rows [data-change] td.before")
    assert page.names(".b.changed") == ["block model.layers.3: 1 float, 2 int8, folded"]
    page.browser.click("document.querySelector('#rows [data-change] td')")
    assert "before: qconv +relu, u8×s8→u8, 12.5 µs" in page.text("#panel")
    assert [name.split(":")[0] for name in page.names(".b.changed")] == ["kept float"]
    page.open(deep.to_html())
    assert not page.browser.run("changes.offsetParent !== null")


def test_an_empty_report(page: Page) -> None:
    page.open(Report([], [], []).to_html())
    assert page.text("#empty") == "No graph."


def test_a_notebooks_frame_runs_the_page(page: Page, report: Report) -> None:  # noqa: F811
    page.open(f"<!doctype html><body>{report._repr_html_()}</body>")
    assert page.browser.run_in_frame("document.querySelectorAll('.b').length") == 10
