"""x86q bench: engines against each other, each in a process of its own, taking turns.

The engines of one network are set up one after the other and then run in short slices, round after round; a process
whose turn it is not is stopped (SIGSTOP), so that no spinning thread pool takes time from another. Ratios are of
medians over all slices of one run. Outputs are checked against the float model's, and an engine that fails is listed
with its error. `of peak` is how many multiply-accumulates an engine does in a second, as a share of what one large int8
matrix product does on the same threads, which takes its turn among the engines.

With --starts each engine is set up in two processes, of which the first finds an empty cache directory and the second
what the first left there: `cold` and `warm` are the seconds of the first call, with imports and quantization done before;
`peak MB` is the most memory that the first process held during that call, without the C++ compiler's, and `MB` what the
second holds when it is ready.
For a package, cold is building the package, loading it and the first call, and warm is loading and the first call.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import gc
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from inductor_x86q import progress
from inductor_x86q.report.plot import obstacle
from inductor_x86q.report.tables import Column, Table, group, show
from inductor_x86q.tools import bars
from inductor_x86q.tools.engines import BASELINE, DEFAULT_ENGINES, ENGINES, PACKAGE_VARIABLE, PEAK, PEAK_SIZE
from inductor_x86q.tools.files import writable
from inductor_x86q.tools.sequences import NETWORKS

if TYPE_CHECKING:
    from rich.console import Group


@dataclasses.dataclass
class Result:
    """One engine on one network. Times in milliseconds a call; `snr` in dB against the eager float model."""

    engine: str
    median: float = math.nan
    low: float = math.nan  # 10th and 90th percentile
    high: float = math.nan
    compile_seconds: float = math.nan  # from the float model to the first result, with caches as they are
    cold_seconds: float = math.nan  # the first call, with empty caches
    warm_seconds: float = math.nan  # the first call in another process, with the caches that the cold one left
    peak_megabytes: float = math.nan  # of memory, during the first call
    resident_megabytes: float = math.nan  # of memory, when ready
    snr: float = math.nan
    of_peak: float = math.nan  # multiply-accumulates a second, as a share of those of a large int8 matrix product
    error: str = ""


@dataclasses.dataclass(frozen=True)
class Settings:
    """What all engines of a run have in common."""

    batch: int = 1
    threads: int = 2
    size: int = 224  # of images
    length: int = 128  # of sequences
    seconds: float = 4.0  # of running, an engine


# --- the worker: one engine in its process, driven over its standard input --------------------------------------------


def worker() -> None:
    """Sets an engine up as the first line of standard input says, then runs one slice for every further line."""
    request = json.loads(sys.stdin.readline())
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not mix with the answers

    def answer(**values: Any) -> None:
        answers.write(json.dumps(values) + "\n")
        answers.flush()

    try:
        run, values = _set_up(request)
    except Exception as error:
        answer(
            error=f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200] if str(error).strip() else ''}"
        )
        return
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what is free is given back
    answer(**values, resident_megabytes=_megabytes("VmRSS"))
    for line in sys.stdin:
        deadline = time.perf_counter() + float(line)
        times: list[float] = []
        with torch.inference_mode():
            run()  # caches are cold after a stop
            while time.perf_counter() < deadline or len(times) < 3:
                started = time.perf_counter()
                run()
                times.append((time.perf_counter() - started) * 1e3)
        answer(times=times)


def _set_up(request: dict[str, Any]) -> tuple[Callable[[], torch.Tensor], dict[str, float]]:
    from inductor_x86q.testing import snr
    from inductor_x86q.tools import sequences, zoo

    torch.set_num_threads(request["threads"])
    if request["engine"] == PEAK:
        return ENGINES[PEAK](torch.nn.Module(), torch.empty(0)), {"macs": PEAK_SIZE**3}
    network, batch, size = request["network"], request["batch"], request["size"]
    if network in sequences.NETWORKS:
        model, x = sequences.build(network, batch, request["length"])
    else:
        model = zoo.build(network)
        torch.manual_seed(1)
        x = torch.randn(batch, 3, size, size)
    with torch.no_grad():
        reference, macs = _counted(model, x)
    started = time.perf_counter()
    with torch.no_grad():
        run = ENGINES[request["engine"]](model, x)
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here on
    with torch.inference_mode():
        called = time.perf_counter()
        output = run()
        ended = time.perf_counter()
        for _ in range(2):
            run()
    values = {"compile_seconds": ended - started, "first_call_seconds": ended - called}
    values["peak_megabytes"] = _megabytes("VmHWM")
    return run, {**values, "macs": macs, "snr": snr(output.float(), reference)}


def _megabytes(name: str) -> float:
    """A figure of this process's memory, as Linux names it in /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{name}:")).split()[1]) / 1024


