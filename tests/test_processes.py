"""Processes that are copied after a compile, and fresh ones that compile at once: right results, and no hang."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

FORKED = """
import os
import torch
from inductor_x86q import testing
from inductor_x86q.testing import QLinear, quantize_dequantize

class Model(torch.nn.Module):
    def __init__(self, activation):
        super().__init__()
        self.fc, self.activation = QLinear(32, 48), activation

    def forward(self, x):
        return self.activation(self.fc(quantize_dequantize(x)))

torch.set_num_threads(1)
x = torch.randn(4, 32)
model, other = (testing.qdq_graph(Model(f), (x,)) for f in (torch.relu, torch.nn.functional.hardswish))
with torch.no_grad():
    compiled = torch.compile(model, backend="inductor_x86q")
    first = compiled(x)
    child = os.fork()
    if not child:
        new = torch.compile(other, backend="inductor_x86q")(x)  # another kernel, which has to be built
        os._exit(0 if torch.equal(compiled(x), first) and torch.allclose(new, other(x), atol=1e-4) else 3)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert torch.equal(compiled(x), first)
"""


def test_a_process_copied_after_a_compile(run_python: Callable[..., Any], tmp_path: Path) -> None:
    """It calls what was compiled before, and compiles. With more threads than one OpenMP hangs there, in eager mode too."""
    run_python(FORKED, TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache"))


SPAWNED = """
import multiprocessing
import sys
import torch

def work(answers):
    with torch.no_grad():
        model = torch.export.load("model.pt2").module()
        answers.put(torch.compile(model, backend="inductor_x86q")(torch.linspace(-1, 1, 128).reshape(4, 32)).tolist())

if __name__ == "__main__":
    from inductor_x86q import testing
    from tests.models import Made, QD

    x = torch.linspace(-1, 1, 128).reshape(4, 32)
    model = testing.qdq_graph(Made(lambda m, x: torch.relu(m.fc(QD(x)))), (x,))
    with torch.no_grad():
        torch.export.save(torch.export.export(model, (x,)), "model.pt2")
        expected = torch.compile(model, backend="inductor_x86q")(x).tolist()
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    workers = [context.Process(target=work, args=(answers,)) for _ in range(2)]
    for worker in workers:
        worker.start()
    assert all(answers.get(timeout=240) == expected for _ in workers)
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
"""


@pytest.mark.slow
def test_spawned_workers_compile_at_once(run_python: Callable[..., Any]) -> None:
    run_python(SPAWNED, PYTHONPATH=str(Path(__file__).parent.parent))
