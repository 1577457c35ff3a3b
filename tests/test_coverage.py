"""x86q coverage: what it counts, and what it says of networks that fail."""

from __future__ import annotations

import functools
from collections import Counter

import pytest

from inductor_x86q import cli
from inductor_x86q.tools import coverage
from inductor_x86q.tools.coverage import Row


def test_count_kernels() -> None:
    calls = Counter(
        {
            "qconv": 3,
            "qconv.binary": 2,
            "qlinear": 1,
            "cat": 4,
            "cpp_fused_mean_0": 1,
            "cpp_fused_add_1": 2,
            "cpp_fused_max_pool2d_3": 1,
        }
    )
    calls.update({"convolution": 1, "linear": 1, "bmm": 2, "empty_strided": 9})
    assert coverage.count_kernels(calls) == (6, 11)


def test_text() -> None:
    found = Row("a", 5, 4, 0.5, int8_calls=4, float_kernels=2, quantizes_left=1, quantized="1 mean", stock="3 + 7")
    found.why = "1 conv: EXCLUDED"
    lines = coverage.table([found, Row("b", 1, 1, 1.0), Row("c", error="exit code -11")]).text().splitlines()
    assert [line.split() for line in lines[2:]] == [
        ["a", "5", "4", "50.0%", "4", "+", "2", "3", "+", "7", "1", "1", "mean;", "1", "conv:", "EXCLUDED"],
        ["b", "1", "1", "100.0%", "-", "-", "0"],
        ["c", "failed:", "exit", "code", "-11"],
    ]


once_in_process = functools.cache(coverage._in_process)


@pytest.mark.parametrize(
    "program, stock",
    [("(3, 4)", "3 + 4"), ("1 // 0", "crashes: ZeroDivisionError"), ("os._exit(3)", "crashes: exit code 3")],
)
def test_a_crash_is_a_row(program: str, stock: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each path runs in a process of its own; here a process runs these expressions instead."""
    in_process = once_in_process
    expressions = {"row": "inductor_x86q.tools.coverage.Row('net', 2, 2, 1.0)", "stock_kernels": program}

    def replaced(expression: str) -> object:
        name = expression.split("(")[0].split(".")[-1]
        return in_process(expressions[name].replace("os.", "__import__('os')."))

    monkeypatch.setattr(coverage, "_in_process", replaced)
    (found,) = coverage.rows(["net"], stock=True)
    assert (found.network, found.layers, found.error) == ("net", 2, "")
    assert found.stock.startswith(stock)


def test_it_takes_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coverage, "LIMIT", 0)
    assert coverage._in_process("1") == {"error": "takes over 0 minutes"}


@pytest.mark.parametrize("row, code", [(Row("a", 2, 2), 0), (Row("a", 2, 1), 1), (Row("a", error="crash"), 1)])
def test_exit_code(row: Row, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(coverage, "rows", lambda networks, stock: [row])
    assert cli.main(["coverage", "a"]) == code
    assert len(capsys.readouterr().out.splitlines()) == 3


@pytest.mark.torchvision
def test_squeezenet_on_both_paths() -> None:
    """26 convolutions; the fire modules join halves of one scale, which the stock path needs kernels for too."""
    pytest.importorskip("torchvision")
    found = coverage.row("squeezenet1_1", code=True)
    assert (found.layers, found.int8_layers, found.int8_share_of_macs) == (26, 26, 1.0)
    assert (found.quantizes_left, found.quantized, found.why) == (1, "1 input", "")
    stock = coverage.stock_kernels("squeezenet1_1")
    assert found.int8_calls == stock[0] == 26
    assert found.float_kernels <= stock[1]
