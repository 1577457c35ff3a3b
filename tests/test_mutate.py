"""The breakages that `python -m tests.mutate` draws."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests import covering, mutate

SOURCE = '''
LIMIT = 8

def used(x, y):
    """Text with é, which takes two bytes."""
    if x < y and not x == 3:
        return min(x + 1, -y)
    return f"{x + y}"
'''


TESTS = """
import threading, used

def test_one():
    used.one(1)

def test_in_a_thread():
    thread = threading.Thread(target=used.one, args=(0,))
    thread.start()
    thread.join()

def test_that_fails():
    assert used.one(1) == 2
"""


def test_one_place_is_changed_at_a_time():
    found = {(m.before, m.after) for m in mutate.mutations("file.py", SOURCE)}
    assert {("x < y", "x <= y"), ("x == 3", "x != 3"), ("3", "4"), ("x + 1", "x - 1"), ("1", "2"), ("-y", "y"),
            ("min(x + 1, -y)", "max(x + 1, -y)"), ("not x == 3", "x == 3")} <= found  # fmt: skip
    assert "8" not in {before for before, _ in found}
    for mutation in mutate.mutations("file.py", SOURCE):
        lines = zip(SOURCE.splitlines(), mutation.source.splitlines(), strict=True)
        assert [number for number, (old, new) in enumerate(lines, 1) if old != new] == [mutation.line]
        ast.parse(mutation.source)


def test_a_seed_draws_the_same_from_all_files():
    drawn = mutate.drawn(1, 400)
    assert drawn == mutate.drawn(1, 400)
    files = {mutation.file for mutation in drawn}
    for part in ("row_scales.py", "images/", "kernels/", "lowering/pool.py", "passes/fuse/"):
        assert any(part in file for file in files), part
    for mutation in drawn[:40]:
        ast.parse(mutation.source)
    assert drawn[:60] == mutate.drawn(1, 60) and drawn[60:] == mutate.drawn(1, 340, skip=60)


def test_the_lines_of_a_statement():
    found = {m.before: m.statement for m in mutate.mutations("file.py", SOURCE)}
    assert found["x == 3"] == (6, 6) and found["x + 1"] == (7, 7)
    source = "def used(x):\n    if (x and\n            x > 1):\n        return sum(\n            x + 1)\n"
    found = {m.before: m.statement for m in mutate.mutations("file.py", source)}
    assert found["x > 1"] == (2, 3) and found["x + 1"] == (4, 5)


def test_tests_are_told_by_the_lines_that_they_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(covering, "STORED", tmp_path / "build" / "covering.json")
    with covering.stored() as known:
        known["files"] = {"graph/qdq.py": covering.digest("graph/qdq.py")}
        for name, seconds, lines in (("slow", 3, [1, 7]), ("quick", 1, [7]), ("other", 1, [8])):
            known["tests"][name] = {"seconds": seconds, "lines": {"graph/qdq.py": lines}}
    assert covering.tests_of("graph/qdq.py", 5, 7) == [(1, "quick"), (3, "slow")]
    with pytest.raises(SystemExit, match="is not as the tests last ran it"):
        covering.tests_of("graph/weights.py", 1, 2)


def test_lines_that_a_test_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "used.py").write_text("def one(x):\n    if x:\n        return 1\n    return 2\n")
    (tmp_path / "test_used.py").write_text(TESTS)
    monkeypatch.setattr(covering, "PACKAGE", tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    lines = covering.Lines()
    pytest.main(["-q", "-p", "no:cacheprovider", f"--rootdir={tmp_path}", str(tmp_path)], plugins=[lines])
    found = {name.split("::")[1]: test["lines"]["used.py"] for name, test in lines.tests.items()}
    assert found == {"test_one": [2, 3], "test_in_a_thread": [2, 4]}


def test_each_survivor_is_answered():
    """By the test that notices it now, or by why its place changes no number."""
    unanswered = [row["mutation"] for row in mutate.results() if not row["noticed by"] and not row["answer"]]
    assert not unanswered, unanswered
