"""Serves a package made by `inductor_x86q.package` over HTTP with Ray Serve (`pip install "ray[serve]" pillow`).

    python service.py model.pt2 --replicas 2 --threads 1 --mean 0.498 --std 0.502

    curl --data-binary @cat.jpg http://127.0.0.1:8000/        five classes as JSON: {"top": [{"class": 281, ...}, ...]}
    curl --data-binary @x.npy http://127.0.0.1:8000/ -o y.npy   a float32 array in, the package's output back
    curl http://127.0.0.1:8000/-/healthz                      200 while requests can be served

The package takes a batch of any size of one float32 input, [batch, ...]; a request is one row of it, an image where the
rows are [3, height, width]. Requests that wait together are computed together. A body that is neither, or of another
shape or type, gets a 400 that says so; when more requests wait than --queue, further ones get a 503 at once. A worker
sees a request when all of it is here: guard.py, which runs in front, has the limits of size and time.

An answer's `machine` header is the address of the machine that computed it. README.md beside this file says how to serve
on more than one machine.

Loading needs the libraries of torch alone. A replica has --threads threads; the package should have been made with as
many, since generated kernels keep the number with which they were compiled.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import guard
import numpy as np
import ray
import torch
from PIL import Image, UnidentifiedImageError
from ray import serve
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response

from inductor_x86q.aot import load, read_report

ANSWER_SECONDS = 60  # for a request that is here to be answered, with the time it waits for a worker
NPY = b"\x93NUMPY"
MACHINE = "machine"  # the header of an answer with the address of the machine that computed it


class BadRequest(Exception):
    """What a request holds cannot be answered; the message says why."""


@serve.deployment(health_check_period_s=10, health_check_timeout_s=30)
class Classifier:
    """A replica: a process with the package loaded and threads of its own."""

    def __init__(self, path: str, threads: int, max_batch: int, wait: float, mean: float, std: float) -> None:
        self._headers = {MACHINE: ray.util.get_node_ip_address()}
        self._bodies = guard.Bodies()
        self.shape = row_shape(path)
        self.mean, self.std = mean, std
        self._run = load(path)
        # Off the event loop, so that requests are read and checked while a batch runs; OpenMP keeps the number of
        # threads for each thread that calls it.
        self._executor = ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(threads,))
        self._batched.set_max_batch_size(max_batch)
        self._batched.set_batch_wait_timeout_s(wait)
        self._least = self._executor.submit(self._smallest_batch).result()
        self._executor.submit(self._compute, [np.zeros(self.shape, np.float32)] * max_batch).result()

    async def __call__(self, request: Request) -> Response:
        if request.method != "POST":
            return PlainTextResponse("expected a POST with an image or a .npy array as its body\n", 405)
        try:
            async with self._bodies.read(request.headers.raw, request.receive) as body:
                return await self._answer(body)
        except guard.Refused as error:
            return PlainTextResponse(f"{error}\n", error.status, headers={"Connection": "close"})

    async def _answer(self, body: bytes) -> Response:
        try:
            row = read_array(body, self.shape) if body.startswith(NPY) else self._read_image(body)
        except BadRequest as error:
            return PlainTextResponse(f"{error}\n", 400)
        output = await self._batched(row)
        if not body.startswith(NPY):
            return JSONResponse({"top": top(output, 5)}, headers=self._headers)
        file = io.BytesIO()
        np.save(file, output)
        return Response(file.getvalue(), headers=self._headers, media_type="application/octet-stream")

    async def check_health(self) -> None:
        """Ray calls it; a replica where it fails, or does not return in time, is replaced."""
        (output,) = await self._compute_aside([np.zeros(self.shape, np.float32)])
        if not np.isfinite(output).all():
            raise RuntimeError("the package gives NaN or infinity for zeros")

    @serve.batch
    async def _batched(self, rows: list[np.ndarray]) -> list[np.ndarray]:
        return await self._compute_aside(rows)

    async def _compute_aside(self, rows: list[np.ndarray]) -> list[np.ndarray]:
        return await asyncio.get_running_loop().run_in_executor(self._executor, self._compute, rows)

    def _compute(self, rows: list[np.ndarray]) -> list[np.ndarray]:
        filled = rows + rows[-1:] * (self._least - len(rows))
        batch = np.ascontiguousarray(np.stack(filled))  # stack keeps the layout of rows that are transposed
        with torch.inference_mode():
            return list(self._run(torch.from_numpy(batch)).numpy()[: len(rows)])

    def _smallest_batch(self) -> int:
        """1 or 2: torch.export takes an open size to be at least 2, and a package that checks its inputs insists."""
        try:
            self._run(torch.zeros(1, *self.shape))
        except RuntimeError:
            return 2
        return 1

    def _read_image(self, body: bytes) -> np.ndarray:
        if len(self.shape) != 3 or self.shape[0] != 3:
            raise BadRequest(f"the body is no .npy array: expected one, float32 of shape {self.shape}")
        return (read_image(body, self.shape[2], self.shape[1]) - self.mean) / self.std


def row_shape(path: str) -> tuple[int, ...]:
    """The shape of one row of the package's only input, as the report inside says it."""
    inputs = [node for node in read_report(path).nodes if node.kind == "input"]
    (first,) = [node for node in inputs if node.shape]  # sizes that are open have inputs of their own
    if isinstance(first.shape[0], int):
        raise ValueError(f"{path} takes batches of {first.shape[0]} only: package it with dynamic_shapes")
    return tuple(int(size) for size in first.shape[1:])


