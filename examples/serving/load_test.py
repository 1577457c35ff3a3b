"""Sends a running service (service.py) requests from many clients at once, and checks every answer.

    python load_test.py model.pt2 --clients 16 --seconds 10

First a request of each kind, most of which must be refused, then the load: each client sends arrays over a connection of
its own and waits for each answer; refused with a 503, it waits a little and tries again. With several --host, clients
take turns at them, as behind a load balancer. Prints requests per second, the median and the 99th percentile of the time
to an answer, how many requests were shed, and which machine computed how many. Exits with 1 when an answer differs from
what the package gives when it is run here, or a status is not the expected one.
"""

from __future__ import annotations

import argparse
import http.client
import io
import statistics
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from guard import MAX_BODY
from PIL import Image
from service import MACHINE, row_shape

PAUSE = 0.05  # seconds before a client that was shed tries again


@dataclass
class Tally:
    """What one client saw."""

    seconds: list[float] = field(default_factory=list)
    machines: Counter[str] = field(default_factory=Counter)
    shed: int = 0
    wrong: list[str] = field(default_factory=list)


class Client:
    def __init__(self, host: str, port: int) -> None:
        self._connection = http.client.HTTPConnection(host, port, timeout=60)

    def send(self, body: bytes | Iterable[bytes], method: str = "POST", path: str = "/") -> tuple[int, bytes]:
        """Status and body of one answer; `machine` is then the one that computed it. Parts are sent as chunks."""
        self._connection.request(method, path, body)
        answer = self._connection.getresponse()
        self.machine = answer.headers.get(MACHINE, "?")
        return answer.status, answer.read()


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def differs(answer: np.ndarray, expected: np.ndarray) -> bool:
    """Whether two outputs differ by more than roundings: a batch of another size may add in another order."""
    if answer.shape != expected.shape or answer.dtype != expected.dtype:
        return True
    return bool(np.square(answer - expected).sum() > 1e-3 * np.square(expected).sum())


def png(height: int, width: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), "gray").save(file, "PNG")
    return file.getvalue()


def check_statuses(client: Client, shape: tuple[int, ...]) -> list[str]:
    """Sends what must be refused, and what must not; returns what got another status than it should."""
    good = np.zeros(shape, np.float32)
    cases: dict[str, tuple[bytes | Iterable[bytes], int]] = {
        "an array in Fortran's order": (npy(np.asfortranarray(good)), 200),
        "an image": (png(50, 80), 200 if len(shape) == 3 and shape[0] == 3 else 400),
        "half an image": (png(50, 80)[:60], 400),
        "another shape": (npy(np.zeros((*shape, 1), np.float32)), 400),
        "another type": (npy(good.astype(np.float64)), 400),
        "not a number": (npy(np.full(shape, np.nan, np.float32)), 400),
        "a .npy file cut short": (npy(good)[:-1], 400),
        "neither array nor image": (b"hello", 400),
        "nothing": (b"", 400),
        "more than a body may hold": (iter([bytes(MAX_BODY // 16)] * 17), 413),
    }
    wrong = []
    for name, (body, expected) in cases.items():
        status, text = client.send(body)
        print(f"{name}: {status} {text[:120].decode(errors='replace').strip() if status != 200 else ''}")
        if status != expected:
            wrong.append(f"{name}: status {status}, expected {expected}")
    for method, path, expected in (("GET", "/", 405), ("GET", "/-/healthz", 200)):
        status, _ = client.send(b"", method, path)
        if status != expected:
            wrong.append(f"{method} {path}: status {status}, expected {expected}")
    return wrong


def one_client(parsed: Any, bodies: list[bytes], expected: list[np.ndarray], first: int, tally: Tally) -> None:
    client = Client(parsed.host[first % len(parsed.host)], parsed.port)
    deadline, position = time.perf_counter() + parsed.seconds, first
    while time.perf_counter() < deadline:
        number = position % len(bodies)
        started = time.perf_counter()
        status, body = client.send(bodies[number])
        if status == 200:
            tally.seconds.append(time.perf_counter() - started)
            tally.machines[client.machine] += 1
            position += 1
            if differs(np.load(io.BytesIO(body)), expected[number]):
                tally.wrong.append(f"the answer to array {number} is not what the package gives")
        elif status == 503:
            tally.shed += 1
            time.sleep(PAUSE)
        else:
            tally.wrong.append(f"status {status}: {body[:200].decode(errors='replace')}")
            return


def load(parsed: Any, bodies: list[bytes], expected: list[np.ndarray]) -> list[str]:
    tallies = [Tally() for _ in range(parsed.clients)]
    threads = [
        threading.Thread(target=one_client, args=(parsed, bodies, expected, number, tally))
        for number, tally in enumerate(tallies)
    ]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    elapsed = time.perf_counter() - started
    seconds = sorted(s for tally in tallies for s in tally.seconds)
    if not seconds:
        return ["no request was answered", *(w for tally in tallies for w in tally.wrong)]
    print(
        f"{parsed.clients} clients: {len(seconds) / elapsed:.1f} requests/s, median {statistics.median(seconds) * 1e3:.0f}"
        f" ms, 99% {seconds[int(0.99 * (len(seconds) - 1))] * 1e3:.0f} ms, {len(seconds)} answered and checked, "
        f"{sum(tally.shed for tally in tallies)} shed"
    )
    machines = sum((tally.machines for tally in tallies), Counter())
    print("computed by " + ", ".join(f"{machine}: {count}" for machine, count in sorted(machines.items())))
    return [w for tally in tallies for w in tally.wrong]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", help="the .pt2 that is served")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--host", nargs="+", default=["127.0.0.1"], help="one, or several to take turns")
    parser.add_argument("--port", type=int, default=8000)
    parsed = parser.parse_args()

    shape = row_shape(parsed.package)
    rows = torch.randn(16, *shape, generator=torch.Generator().manual_seed(0))
    run = torch._inductor.aoti_load_package(parsed.package)
    with torch.inference_mode():
        expected = [run(row[None])[0].numpy() for row in rows]
    wrong = [line for host in parsed.host for line in check_statuses(Client(host, parsed.port), shape)]
    wrong += load(parsed, [npy(row.numpy()) for row in rows], expected)
    for line in dict.fromkeys(wrong):
        print(f"WRONG: {line}", file=sys.stderr)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
