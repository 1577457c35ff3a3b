"""Shared by all tests: caches of their own, networks and graphs that several files compile."""

from __future__ import annotations

import copy
import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

# OpenMP reads it when torch is loaded. Threads that wait for each other in a loop keep the cores from what runs beside
# them: tiny convolutions in two processes with two threads each took 0.4 s on two cores, and 120 s without this.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
import torch._inductor.config

pytest_plugins = ["inductor_x86q.pytest_plugin"]

HAS_TORCHVISION = importlib.util.find_spec("torchvision") is not None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that need torchvision are skipped where it is not installed, as in the environment of the oldest torch."""
    if HAS_TORCHVISION:
        return
    for item in items:
        if item.get_closest_marker("torchvision"):
            item.add_marker(pytest.mark.skip(reason="torchvision is not installed"))


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    """The same random numbers in every run, and neither Dynamo's state nor Inductor's flags left from the test before."""
    torch.manual_seed(0)
    before = torch._inductor.config.save_config()
    yield
    torch._dynamo.reset()
    if torch._inductor.config.save_config() != before:  # torchao's quantize_ sets some; setting all takes 50 ms
        torch._inductor.config.load_config(before)


@pytest.fixture(scope="session", autouse=True)
def guards_are_not_timed() -> Iterator[None]:
    """Dynamo flushes the CPU's caches and times its guards at each compile, for a line in a log: 50 ms each."""
    from torch._dynamo import guards

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(guards, "profile_guard_manager", lambda *arguments: 0.0)
        yield


@pytest.fixture
def run_python(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs a program in a fresh interpreter; fails with its output when it fails and `check` holds."""

    def run(program: str, *, check: bool = True, **environment: str) -> subprocess.CompletedProcess[str]:
        script = tmp_path / "program.py"
        script.write_text(program)
        done = subprocess.run(
            [sys.executable, str(script)],
            env=os.environ | environment,
            cwd=tmp_path,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=300,
        )
        if check and done.returncode:
            pytest.fail(f"exit status {done.returncode}:\n{done.stdout}\n{done.stderr}")
        return done

    return run


@pytest.fixture(scope="session")
def network() -> dict[str, Any]:
    """The cookbook's network, an input, a list of inputs, and the network quantized."""
    import inductor_x86q

    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parent.parent / "examples"))
        import shapes
    model, x = shapes.network().eval(), torch.randn(4, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    q = inductor_x86q.quantize(model, (x,), calibration=[x])
    return {"model": model, "x": x, "batches": [x, x[:2]], "q": q}


@pytest.fixture
def names(network: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What code in pages and docstrings may use."""
    import inductor_x86q
    from inductor_x86q import testing

    monkeypatch.chdir(tmp_path)
    model = copy.deepcopy(network["model"])  # some train it
    return {"torch": torch, "inductor_x86q": inductor_x86q, "testing": testing, **network, "model": model}


@pytest.fixture
def only_generated(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first kernel of ours is taken without timing it, so that it is compiled once, with the code that calls it."""
    import torch._inductor.lowering  # noqa: F401

    from inductor_x86q.inductor.lowering import choice

    monkeypatch.setattr(choice, "decide", lambda target, arguments, given, templates: templates[0])


@pytest.fixture
def one_blocking(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Leaves the n-th kernel of every layer to choose from."""
    from inductor_x86q.kernels import cost

    stock = cost.choose

    def choose(number: int) -> None:
        def one(*layer: Any) -> list[cost.Choice]:
            kernels = [choice for choice in stock(*layer) if choice != cost.ONEDNN]
            return kernels[: number + 1][-1:]

        monkeypatch.setattr(cost, "choose", one)

    return choose


@pytest.fixture(scope="session")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The C++ example, built."""
    if not shutil.which("cmake"):
        pytest.skip("needs cmake")
    build = tmp_path_factory.mktemp("build")
    prefix = f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}"
    subprocess.run(
        ["cmake", "-S", Path(__file__).parent.parent / "examples" / "cpp_runner", "-B", build, prefix], check=True
    )
    subprocess.run(["cmake", "--build", build], check=True)
    return build / "runner"


@pytest.fixture
def rewritten() -> Callable[..., str]:
    """A function that writes a .pt2 with other contents."""

    def rewritten(
        source: str | Path,
        target: Path,
        changes: Mapping[str, Callable[[bytes], bytes]],
        more: Mapping[str, bytes] | None = None,
    ) -> str:
        """A copy in which the files that end in a key of `changes` are changed, and those in `more` are added."""
        changed = set()
        with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
            for name in old.namelist():
                contents = old.read(name)
                for ending, change in changes.items():
                    if name.endswith(ending):
                        contents = change(contents)
                        changed.add(ending)
                new.writestr(name, contents)
            root = old.namelist()[0].split("/")[0]
            for name, contents in (more or {}).items():
                new.writestr(f"{root}/{name}", contents)
        assert changed == set(changes)
        return str(target)

    return rewritten
