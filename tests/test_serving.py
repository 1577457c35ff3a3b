"""The serving example on loopback: its guard by itself, behind two servers, and all of it for real, with Ray Serve."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import io
import os
import re
import select
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from inductor_x86q import aot
from tests.serving_clients import (
    LONG,
    MALFORMED,
    PATIENCE,
    Front,
    Worker,
    a_hundred,
    answer,
    ask,
    asyncio_server,
    connect,
    post,
    trickle,
    upload,
    uvicorn_server,
    wait_until,
    whole,
)

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "examples" / "serving"

LIMIT = 2**20  # of a body, for the guard by itself
BUFFERS = 24 * 2**20  # bytes that may be on the way between two sockets of one machine

needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs ray[serve]")


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLE))


behind_uvicorn = pytest.param(
    uvicorn_server,
    id="uvicorn",
    marks=pytest.mark.skipif(importlib.util.find_spec("uvicorn") is None, reason="needs ray[serve]"),
)


@pytest.fixture(params=[pytest.param(asyncio_server, id="asyncio"), behind_uvicorn])
def front(request: pytest.FixtureRequest, example: None) -> Iterator[Front]:
    import guard

    worker, bodies = Worker(), guard.Bodies(LIMIT, PATIENCE, most_held=3 * LIMIT)
    with (
        socket.create_server(("127.0.0.1", 0), backlog=512) as listening,
        request.param(guard.Guard(worker, bodies), listening),
    ):
        yield Front(listening.getsockname()[1], worker, bodies)
    assert bodies.held == 0


def test_a_worker_gets_a_body_whole_up_to_the_limit(front):
    chunked = post(b"3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n", b"Transfer-Encoding: chunked")
    assert ask(front.port, chunked) == (200, b"5")
    assert ask(front.port, whole(bytes(LIMIT))) == (200, b"%d" % LIMIT)
    assert ask(front.port, whole(b"")) == (200, b"0")
    assert ask(front.port, post(b"")) == (200, b"0")


@pytest.mark.parametrize("attentive", [True, False])
def test_an_upload_of_10_gb_in_chunks_is_cut_off_at_the_limit(front, attentive):
    sent, status, text = upload(front.port, attentive)
    assert sent < 2 * LIMIT + BUFFERS
    assert status == 413 and text == b"the body is larger than 1048576 bytes: send a smaller image or array\n"
    assert front.worker.requests == []


def test_a_length_over_the_limit_is_refused_before_the_body_is_sent(front):
    status, text = ask(front.port, post(b"", b"Content-Length: 10000000000"))
    assert status == 413 and b"the body is larger than 1048576 bytes" in text
    assert front.worker.requests == []


def test_a_client_that_is_refused_may_finish_sending_and_then_read_why(front):
    half = bytes(LIMIT * 3 // 4)
    with connect(front.port, post(half, b"Content-Length: %d" % (2 * len(half)))) as client:
        time.sleep(0.1)  # in which a connection that was closed would be reset
        client.sendall(half)
        assert answer(client)[0] == 413


def test_a_slow_client_is_told_so_and_holds_no_worker(front):
    seconds, status, text = trickle(front.port, post(b"", b"Content-Length: 1000"), b"x")
    assert seconds > 0.9 * PATIENCE
    assert status == 408 and text == b"the body did not arrive within 0.5 s: send a smaller one, or send it faster\n"
    assert front.worker.requests == []


def test_a_hundred_that_send_nothing_and_a_hundred_without_a_body_block_nobody(front):
    with a_hundred(front.port), a_hundred(front.port, post(b"", b"Content-Length: 9")) as incomplete:
        assert ask(front.port, whole(b"hello")) == (200, b"5")
        assert len(front.worker.requests) == 1
        assert {answer(client)[0] for client in incomplete} == {408}


def test_malformed_headers_are_bad_requests(front):
    reasons = (b"Content-Length is b'", b"the value of the header x-request-id is not text", b"Invalid HTTP request")
    for header in MALFORMED:
        status, text = ask(front.port, post(b"", header))
        assert status == 400 and text.startswith(reasons), (header, status, text)
    assert front.worker.requests == []


def test_headers_without_measure_are_refused(front):
    status, _ = ask(front.port, post(b"", b"X-Long: " + b"a" * 40000))
    assert status == 431 and front.worker.requests == []


def test_what_all_bodies_hold_together_is_bounded(front):
    front.bodies.patience = 2 * LONG
    unfinished = post(bytes(LIMIT - 1), b"Content-Length: %d" % LIMIT)
    with contextlib.ExitStack() as stack:
        for _ in range(3):
            stack.enter_context(connect(front.port, unfinished))
        wait_until(lambda: front.bodies.held == 3 * (LIMIT - 1))
        status, text = ask(front.port, unfinished)
        assert status == 503 and text == b"too many bodies are arriving at once: try again in a few seconds\n"
    wait_until(lambda: front.bodies.held == 0)
    assert ask(front.port, whole(bytes(LIMIT))) == (200, b"%d" % LIMIT)


def test_a_client_that_leaves_is_forgotten(front):
    front.bodies.patience = 2 * LONG
    with connect(front.port, post(bytes(1000), b"Content-Length: 2000")):
        wait_until(lambda: front.bodies.held == 1000)
    wait_until(lambda: front.bodies.held == 0)
    assert front.worker.requests == []


def test_a_client_cannot_switch_off_the_time_limits_of_serve(front):
    hints = [b"X-Request-Timeout-Seconds: 0", b"X-Request-Disconnect-Disabled: ?1"]
    assert ask(front.port, whole(b"hello", *hints)) == (200, b"5")
    assert set(front.worker.requests[0]) == {b"host", b"content-length"}


def test_websockets_are_refused(example):
    import guard

    worker, sent = Worker(), []

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    asyncio.run(guard.Guard(worker, guard.Bodies())({"type": "websocket"}, None, send))
    assert sent == [{"type": "websocket.close"}] and worker.requests == []


@pytest.mark.parametrize("front", [behind_uvicorn], indirect=True)
class TestConnections:
    """What the guard adds to uvicorn, for what never becomes a request."""

    def test_silence_has_an_end(self, front):
        with a_hundred(front.port) as silent:
            started = time.monotonic()
            assert {answer(client) for client in silent} == {(0, b"")}
            assert time.monotonic() - started > PATIENCE / 2

    def test_slow_headers_are_cut_off_on_a_new_connection_and_on_a_used_one(self, front):
        for before in (b"", whole(b"hello")):
            with connect(front.port, before) as client:
                assert not before or answer(client) == (200, b"5")
                started = time.monotonic()
                with contextlib.suppress(ConnectionError):
                    client.sendall(b"POST / HTTP/1.1\r\n")
                    while time.monotonic() - started < LONG and not select.select([client], [], [], 0.05)[0]:
                        client.sendall(b"X-More: a\r\n")
                assert 0.9 * PATIENCE < time.monotonic() - started < LONG

    def test_a_used_connection_may_be_used_again(self, front):
        with connect(front.port) as client:
            for _ in range(3):
                client.sendall(whole(bytes(1000)))
                assert answer(client) == (200, b"1000")
                time.sleep(PATIENCE / 2)
            time.sleep(PATIENCE)  # nothing was begun: the silence after an answer is for uvicorn to time
            client.sendall(whole(bytes(1000)))
            assert answer(client) == (200, b"1000")

    @pytest.mark.parametrize(
        "beginning",
        [b"POST / HTTP/1.1\r\n", post(b"1\r\na\r\n0\r\n", b"Transfer-Encoding: chunked")],
        ids=["headers", "behind a body"],
    )
    @pytest.mark.parametrize("part", [b"a:b\r\n" * 10000, b"a" * 50000], ids=["many", "one"])
    def test_headers_without_end_are_cut_off(self, front, beginning, part):
        front.bodies.patience = 2 * LONG
        sent = 0
        with connect(front.port, beginning + b"x:") as client, contextlib.suppress(ConnectionError):
            while sent < BUFFERS:
                client.sendall(part)
                sent += len(part)
        assert sent < BUFFERS and front.worker.requests == []

    def test_small_chunks_buy_no_headers(self, front):
        body = b"1\r\na\r\n" * 100000 + b"0\r\n"
        with connect(front.port, post(body, b"Transfer-Encoding: chunked")) as client:
            with contextlib.suppress(ConnectionError):
                client.sendall(b"a:b\r\n" * 60000 + b"\r\n")
            assert answer(client) == (0, b"")

    def test_a_body_in_small_chunks_is_no_header(self, front):
        chunks = b"8\r\nabcdefgh\r\n" * 20000 + b"0\r\n\r\n"
        assert ask(front.port, post(chunks, b"Transfer-Encoding: chunked")) == (200, b"160000")


# All of it, behind Ray Serve


SERVICE_PATIENCE = 3


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
    command += ["--replicas", "2", "--patience", str(SERVICE_PATIENCE)]
    with log.open("wb") as output:
        process = subprocess.Popen(command, env=environment(), stdout=output, stderr=output)
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


@needs_ray
@pytest.mark.slow
def test_a_few_clients_get_the_answers_of_the_package_and_bad_requests_a_reason(package, port):
    done = load_test(package, port, 4)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "another shape: 400 the array is float32 of shape (3, 16, 16, 1): expected float32" in done.stdout
    assert "an image: 200" in done.stdout and "half an image: 400 the image cannot be read" in done.stdout
    assert "more than a body may hold: 413 the body is larger than 20971520 bytes" in done.stdout
    assert "neither array nor image: 400 the body is neither a .npy array nor an image" in done.stdout
    answered, shed = map(int, re.findall(r"(\d+) answered and checked, (\d+) shed", done.stdout)[0])
    assert answered > 20 and shed == 0
    machines = re.findall(r"computed by (\d+\.\d+\.\d+\.\d+): (\d+)$", done.stdout, re.MULTILINE)
    assert [int(count) for _, count in machines] == [answered]


@needs_ray
@pytest.mark.slow
def test_too_many_clients_are_shed_and_the_others_served(package, port):
    done = load_test(package, port, 64)
    assert done.returncode == 0, done.stdout + done.stderr
    answered, shed = map(int, re.findall(r"(\d+) answered and checked, (\d+) shed", done.stdout)[0])
    assert answered > 20 and shed > 0


@needs_ray
@pytest.mark.slow
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


@pytest.fixture(scope="module")
def array() -> bytes:
    file = io.BytesIO()
    np.save(file, np.zeros((3, 16, 16), np.float32))
    return file.getvalue()


@needs_ray
@pytest.mark.slow
def test_what_arrives_is_bounded_in_front_of_the_workers(port, array):
    sent, status, text = upload(port, attentive=False)
    assert sent < 2 * 20971520 + BUFFERS
    assert status == 413 and b"the body is larger than 20971520 bytes" in text
    for header in MALFORMED:
        assert ask(port, post(b"", header))[0] == 400
    assert ask(port, post(b"", b"X-Long: " + b"a" * 40000))[0] == 431
    assert ask(port, whole(array))[0] == 200


@needs_ray
@pytest.mark.slow
def test_clients_that_are_slow_or_send_nothing_hold_no_worker(port, array):
    """More than the workers take and may wait, which together are 20: were one of them given a worker, it were full."""
    with a_hundred(port) as silent, a_hundred(port, post(b"", b"Content-Length: 9")) as incomplete:
        assert [ask(port, whole(array))[0] for _ in range(5)] == [200] * 5
        seconds, status, text = trickle(port, post(b"", b"Content-Length: 1000"), b"x")
        assert seconds > 0.9 * SERVICE_PATIENCE
        assert status == 408 and b"the body did not arrive within 3 s" in text
        assert {answer(client)[0] for client in incomplete} == {408}
        assert {answer(client) for client in silent} == {(0, b"")}


@needs_ray
def test_images_are_cut_to_the_middle_and_scaled(example):
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
