"""Stands in Ray Serve's proxies, in front of the workers: a request goes on when all of it is here, or is refused.

By itself a proxy passes a request on when its headers are here. The worker then waits for the body, for as long as the
client likes, and the proxy keeps whatever arrives meanwhile, of any size. Here the body is read first: what is larger
than MAX_BODY is cut off as it arrives, whatever the headers say, and who takes too long is told so. A slow client costs
memory in the proxy and never a worker.

`middlewares` is what a proxy calls, by the name in the environment variable CALLBACK. A worker reads through `Bodies`
too: on a cluster where Serve runs already, its proxies were started without this.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from typing import Any

MAX_BODY = 20 * 1024 * 1024
MAX_HEADERS = 32 * 1024
MAX_HELD = 256 * 1024 * 1024  # bytes of bodies at once, of all requests that are being read, wait or are computed
PATIENCE = 30.0  # seconds for the headers of a request to arrive, and as many for its body
LINGER = 1.0  # seconds in which a client may notice that it was refused

HEADERS_TOO_LARGE = b"HTTP/1.1 431 Request Header Fields Too Large\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"
CHUNK_MARKS = 16  # bytes that a chunk may have around what it carries

CALLBACK = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
PATIENCE_VARIABLE = "SERVING_PATIENCE"
# With these a client would tell the proxy to wait for ever, and to go on when the client is gone.
HINTS = {b"x-request-timeout-seconds", b"x-request-disconnect-disabled"}

Message = dict[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Headers = Iterable[tuple[bytes, bytes]]


class Refused(Exception):
    """A request that is not taken: the status of the answer, and what was wrong with it."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Bodies:
    """Reads bodies, and counts what is held of all of them."""

    def __init__(self, limit: int = MAX_BODY, patience: float = PATIENCE, most_held: int = MAX_HELD) -> None:
        self.limit, self.patience, self.most_held = limit, patience, most_held
        self.held = 0

    @contextlib.asynccontextmanager
    async def read(self, headers: Headers, receive: Receive) -> AsyncIterator[bytes]:
        """The whole body, which counts as held until the `async with` is left. Refused if there is no such body."""
        self._check_length(headers)
        body = bytearray()
        try:
            try:
                await asyncio.wait_for(self._collect(receive, body), self.patience)
            except asyncio.TimeoutError as error:
                message = f"the body did not arrive within {self.patience:g} s: send a smaller one, or send it faster"
                raise Refused(408, message) from error
            yield bytes(body)
        finally:
            self.held -= len(body)

    def _check_length(self, headers: Headers) -> None:
        """Spares an honest client the upload. What is not declared, or is a lie, is noticed as it arrives."""
        for name, value in headers:
            if name != b"content-length":
                continue
            if not value.isdigit() or len(value) > 18:
                raise Refused(400, f"Content-Length is {value[:40]!r}: expected the number of the body's bytes")
            if int(value) > self.limit:
                raise self._too_large()

    async def _collect(self, receive: Receive, body: bytearray) -> None:
        more = True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise Refused(400, "the client went away before all of the body was here")
            part = message.get("body", b"")
            if len(body) + len(part) > self.limit:
                raise self._too_large()
            if self.held + len(part) > self.most_held:
                raise Refused(503, "too many bodies are arriving at once: try again in a few seconds")
            self.held += len(part)
            body += part
            more = message.get("more_body", False)

    def _too_large(self) -> Refused:
        return Refused(413, f"the body is larger than {self.limit} bytes: send a smaller image or array")