def _counted(model: torch.nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, int]:
    """The model's output, and the multiply-accumulates of its convolutions and matrix products."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # the counter sees neither into it nor into fused attention
    try:
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            output = model(x)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return output, counter.get_total_flops() // 2


class _Worker:
    def __init__(self, engine: str, network: str, settings: Settings, caches: str | None = None) -> None:
        self.result = Result(engine)
        self.first_call_seconds, self.macs = math.nan, math.nan
        self.times: list[float] = []
        self._process = subprocess.Popen(
            [sys.executable, "-c", "from inductor_x86q.tools.bench import worker; worker()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": str(settings.threads), **_cache_directory(caches)},
        )
        request = {**dataclasses.asdict(settings), "engine": engine, "network": network}
        reply = self._ask(json.dumps(request))
        self.result.error = reply.get("error", "")
        if not self.result.error:
            self.macs = reply.pop("macs")
            self.first_call_seconds = reply.pop("first_call_seconds", math.nan)
            self.result = Result(engine, **reply)
        self._process.send_signal(signal.SIGSTOP)

    def _ask(self, line: str) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            return {"error": "the process ended"}
        reply = self._process.stdout.readline()
        return json.loads(reply) if reply else {"error": f"the process ended (exit code {self._process.wait()})"}

    def slice(self, seconds: float) -> None:
        self._process.send_signal(signal.SIGCONT)
        reply = self._ask(str(seconds))
        if "error" in reply:
            self.result.error = reply["error"]
            return
        self.times += reply["times"]
        self._process.send_signal(signal.SIGSTOP)

    def finish(self) -> Result:
        self._process.kill()
        self._process.wait()
        if self.times:
            ordered = sorted(self.times)
            self.result.median = statistics.median(ordered)
            self.result.low, self.result.high = (ordered[int(q * (len(ordered) - 1))] for q in (0.1, 0.9))
        return self.result


# --- the run ----------------------------------------------------------------------------------------------------------


def _cache_directory(path: str | None) -> dict[str, str]:
    if path is None:
        return {}
    # A package is unpacked in TMPDIR, and a process that is killed leaves it there.
    return {"TORCHINDUCTOR_CACHE_DIR": path, "TMPDIR": path, PACKAGE_VARIABLE: os.path.join(path, "model.pt2")}


def _started_twice(engine: str, network: str, settings: Settings) -> _Worker:
    """The second of two processes that share a cache directory of their own; its result has the seconds of both."""
    with tempfile.TemporaryDirectory() as caches:
        first = _Worker(engine, network, settings, caches)
        cold, found = first.first_call_seconds, first.finish()
        if found.error:
            return first
        second = _Worker(engine, network, settings, caches)
    second.result.cold_seconds, second.result.warm_seconds = cold, second.first_call_seconds
    second.result.peak_megabytes = found.peak_megabytes
    return second


def measure(
    network: str, engines: Sequence[str], settings: Settings, rounds: int = 8, starts: bool = False
) -> list[Result]:
    """All engines on one network, in turn; with `starts` the seconds of a cold and a warm start, too."""
    set_up = _started_twice if starts else _Worker
    workers = [set_up(engine, network, settings) for engine in engines]
    peak = _Worker(PEAK, network, settings)
    try:
        for _ in range(rounds):
            for one in (*workers, peak):
                if not one.result.error:
                    one.slice(settings.seconds / rounds)
    finally:
        results = [one.finish() for one in workers]
        at_best = peak.macs / peak.finish().median
    for one in workers:
        one.result.of_peak = one.macs / one.result.median / at_best
    return results


def speeds(table: dict[str, list[Result]], baseline: str = BASELINE) -> dict[str, dict[str, float]]:
    """By network and engine: how many times as fast as the baseline it is, where both ran."""
    found = {}
    for network, results in table.items():
        medians = {r.engine: r.median for r in results if not r.error and not math.isnan(r.median)}
        base = medians.get(baseline)
        found[network] = {} if base is None else {engine: base / median for engine, median in medians.items()}
    return found


def geometric_means(table: dict[str, list[Result]], baseline: str = BASELINE) -> dict[str, float]:
    """How many times as fast as the baseline each engine is, over the networks that both ran."""
    logs: dict[str, list[float]] = {}
    for of_network in speeds(table, baseline).values():
        for engine, speed in of_network.items():
            logs.setdefault(engine, []).append(math.log(speed))
    return {engine: math.exp(statistics.fmean(values)) for engine, values in logs.items()}


_NUMBERS = ("ms", "10%", "90%", "speed", "of peak", "SNR dB", "compile s")
_STARTS = ("cold s", "warm s", "peak MB", "MB")


def text(results: dict[str, list[Result]]) -> Group:
    """Milliseconds, how many times as fast as fp32 Inductor, SNR and seconds to start, to be printed by rich."""
    starts = any(not math.isnan(r.cold_seconds) for rows in results.values() for r in rows)
    numbers = [*_NUMBERS, *(_STARTS if starts else ())]
    failed = any(r.error for rows in results.values() for r in rows)
    table = Table(
        "network", "engine", *(Column(title, right=True) for title in numbers), *(["failed"] if failed else [])
    )
    for network, rows in results.items():
        base = next((r.median for r in rows if r.engine == BASELINE and not r.error), math.nan)
        for r in rows:
            cells = [f"{r.median:.2f}", f"{r.low:.2f}", f"{r.high:.2f}", f"{base / r.median:.2f}", f"{r.of_peak:.1%}"]
            cells += [f"{r.snr:.1f}", f"{r.compile_seconds:.1f}"]
            if starts:
                cells += [f"{r.cold_seconds:.1f}", f"{r.warm_seconds:.1f}"]
                cells += [f"{r.peak_megabytes:.0f}", f"{r.resident_megabytes:.0f}"]
            shown = [""] * len(numbers) if r.error else cells
            table.add(network, r.engine, *shown, *([r.error] if failed else []), style="red" if r.error else "")
    means = ", ".join(f"{engine} {mean:.2f}" for engine, mean in geometric_means(results).items())
    return group(table, *([f"geometric mean of speed over fp32 Inductor: {means}"] if means else []))


def run(
    networks: Iterable[str], engines: Sequence[str], settings: Settings, rounds: int = 8, starts: bool = False
) -> dict[str, list[Result]]:
    """The whole benchmark, with a progress bar on a terminal."""
    names = list(networks)
    table: dict[str, list[Result]] = {}
    with progress.task("measuring", total=len(names)) as advance:
        for network in names:
            table[network] = measure(network, engines, settings, rounds, starts)
            advance()
    return table


def _finite(row: dict[str, Any]) -> dict[str, Any]:
    """JSON has neither NaN nor infinity."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in row.items()
    }


