"""The serving example, for real: a package behind Ray Serve with two replicas, on loopback."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from inductor_x86q import aot

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "examples" / "serving"

pytest.importorskip("ray.serve", reason="needs ray[serve]")
pytestmark = pytest.mark.slow


def environment() -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    # Ray gives its workers a low priority, with which they may not start in time beside other work.
    ray = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0", "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60"}
    return {**os.environ, **ray, "PYTHONPATH": path}


def wait_until_healthy(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()
        try:
            # Ray answers before there are replicas; the application's own route answers when there are.
            urllib.request.urlopen(f"http://127.0.0.1:{port}/-/healthz", timeout=10)
            urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=10)
        except urllib.error.HTTPError as error:
            if error.code == 405:
                return
            time.sleep(1)
        except OSError:
            time.sleep(1)
    pytest.fail(f"the service did not become healthy:\n{log.read_text()}")


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> str:
    from tests.test_aot import quantized

    q, x = quantized()
    path = tmp_path_factory.mktemp("serving") / "model.pt2"
    return aot.package(q, (x,), path, dynamic_shapes=({0: torch.export.Dim("batch")},))


@pytest.fixture(scope="module")
def port(package: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """A service of two replicas where four requests may wait."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        number = free.getsockname()[1]
    log = tmp_path_factory.mktemp("log") / "service.log"
    command = [sys.executable, EXAMPLE / "service.py", package, "--port", str(number), "--batch", "4", "--queue", "4"]
    with log.open("wb") as output:
        process = subprocess.Popen([*command, "--replicas", "2"], env=environment(), stdout=output, stderr=output)
    try:
        wait_until_healthy(process, number, log)
        yield number
    finally:
        process.terminate()
        process.wait(60)


def load_test(package: str, port: int, clients: int) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, EXAMPLE / "load_test.py", package, "--port", str(port), "--seconds", "5"]
    command += ["--clients", str(clients), "--host", "127.0.0.1", "localhost"]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)


def test_a_few_clients_get_the_answers_of_the_package_and_bad_requests_a_reason(package, port):
    done = load_test(package, port, 4)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "another shape: 400 the array is float32 of shape (3, 16, 16, 1): expected float32" in done.stdout
    assert "an image: 200" in done.stdout and "half an image: 400 the image cannot be read" in done.stdout
    assert "neither array nor image: 400 the body is neither a .npy array nor an image" in done.stdout
    answered, shed = map(int, re.findall(r"(\d+) answered and checked, (\d+) shed", done.stdout)[0])
    assert answered > 20 and shed == 0
    machines = re.findall(r"computed by (\d+\.\d+\.\d+\.\d+): (\d+)$", done.stdout, re.MULTILINE)
    assert [int(count) for _, count in machines] == [answered]


def test_too_many_clients_are_shed_and_the_others_served(package, port):
    done = load_test(package, port, 64)
    assert done.returncode == 0, done.stdout + done.stderr
    answered, shed = map(int, re.findall(r"(\d+) answered and checked, (\d+) shed", done.stdout)[0])
    assert answered > 20 and shed > 0


def test_another_package_is_noticed(package, port, tmp_path):
    """The load test would not pass whatever it is answered."""
    from tests.test_aot import quantized

    q, x = quantized()
    with torch.no_grad():
        for name, parameter in q.named_parameters():
            if name.endswith("bias"):
                parameter += 1
    other = aot.package(q, (x,), tmp_path / "other.pt2", dynamic_shapes=({0: torch.export.Dim("batch")},))
    done = load_test(other, port, 1)
    assert done.returncode == 1 and "is not what the package gives" in done.stderr


def test_images_are_cut_to_the_middle_and_scaled(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLE))
    import io

    import service
    from PIL import Image

    pixels = np.zeros((20, 60, 3), np.uint8)
    pixels[:, 20:40, 1] = 255
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    row = service.read_image(file.getvalue(), 20, 20)
    assert row.shape == (3, 20, 20) and row.dtype == np.float32
    assert (row[1] == 1).all() and not row[0].any() and not row[2].any()
    with pytest.raises(service.BadRequest, match="the image cannot be read: "):
        service.read_image(file.getvalue()[:60], 20, 20)
    with pytest.raises(service.BadRequest, match="the body is neither a"):
        service.read_image(b"hello", 20, 20)