class Guard:
    """ASGI middleware: what it wraps sees a request when its body is here, at once and whole."""

    def __init__(self, app: Any, bodies: Bodies) -> None:
        self._app, self._bodies = app, bodies

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close"})  # before it was accepted: the client gets a 403
        elif scope["type"] != "http":
            await self._app(scope, receive, send)
        else:
            try:
                check_headers(scope["headers"])
                async with self._bodies.read(scope["headers"], receive) as body:
                    headers = [(name, value) for name, value in scope["headers"] if name not in HINTS]
                    await self._app({**scope, "headers": headers}, replay(body, receive), send)
            except Refused as error:
                await self._refuse(error, receive, send)

    async def _refuse(self, error: Refused, receive: Receive, send: Send) -> None:
        text = f"{error}\n".encode()
        headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"content-length", str(len(text)).encode())]
        # What is left of the body would otherwise be taken for the next request, or read to its end.
        headers.append((b"connection", b"close"))
        await send({"type": "http.response.start", "status": error.status, "headers": headers})
        await send({"type": "http.response.body", "body": text, "more_body": True})
        # A connection that is closed while bytes arrive is reset, and many clients then report that, not the answer.
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(discard(receive, self._bodies.limit), LINGER)
        await send({"type": "http.response.body", "body": b""})


def check_headers(headers: Headers) -> None:
    """Refuses what the proxy would pass on to a worker, or fail at with a status of 500."""
    if sum(len(name) + len(value) for name, value in headers) > MAX_HEADERS:
        raise Refused(431, f"the headers are larger than {MAX_HEADERS} bytes: send fewer, or shorter ones")
    for name, value in headers:
        try:
            value.decode()
        except UnicodeDecodeError as error:
            raise Refused(400, f"the value of the header {name.decode('latin-1')} is not text in UTF-8") from error


def replay(body: bytes, receive: Receive) -> Receive:
    """Gives a body that was read already, then what the connection gives: that the client is gone, at some time."""
    unread = True

    async def again() -> Message:
        nonlocal unread
        if not unread:
            return await receive()
        unread = False
        return {"type": "http.request", "body": body, "more_body": False}

    return again


async def discard(receive: Receive, most: int) -> None:
    while most > 0:
        message = await receive()
        if message["type"] == "http.disconnect" or not message.get("more_body", False):
            return
        most -= len(message["body"])


def watch_connections(patience: float) -> None:
    """Has uvicorn cut off what no middleware sees: headers that do not arrive in time, and headers without end.

    uvicorn times the silence after an answer, and nothing before the first request or within headers; and it keeps all
    headers it gets, those behind a chunked body too, at thirty times their size. A proxy without file descriptors or
    memory answers nobody. Serve has no option for any of it, so the class that a server looks up when it starts is
    replaced by one that counts.
    """
    from uvicorn.protocols.http import auto
    from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

    class Watched(HttpToolsProtocol):
        timer: asyncio.TimerHandle | None = None
        besides = 0  # bytes that are not of a body, since the last request's headers were complete

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self.timer = self.loop.call_later(patience, transport.abort)

        def connection_lost(self, exc: Exception | None) -> None:
            super().connection_lost(exc)
            self.stop_timer()

        def data_received(self, data: bytes) -> None:
            self.besides += len(data)
            super().data_received(data)
            self.besides = max(self.besides, 0)
            in_work = self.cycle is not None and not self.cycle.response_complete
            if self.besides > MAX_HEADERS and in_work:  # behind a body, or the next request's: no place for an answer
                self.transport.abort()
            elif self.besides > MAX_HEADERS:
                self.transport.write(HEADERS_TOO_LARGE)
                self.transport.close()
            elif in_work:  # the Guard times the body, and Serve the answer
                self.stop_timer()
            elif self.timer is None:
                self.timer = self.loop.call_later(patience, self.transport.abort)

        def on_headers_complete(self) -> None:
            super().on_headers_complete()
            self.besides = 0

        def on_body(self, body: bytes) -> None:
            self.besides -= len(body) + CHUNK_MARKS
            super().on_body(body)

        def stop_timer(self) -> None:
            if self.timer is not None:
                self.timer.cancel()
                self.timer = None

    auto.AutoHTTPProtocol = Watched


def middlewares() -> list[Any]:
    """What a proxy of Serve calls before it starts to listen."""
    from starlette.middleware import Middleware

    patience = float(os.environ.get(PATIENCE_VARIABLE, PATIENCE))
    watch_connections(patience)
    return [Middleware(Guard, bodies=Bodies(patience=patience))]
