"""Serves models under load while they are swapped and freed and caches are emptied beneath them; checks each answer.

`python -m tests.soak --minutes 60`: requests of random sizes come faster than they are answered at times, so that some are shed.
Each answer is compared with the first one to the same request, and that with the q/dq graph. While another thread compiles,
torch may run a model eagerly, whose float results are rounded otherwise; anything more is wrong. Models are compiled
anew or loaded from a package while others answer. Printed are requests, models and memory, at the start and at the end.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import itertools
import os
import queue
import random
import shutil
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from torch import fx, nn

from inductor_x86q import aot, testing
from inductor_x86q.testing import QConv2d, QLinear, quantize_dequantize

ROWS = 24  # of the largest request
ROUNDING = 1e-5  # relative to the largest number of an answer; a step of an input of the last layer is more
BACKLOG = 16  # requests that may wait: what comes beyond is shed
Run = Callable[[torch.Tensor], torch.Tensor]


class Net(nn.Module):
    """2 MB of weights in int8, in a convolution with a residual sum and two linears."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.conv = QConv2d(8, 8, 3, padding=1)
        self.first, self.second = QLinear(512, 2048), QLinear(2048, 512 + 8 * seed)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = quantize_dequantize(x, 0.02, 60)
        x = torch.relu(self.conv(x) + x).flatten(1)
        return self.second(quantize_dequantize(torch.relu(self.first(quantize_dequantize(x, 0.02, 0))), 0.02, 0))


def resident_megabytes() -> float:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


class Soak:
    """Models by name, each the graph and what answers for it now; threads that ask, answer, and swap."""

    def __init__(self, seed: int, directory: Path) -> None:
        self.random, self.directory = random.Random(seed), directory
        self.images = torch.randn(ROWS + 8, 8, 8, 8, generator=torch.Generator().manual_seed(seed))
        rows = torch.export.Dim("rows", min=2, max=ROWS)
        self.graphs = [
            testing.qdq_graph(Net(number), (self.images[:4],), dynamic_shapes=({0: rows},)) for number in range(3)
        ]
        self.packages = [
            aot.package(graph, (self.images[:4],), directory / f"{number}.pt2", dynamic_shapes=({0: rows},))
            for number, graph in enumerate(self.graphs)
        ]
        self.models = [self.compiled(number) for number in range(len(self.graphs))]
        self.answers: dict[tuple[int, str, int, int], torch.Tensor] = {}
        self.waiting: queue.Queue[tuple[int, int, int]] = queue.Queue(BACKLOG)
        self.counts: Counter[str] = Counter()
        self.largest = 0.0  # difference from a first answer, relative to the largest number in that
        self.over = threading.Event()

    def compiled(self, number: int) -> tuple[str, Run]:
        graph = self.graphs[number]
        model = torch.compile(fx.GraphModule(graph, graph.graph), backend="inductor_x86q", dynamic=True)
        with torch.no_grad():
            # All that requests ask for, in this thread: torch tells 16 images and more from fewer, and a part of a tensor
            # from what begins where the tensor does.
            for rows, first in itertools.product((4, ROWS), (0, 1)):
                model(self.images[first : first + rows])
        return "compiled", model

    def answers_megabytes(self) -> float:
        return sum(answer.nbytes for answer in self.answers.values()) / 2**20

    def ask(self, seed: int) -> None:
        """Requests in bursts."""
        draw = random.Random(seed)
        while not self.over.is_set():
            for _ in range(draw.randrange(1, 12)):
                try:
                    request = draw.randrange(len(self.graphs)), draw.randint(2, ROWS), draw.randrange(8)
                    self.waiting.put_nowait(request)
                except queue.Full:
                    self.counts["shed"] += 1
            time.sleep(draw.uniform(0, 0.05))

    def answer(self) -> None:
        while not self.over.is_set() or not self.waiting.empty():
            try:
                number, rows, first = self.waiting.get(timeout=0.1)
            except queue.Empty:
                continue
            try:
                self.check(number, rows, first)
            except Exception as error:
                self.counts[f"failed: {type(error).__name__}: {str(error).splitlines()[0][:200]}"] += 1

    def check(self, number: int, rows: int, first: int) -> None:
        x, (kind, run) = self.images[first : first + rows], self.models[number]
        with torch.no_grad():
            result = run(x)
            self.counts["answered"] += 1
            known = self.answers.setdefault((number, kind, rows, first), result)
            if known is not result and not torch.equal(known, result):
                difference = (known - result).abs().max().item() / known.abs().max().item()
                self.largest = max(self.largest, difference)
                what = "wrong: not the" if difference > ROUNDING else "rounded otherwise than the"
                self.counts[f"{what} first answer to this request"] += 1
            if known is result and testing.snr(result, self.graphs[number](x)) < 30:
                self.counts["wrong: not what the q/dq graph gives"] += 1

    def swap(self) -> None:
        """One model in the place of another, now and then with caches emptied before."""
        number = self.random.randrange(len(self.graphs))
        emptied = self.random.choice(("nothing", "nothing", "memory", "files", "both"))
        if emptied in ("memory", "both"):
            torch._inductor.utils.clear_caches()
        if emptied in ("files", "both"):
            for path in Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]).iterdir():
                shutil.rmtree(path, ignore_errors=True)
        if self.random.random() < 0.3:
            self.models[number] = "loaded", aot.load(self.packages[number])
        else:
            self.models[number] = self.compiled(number)
        self.counts[f"models {self.models[number][0]}"] += 1
        self.counts[f"emptied: {emptied}"] += 1

    def run(self, seconds: float, seed: int) -> None:
        """Two threads ask and two answer; this one swaps models."""
        work = [*((self.ask, seed + number) for number in (1, 2)), (self.answer,), (self.answer,)]
        threads = [threading.Thread(target=function, args=given, daemon=True) for function, *given in work]  # type: ignore[misc]
        for thread in threads:
            thread.start()
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self.swap()
            time.sleep(self.random.uniform(0, 2))
        self.over.set()
        for thread in threads:
            thread.join(60)
        if any(thread.is_alive() for thread in threads):
            self.counts["wrong: a thread hangs"] += 1


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(Path(directory) / "cache")
        soak, seconds = Soak(arguments.seed, Path(directory)), 60 * arguments.minutes
        soak.run(seconds / 10, arguments.seed)  # until everything was done once
        soak.over.clear()
        before, kept = resident_megabytes(), soak.answers_megabytes()
        soak.run(seconds * 9 / 10, arguments.seed + 10)
        after, growth = resident_megabytes(), soak.answers_megabytes() - kept
    for name, count in sorted(soak.counts.items()):
        print(f"{count:8} {name}")
    print(f"answers differ from the first by up to {soak.largest:.2g}")
    print(f"memory: {before:.0f} MB after a tenth of {arguments.minutes:g} minutes, {after:.0f} MB at the end")
    print(f"of what it grew by, {growth:.0f} MB are answers that later ones are compared with")
    return 1 if any(name.startswith(("wrong", "failed")) for name in soak.counts) else 0


if __name__ == "__main__":
    sys.exit(main())
