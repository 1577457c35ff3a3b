"""Threads, copied and fresh processes at the same time: right results or a clear error, and nothing that is left behind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.stress import Stress, nothing_left


@pytest.fixture(scope="module")
def stress() -> Stress:
    return Stress()


@pytest.mark.parametrize("seed", range(3))
def test_what_threads_do_at_once_is_what_they_do_alone(stress: Stress, seed: int) -> None:
    """`python -m tests.stress` runs hundreds of such rounds."""
    with nothing_left():
        assert not stress.round(seed, threads=3)


FORKED = """
import os
import torch
from inductor_x86q import testing
from inductor_x86q.testing import QLinear, quantize_dequantize

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = QLinear(32, 48)

    def forward(self, x):
        return torch.relu(self.fc(quantize_dequantize(x)))

torch.set_num_threads(1)
x = torch.randn(4, 32)
model = testing.qdq_graph(Model(), (x,))
with torch.no_grad():
    compiled = torch.compile(model, backend="inductor_x86q")
    first = compiled(x)
    child = os.fork()
    if not child:
        again = torch.compile(testing.qdq_graph(Model(), (x,)), backend="inductor_x86q")(x)
        os._exit(0 if torch.equal(compiled(x), first) and torch.equal(again, first) else 3)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert torch.equal(compiled(x), first)
"""


def test_a_process_copied_after_a_compile(run_python: Callable[..., Any]) -> None:
    """It calls what was compiled before, and compiles. With more threads than one OpenMP hangs there, in eager mode too."""
    run_python(FORKED)


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