def read_array(body: bytes, shape: tuple[int, ...]) -> np.ndarray:
    """A float32 array of the given shape from the bytes of a .npy file."""
    try:
        array = np.load(io.BytesIO(body), allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise BadRequest(f"the body begins as a .npy file and cannot be read as one: {error}") from error
    if array.dtype != np.float32 or array.shape != shape:
        raise BadRequest(f"the array is {array.dtype} of shape {array.shape}: expected float32 of shape {shape}")
    if not np.isfinite(array).all():
        raise BadRequest("the array holds NaN or infinity")
    return array


def read_image(body: bytes, width: int, height: int) -> np.ndarray:
    """The middle of an image as float32 of shape [3, height, width], 0 to 1."""
    try:
        image = Image.open(io.BytesIO(body)).convert("RGB")
    except UnidentifiedImageError as error:
        raise BadRequest("the body is neither a .npy array nor an image") from error
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise BadRequest(f"the image cannot be read: {error}") from error
    scale = min(image.width / width, image.height / height)
    left, top = (image.width - scale * width) / 2, (image.height - scale * height) / 2
    box = (left, top, left + scale * width, top + scale * height)
    pixels = image.resize((width, height), Image.Resampling.BICUBIC, box=box)
    return np.asarray(pixels, np.float32).transpose(2, 0, 1) / 255


def top(output: np.ndarray, count: int) -> list[dict[str, Any]]:
    """The classes with the largest values, by their softmax."""
    values = np.exp(output - output.max())
    values /= values.sum()
    return [{"class": int(i), "probability": float(values[i])} for i in np.argsort(-values)[:count]]


def application(parsed: Any) -> serve.Application:
    deployment = Classifier.options(  # type: ignore[attr-defined]
        num_replicas=parsed.replicas,
        # A replica takes what it computes now and what it computes next; what is beyond that waits in front of it.
        max_ongoing_requests=2 * parsed.batch,
        max_queued_requests=parsed.queue,
        ray_actor_options={
            "num_cpus": parsed.threads,
            "runtime_env": {"env_vars": {"OMP_NUM_THREADS": str(parsed.threads), "AOTI_RUNTIME_CHECK_INPUTS": "1"}},
        },
    )
    path = os.path.abspath(parsed.package)
    return deployment.bind(path, parsed.threads, parsed.batch, parsed.wait / 1000, parsed.mean, parsed.std)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", help="a .pt2 with a dynamic batch")
    parser.add_argument("--replicas", type=int, default=2, help="processes over all machines (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="of each replica (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=8, help="most requests computed at once (default: %(default)s)")
    parser.add_argument("--wait", type=float, default=2, help="ms to wait for a batch to fill (default: %(default)s)")
    parser.add_argument("--queue", type=int, default=64, help="requests that may wait (default: %(default)s)")
    parser.add_argument(
        "--patience", type=float, default=guard.PATIENCE, help="s for a request to arrive (default: %(default)s)"
    )
    parser.add_argument("--mean", type=float, default=0.5, help="subtracted from pixels of 0 to 1")
    parser.add_argument("--std", type=float, default=0.5, help="divides them then")
    parser.add_argument(
        "--address", default="local", help="of a Ray cluster; 'auto': that of this machine. Default: new"
    )
    parser.add_argument("--host", default="127.0.0.1", help="to listen at; 0.0.0.0 for all interfaces")
    parser.add_argument("--port", type=int, default=8000)
    parsed = parser.parse_args()

    # Serve's proxies inherit the job's environment, and the file, on every machine.
    variables = {guard.CALLBACK: "guard:middlewares", guard.PATIENCE_VARIABLE: str(parsed.patience)}
    environment = {"env_vars": variables, "py_modules": [str(Path(guard.__file__).resolve())]}
    local = {"include_dashboard": False} if parsed.address == "local" else {}
    ray.init(address=parsed.address, runtime_env=environment, **local)
    http = {"host": parsed.host, "port": parsed.port, "request_timeout_s": ANSWER_SECONDS}
    serve.start(proxy_location="EveryNode", http_options=http)
    serve.run(application(parsed), name="classifier", blocking=True)


if __name__ == "__main__":
    main()
