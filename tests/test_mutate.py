"""The breakages that `python -m tests.mutate` draws."""

from __future__ import annotations

import ast
from pathlib import Path

from tests import mutate

SOURCE = '''
LIMIT = 8

def used(x, y):
    """Text with é, which takes two bytes."""
    if x < y and not x == 3:
        return min(x + 1, -y)
    return f"{x + y}"
'''


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
    for file in files:
        assert all((Path(__file__).parent / test).exists() for test in mutate.killers(file))