def to_json(table: dict[str, list[Result]], settings: Settings) -> str:
    """The results with the settings, the date, the CPU's abilities and torch's version."""
    from inductor_x86q import __version__

    results = {network: [_finite(dataclasses.asdict(r)) for r in rows] for network, rows in table.items()}
    body = {"source": "x86q bench", "date": time.strftime("%Y-%m-%d"), "version": __version__, "machine": machine()}
    return json.dumps({**body, "settings": dataclasses.asdict(settings), "results": results}, indent=1)


def from_json(body: dict[str, Any]) -> dict[str, list[Result]]:
    """The results that `to_json` wrote; what was not measured is NaN again."""
    return {
        network: [Result(**{name: value for name, value in row.items() if value is not None}) for row in rows]
        for network, rows in body["results"].items()
    }


def machine() -> dict[str, Any]:
    """What figures depend on: the CPU and torch's version."""
    from inductor_x86q import cpu

    name = f"{cpu.capabilities().get('cpu_name', 'unknown CPU')}, {os.cpu_count()} cores"
    abilities = {"vnni": cpu.has_vnni(), "bf16": cpu.has_bf16(), "amx": cpu.has_amx()}
    return {"name": name, **abilities, "torch": torch.__version__}


def add_command(commands: Any) -> None:
    """`x86q bench` on the command line."""
    parser = commands.add_parser(
        "bench",
        help="engines against each other, on torchvision's networks, text and recurrence",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"engines: {', '.join(ENGINES)}\nexit codes: 0 done, 1 an engine failed",
    )
    parser.add_argument("network", nargs="+", help=f"names of torchvision models, or {', '.join(NETWORKS)}")
    parser.add_argument("--engines", default=",".join(DEFAULT_ENGINES), help="comma-separated (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--size", type=int, default=224, help="height and width of the images (default: %(default)s)")
    parser.add_argument("--length", type=int, default=128, help="tokens or steps of a sequence (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=4.0, help="to run each engine (default: %(default)s)")
    parser.add_argument("--starts", action="store_true", help="measure cold and warm starts, in caches of their own")
    parser.add_argument("--json", metavar="FILE", type=writable, help="write the results as JSON")
    parser.add_argument("--plot", metavar="FILE", type=writable, help="write a bar chart (PNG; needs matplotlib)")
    parser.set_defaults(run=_command)


def _command(parsed: Any) -> int:
    engines = parsed.engines.split(",")
    unknown = [
        f"unknown engine {name!r}: expected one of {', '.join(ENGINES)}" for name in engines if name not in ENGINES
    ]
    missing = [f"--plot: {reason}"] if parsed.plot and (reason := obstacle()) else []
    if problems := [*unknown, *missing]:
        print(f"x86q bench: {problems[0]}", file=sys.stderr)
        return 2
    settings = Settings(parsed.batch, parsed.threads, parsed.size, parsed.length, parsed.seconds)
    table = run(parsed.network, engines, settings, starts=parsed.starts)
    show(text(table))
    if parsed.json:
        parsed.json.write_text(to_json(table, settings))
    if parsed.plot:
        others = {
            network: {engine: speed for engine, speed in of_network.items() if engine != BASELINE}
            for network, of_network in speeds(table).items()
        }
        bars.plot(others, "times as fast as fp32 Inductor", parsed.plot)
    return int(any(result.error for results in table.values() for result in results))
