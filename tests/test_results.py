"""Measurements: every table and the picture are what the command makes of the files, and the files can be read."""

from __future__ import annotations

import json
import math
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from inductor_x86q.tools import bench, coverage, results

FILES = sorted(results.FOLDER.glob("*.json"))


@pytest.mark.parametrize("page", results.PAGES, ids=["README", "benchmarks"])
def test_pages_are_up_to_date(page: Path) -> None:
    """Else run `python -m inductor_x86q.tools.results --write`."""
    text = page.read_text()
    assert "<!-- python -m inductor_x86q.tools.results: " in text
    assert results.filled(text) == text


def test_the_picture_is_up_to_date() -> None:
    assert results.PICTURE.read_text() == results.picture()
    texts = {"".join(one.itertext()) for one in ElementTree.fromstring(results.picture()) if one.tag.endswith("text")}
    (row,) = (row for row in results.load("zen4-batch-1")["results"]["mobilenet_v2"] if row["engine"] == "x86q")
    assert {*results.DRAWN, f"{row['median']:.3g}", "OpenVINO int8"} <= texts


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_file_is_what_the_commands_write(path: Path) -> None:
    body = json.loads(path.read_text())
    assert {"source", "date", "version", "machine", "title"} <= body.keys()
    assert {"name", "vnni", "bf16", "amx", "torch"} <= body["machine"].keys()
    if "rows" in body:
        assert [coverage.Row(**row).network for row in body["rows"]]
    elif "budgets" in body:
        assert all(row["metric"] >= 1 - row["max_drop"] for row in body["budgets"]) and results.budgets(body)
    else:
        assert bench.Settings(**body["settings"]).threads and bench.from_json(body)


def test_a_run_can_be_read_back() -> None:
    table = {"resnet18": [bench.Result("x86q", median=2.0)]}
    (row,) = bench.from_json(json.loads(bench.to_json(table, bench.Settings())))["resnet18"]
    assert (row.median, math.isnan(row.warm_seconds), row.error) == (2.0, True, "")
    body = json.loads(coverage.to_json([coverage.Row("a", 5, 4)]))
    assert coverage.Row(**body["rows"][0]) == coverage.Row("a", 5, 4)


def test_what_is_missing_is_a_dash_and_the_fastest_is_bold() -> None:
    table = {"a": [bench.Result("x86q", median=2.5), bench.Result("stock-int8", median=101.0)],
             "b": [bench.Result("x86q", median=3.0)]}  # fmt: skip
    lines = results.latency(json.loads(bench.to_json(table, bench.Settings()))).splitlines()
    assert lines == [
        "| ms | PyTorch's own int8 | x86q |",
        "| --- | ---: | ---: |",
        "| a | 101 | **2.5** |",
        "| b | – | **3** |",
    ]
