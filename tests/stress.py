"""Compiles and calls from many threads at once, drawn by seed: each has to give what it gives alone.

`python -m tests.stress --seed 1 --rounds 200` draws, for each round, what some threads do at the same moment: compile ours
through Dynamo, by the backend itself or ahead of time, compile plain Inductor with freezing and without, explain, run into an
error of strict mode, call what is compiled. Numbers and generated code are compared with those of the same action alone.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import functools
import random
import re
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

import inductor_x86q
from inductor_x86q import aot, backend, inspection, testing
from inductor_x86q.aot import local
from inductor_x86q.inductor import dynamo, wrapper_source
from inductor_x86q.testing import QConv2d, QLinear, quantize_dequantize

SECONDS = 300  # after which a thread is said to hang
X = torch.linspace(-1, 1, 2 * 8 * 36).reshape(2, 8, 6, 6)


class Quantized(nn.Module):
    """int8 layers, a sum that is made in place, an activation that ours keep whole; a miss where `missed`."""

    def __init__(self, channels: int, missed: bool = False) -> None:
        super().__init__()
        self.first, self.second = QConv2d(8, channels, 1), QConv2d(channels, channels, 3, padding=1)
        self.linear = QLinear(channels, 16)
        self.missed = nn.Linear(16, 16) if missed else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = nn.functional.hardswish(self.first(quantize_dequantize(x, 0.02, 60)))
        x = torch.relu(self.second(quantize_dequantize(x, 0.02, 10)) + quantize_dequantize(x, 0.02, 10))
        x = self.linear(quantize_dequantize(x.mean((2, 3)), 0.02, 60))
        return x if self.missed is None else self.missed(quantize_dequantize(x, 0.02, 60))


class Float(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear = nn.Conv2d(8, 16, 3), nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(nn.functional.hardswish(self.conv(x)).mean((2, 3)))


@dataclasses.dataclass(frozen=True)
class Action:
    """What a thread does, and how often it is drawn; what it returns is the same each time."""

    name: str
    run: Callable[[], Any]
    weight: int = 4


def _generated(compile: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, list[str]]:
    """What was compiled and called gives, and its source, without what differs from one compile to the next."""
    with torch.no_grad(), wrapper_source.generated_code() as parts:
        result = compile()
    return result, [
        re.sub(r"(/[^\s'\"]*|0x[0-9a-f]+| [0-9a-f]{12}$|# .*)", "", part.code, flags=re.MULTILINE) for part in parts
    ]


def _through_dynamo(model: fx.GraphModule, options: dict[str, Any]) -> torch.Tensor:
    compiler = functools.partial(backend.inductor_x86q, options=options)
    return _compiled(model, compiler)


def _by_the_backend(model: fx.GraphModule, options: dict[str, Any]) -> torch.Tensor:
    """Dynamo lets no two threads compile at once; this does not go through it, as ahead of time."""
    with torch.no_grad():
        result: torch.Tensor = backend.inductor_x86q(copy.deepcopy(model), [X], options=options)(X)
    return result


def _strict(model: fx.GraphModule) -> str:
    try:
        _by_the_backend(model, {"strict": True})
    except inductor_x86q.StrictError as error:
        return str(error)
    return "no error"


def _plain(model: nn.Module, freezing: bool) -> torch.Tensor:
    with torch._inductor.config.patch(freezing=freezing):
        return _compiled(model, "inductor")


def _compiled(model: nn.Module, compiler: Any) -> torch.Tensor:
    """While any thread exports, torch.compile gives back what it was given; the call is not held to that."""
    with dynamo.one_at_a_time():
        compiled = dynamo.compile_fresh(model, compiler)
    with torch.no_grad():
        result: torch.Tensor = compiled(X)
    return result


def _ahead_of_time(exported: torch.export.ExportedProgram) -> torch.Tensor:
    with tempfile.TemporaryDirectory() as directory, torch.no_grad():
        path = str(Path(directory) / "model.pt2")
        local.build(exported, path, {})
        result: torch.Tensor = aot.load(path)(X)
    return result


def _calls(run: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    first = run(X).clone()
    for _ in range(50):
        assert torch.equal(run(X), first), "one call gives other numbers than the call before"
    return first


def actions() -> list[Action]:
    """All that is drawn from. Everything is exported here: torch.export does not suffer a compile beside it."""
    torch.manual_seed(0)
    first, second = (testing.qdq_graph(Quantized(channels), (X,)) for channels in (16, 24))
    with torch.no_grad():
        exported = torch.export.export(first, (X,))
    missed, plain = testing.qdq_graph(Quantized(16, missed=True), (X,)), Float().eval()
    compiled = testing.compile_once(first, (X,))
    onednn = {"kernels": "onednn"}
    return [
        Action("ours", lambda: _generated(lambda: _through_dynamo(first, {}))),
        Action("ours, from the cache", lambda: _through_dynamo(second, {})),
        Action("ours by the backend", lambda: _generated(lambda: _by_the_backend(second, {}))),
        Action("ours with oneDNN's calls", lambda: _generated(lambda: _by_the_backend(first, onednn))),
        Action("ours, strict", lambda: _strict(missed)),
        Action("explain", lambda: [str(fusion) for fusion in inspection.explain(second, (X,)).fused]),
        Action("plain with freezing", lambda: _generated(lambda: _plain(first, True))),
        Action("plain float with freezing", lambda: _generated(lambda: _plain(plain, True))),
        Action("plain float", lambda: _generated(lambda: _plain(plain, False))),
        Action("call", lambda: _calls(compiled.run)),
        Action("ahead of time", lambda: _ahead_of_time(exported), weight=1),
    ]


def difference(name: str, alone: Any, together: Any) -> str | None:
    """What differs between two results of an action; None where nothing does."""
    if isinstance(alone, tuple):  # numbers and source
        return difference(name, alone[0], together[0]) or _other_code(name, alone[1], together[1])
    if isinstance(alone, torch.Tensor):
        if torch.equal(alone, together):
            return None
        return f"{name}: numbers differ by up to {(alone - together).abs().max():.3g}"
    return None if alone == together else f"{name}: {together}, alone {alone}"


def _other_code(name: str, alone: list[str], together: list[str]) -> str | None:
    if alone == together:
        return None
    return "\n  ".join((f"{name}: {len(together)} sources, {len(alone)} alone", *_lines(alone, together)))


def _lines(alone: list[str], together: list[str]) -> list[str]:
    known = {line for code in alone for line in code.splitlines()}
    return [line for code in together for line in code.splitlines() if line not in known][:20]


class Stress:
    """Rounds of actions side by side, and what was wrong in them."""

    def __init__(self) -> None:
        self.actions = actions()
        self.alone = {action.name: action.run() for action in self.actions}
        self.counts: Counter[str] = Counter()

    def round(self, seed: int, threads: int) -> list[str]:
        """What is wrong in one round."""
        draw = random.Random(seed)
        chosen = draw.choices(self.actions, [action.weight for action in self.actions], k=threads)
        delays = [draw.choice((0.0, 0.0, 0.05, 0.2)) for _ in chosen]
        self.counts.update(action.name for action in chosen)
        start, results = threading.Barrier(threads), [None] * threads

        def work(number: int, action: Action) -> None:
            start.wait(SECONDS)
            time.sleep(delays[number])
            try:
                results[number] = action.run()
            except BaseException as error:
                results[number] = error  # type: ignore[call-overload]

        running = [
            threading.Thread(target=work, args=(number, action), daemon=True) for number, action in enumerate(chosen)
        ]
        for thread in running:
            thread.start()
        for thread in running:
            thread.join(SECONDS)
        named = f"seed {seed}, {', '.join(action.name for action in chosen)}"
        if any(thread.is_alive() for thread in running):
            return [f"{named}: {sum(thread.is_alive() for thread in running)} threads hang"]
        found = [self._wrong(action.name, result) for action, result in zip(chosen, results, strict=True)]
        return [f"{named}: {problem}" for problem in found if problem]

    def _wrong(self, name: str, result: Any) -> str | None:
        if isinstance(result, BaseException):
            return f"{name}: {type(result).__name__}: {result}"
        return difference(name, self.alone[name], result)


@contextlib.contextmanager
def nothing_left() -> Iterator[None]:
    """Fails where a patch is in place after this context."""
    from inductor_x86q.inductor.patches import PATCHES

    yield
    left = [patch.attribute for patch in PATCHES if patch._in_place is not None]
    assert not left, f"still in place: {', '.join(left)}"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.stress", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seed", type=int, default=0, help="of the first round; each next takes the next")
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--threads", type=int, default=4)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after so many")
    arguments = parser.parse_args()
    stress, began, found, rounds = Stress(), time.monotonic(), [], 0
    with nothing_left():
        for seed in range(arguments.seed, arguments.seed + arguments.rounds):
            if time.monotonic() - began > 60 * arguments.minutes:
                break
            problems = stress.round(seed, arguments.threads)
            rounds += 1
            found += problems
            for problem in problems:
                print(problem, flush=True)
    print(f"{rounds} rounds of {arguments.threads} threads, {len(found)} wrong; {dict(stress.counts)}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
