"""Which releases `.ci/matrix` runs the core on."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# What `pip index versions` prints, the newest first: local versions, patch releases, and older than what is supported.
AVAILABLE = {
    "torch": "3.0.0, 2.15.0, 2.14.10, 2.14.9, 2.14.0, 2.13.0+cpu, 2.13.0, 2.12.1, 2.9.1",
    "torchao": "0.20.0, 0.19.1, 0.19.0, 0.18.0, 0.17.0, 0.9.0",
}


@pytest.fixture
def matrix(tmp_path: Path):
    """Runs `.ci/matrix --list` with a pip that knows these releases."""
    cases = "\n".join(f'*"versions {name}") echo "Available versions: {found}" ;;' for name, found in AVAILABLE.items())
    (tmp_path / "python3").write_text(f'#!/bin/sh\ncase "$*" in\n{cases}\n*) exit 1 ;;\nesac\n')
    (tmp_path / "python3").chmod(0o755)

    def run(*arguments: str) -> list[str]:
        environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "CI_DIR": str(tmp_path / "ci")}
        done = subprocess.run([ROOT / ".ci" / "matrix", "--list", *arguments], env=environment, text=True,
                              capture_output=True, check=True)  # fmt: skip
        return done.stdout.split()

    return run


@pytest.mark.skipif(not (ROOT / ".ci").exists(), reason="not in a source tree")
def test_each_minor_release_from_the_oldest_on(matrix):
    assert matrix() == ["2.13.0", "2.14.10", "2.15.0", "3.0.0", "torchao==0.18.0", "torchao==0.19.1"]
    assert matrix("2.14.1") == ["2.14.1"]
