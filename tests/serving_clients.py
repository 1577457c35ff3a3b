"""Clients, servers and workers on loopback, for the tests of the serving example."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import re
import select
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

PATIENCE = 0.5
LONG = 20  # seconds after which something has failed
NOMINAL = 10 * 10**9  # bytes that an upload would have, if nobody stopped it


def post(body: bytes, *headers: bytes) -> bytes:
    return b"\r\n".join([b"POST / HTTP/1.1", b"Host: here", *headers, b"", body])


def whole(body: bytes, *headers: bytes) -> bytes:
    return post(body, b"Content-Length: %d" % len(body), *headers)


def connect(port: int, data: bytes = b"") -> socket.socket:
    client = socket.create_connection(("127.0.0.1", port), timeout=LONG)
    client.sendall(data)
    return client


def answer(client: socket.socket) -> tuple[int, bytes]:
    """Status and body, as soon as they are here; 0 when the connection ends without."""
    received, text, length = b"", b"", None
    with contextlib.suppress(ConnectionError):
        while (length is None or len(text) < int(length[1])) and (part := client.recv(65536)):
            received += part
            head, _, text = received.partition(b"\r\n\r\n")
            length = re.search(rb"content-length: *(\d+)", head.lower())
    return int(received.split()[1]) if received else 0, text


def ask(port: int, data: bytes) -> tuple[int, bytes]:
    with connect(port, data) as client:
        return answer(client)


def upload(port: int, attentive: bool) -> tuple[int, int, bytes]:
    """Sends chunks until an answer is here, or just until it no longer can: the bytes sent, and the answer."""
    chunk = b"10000\r\n" + bytes(65536) + b"\r\n"
    sent = 0
    with connect(port, post(b"", b"Transfer-Encoding: chunked")) as client:
        with contextlib.suppress(ConnectionError):
            while sent < NOMINAL and not (attentive and select.select([client], [], [], 0)[0]):
                client.sendall(chunk)
                sent += 65536
        return sent, *answer(client)


def trickle(port: int, head: bytes, part: bytes) -> tuple[float, int, bytes]:
    """Sends a part from time to time until there is an answer or an end: the seconds it took, and the answer."""
    started = time.monotonic()
    with connect(port, head) as client:
        while not select.select([client], [], [], 0.05)[0]:
            client.sendall(part)
        return time.monotonic() - started, *answer(client)


@contextlib.contextmanager
def a_hundred(port: int, data: bytes = b"") -> Iterator[list[socket.socket]]:
    """Connections on which nothing more is sent."""
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(connect(port, data)) for _ in range(100)]


MALFORMED = [
    b"Content-Length: abc",
    b"Content-Length: -1",
    b"Content-Length:",
    b"Content-Length: +5",
    b"Content-Length: 1_0",  # which int() takes
    "Content-Length: ٣".encode(),  # so is this one
    b"Content-Length: " + b"9" * 5000,  # and this one is more digits than it takes
    b"X-Request-Id: \xff\xfe",
]


# The guard by itself: behind a server that leaves all checks to it, and behind that of Ray Serve


async def one_request(app: Any, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """The least of HTTP with which an application reads from a socket: one request, and nothing is checked."""
    head = (await reader.readuntil(b"\r\n\r\n")).split(b"\r\n")
    fields = [line.partition(b":") for line in head[1:-2]]
    headers = [(name.lower(), value.strip()) for name, _, value in fields]
    body = body_parts(reader, dict(headers))

    async def receive() -> dict[str, Any]:
        try:
            part = await anext(body, None)
        except (EOFError, ValueError, OSError):
            return {"type": "http.disconnect"}
        return {"type": "http.request", "body": part or b"", "more_body": part is not None}

    async def send(message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            lines = [b"HTTP/1.1 %d -" % message["status"], *(b"%b: %b" % pair for pair in message["headers"])]
            writer.write(b"\r\n".join([*lines, b"", b""]))
        else:
            writer.write(message["body"])
        await writer.drain()

    with contextlib.suppress(OSError):
        await app({"type": "http", "headers": headers}, receive, send)
    writer.close()


async def body_parts(reader: asyncio.StreamReader, headers: dict[bytes, bytes]) -> AsyncIterator[bytes]:
    if b"transfer-encoding" in headers:
        while size := int(await reader.readline(), 16):
            yield (await reader.readexactly(size + 2))[:-2]
        return
    length = headers.get(b"content-length", b"")
    left = int(length) if length.isdigit() and len(length) < 20 else 0
    while left:
        part = await reader.read(min(left, 65536))
        if not part:
            raise EOFError
        left -= len(part)
        yield part


@contextlib.contextmanager
def thread(run: Callable[[], None], stop: Callable[[], None]) -> Iterator[None]:
    running = threading.Thread(target=run)
    running.start()
    try:
        yield
    finally:
        stop()
        running.join(LONG)
        assert not running.is_alive()


@contextlib.contextmanager
def asyncio_server(app: Any, listening: socket.socket) -> Iterator[None]:
    stopped = threading.Event()

    async def serve() -> None:
        server = await asyncio.start_server(functools.partial(one_request, app), sock=listening)
        while not stopped.is_set():
            await asyncio.sleep(0.02)
        server.close()

    with thread(lambda: asyncio.run(serve()), stopped.set):
        yield


@contextlib.contextmanager
def uvicorn_server(app: Any, listening: socket.socket) -> Iterator[None]:
    import uvicorn
    from uvicorn.protocols.http import auto

    with pytest.MonkeyPatch.context() as patch:
        import guard

        patch.setattr(auto, "AutoHTTPProtocol", auto.AutoHTTPProtocol)  # puts it back at the end
        guard.watch_connections(PATIENCE)
        server = uvicorn.Server(uvicorn.Config(app, lifespan="off", log_level="critical"))

        def stop() -> None:
            server.should_exit = server.force_exit = True

        with thread(lambda: server.run(sockets=[listening]), stop):
            yield


@dataclass
class Worker:
    """What the guard stands in front of, with what it was given to do; answers with the size of the body."""

    requests: list[dict[bytes, bytes]] = field(default_factory=list)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.requests.append(dict(scope["headers"]))
        message = await receive()
        assert not message["more_body"]
        text = b"%d" % len(message["body"])
        headers = [(b"content-length", b"%d" % len(text))]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": text})


@dataclass
class Front:
    port: int
    worker: Worker
    bodies: Any


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LONG
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
