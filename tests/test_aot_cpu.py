"""Packages and CPUs: what a package asks for, who refuses it, and building for a lesser CPU."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

import inductor_x86q
from inductor_x86q import aot, cpu
from inductor_x86q.aot import stored
from inductor_x86q.errors import CompileError, StrictError
from inductor_x86q.graph.reasons import Reason
from inductor_x86q.inductor import compiling, target


def quantized(reduce_range: bool) -> tuple[torch.fx.GraphModule, torch.Tensor]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32 * 36, 16)).eval()
    x = torch.randn(2, 3, 8, 8)
    return inductor_x86q.quantize(net, (x,), calibration=[x], reduce_range=reduce_range), x


@pytest.fixture(scope="module")
def model():
    return quantized(reduce_range=True)


@pytest.fixture(scope="module")
def native(model, tmp_path_factory):
    q, x = model
    return inductor_x86q.package(q, (x,), tmp_path_factory.mktemp("native") / "model.pt2")


@pytest.fixture
def with_metadata(rewritten):
    """A function that writes a copy of a package that says something else of itself."""

    def copy(source: str, target: Path, **changes: str | None) -> str:
        def change(contents: bytes) -> bytes:
            values = {**json.loads(contents), **changes}
            return json.dumps({name: value for name, value in values.items() if value is not None}).encode()

        return rewritten(source, target, {"_metadata.json": change})

    return copy


@pytest.fixture
def nothing_is_loaded(monkeypatch):
    monkeypatch.setattr(compiling, "load_package", lambda path: pytest.fail("its code was loaded"))


# --- loading ----------------------------------------------------------------------------------------------------------


def test_a_package_names_what_it_may_use(model, native):
    q, x = model
    metadata = compiling.read_metadata(native)
    assert metadata[stored.INSTRUCTION_SETS].split(",") == list(cpu.instruction_sets())
    assert metadata[stored.THREADS] == str(torch.get_num_threads())
    torch.testing.assert_close(inductor_x86q.load(native)(x), q(x), rtol=0, atol=1e-4)


def test_a_cpu_without_it_is_refused_by_name(native, monkeypatch, nothing_is_loaded):
    lesser = cpu.LEVELS["avx2"].instruction_sets
    monkeypatch.setattr(cpu, "capabilities", lambda: dict.fromkeys(lesser, True))
    lacking = [
        name for name in compiling.read_metadata(native)[stored.INSTRUCTION_SETS].split(",") if name not in lesser
    ]
    if not lacking:
        pytest.skip("this CPU has no more than AVX2")
    message = f'was built for a CPU with {", ".join(lacking)}, which this one does not have: .*cpu="avx2"'
    with pytest.raises(CompileError, match=message):
        inductor_x86q.load(native)


def test_a_package_of_a_better_cpu_is_refused(native, tmp_path, with_metadata, nothing_is_loaded):
    path = with_metadata(native, tmp_path / "m.pt2", **{stored.INSTRUCTION_SETS: "avx2,avx99_quantum"})
    with pytest.raises(CompileError, match="built for a CPU with avx99_quantum, which"):
        inductor_x86q.load(path)


def test_a_package_that_says_nothing_is_refused(native, tmp_path, with_metadata, nothing_is_loaded):
    path = with_metadata(native, tmp_path / "m.pt2", **{stored.INSTRUCTION_SETS: None})
    with pytest.raises(CompileError, match="does not say which CPU it was built for"):
        inductor_x86q.load(path)
    torch.export.save(torch.export.export(nn.ReLU(), (torch.ones(2),)), tmp_path / "relu.pt2")
    with pytest.raises(CompileError, match=r"not made by inductor_x86q\.package"):
        inductor_x86q.load(tmp_path / "relu.pt2")
    with pytest.raises(CompileError, match="there is no file"):
        inductor_x86q.load(tmp_path / "none.pt2")


def test_a_package_of_more_threads_is_loaded_with_a_warning(model, native, tmp_path, with_metadata, caplog):
    path = with_metadata(native, tmp_path / "m.pt2", **{stored.THREADS: "64"})
    inductor_x86q.load(path)(model[1])
    assert "was built for 64 threads" in caplog.text


@pytest.mark.slow
def test_the_runner_refuses_it_too(runner, native, tmp_path, with_metadata):
    path = with_metadata(native, tmp_path / "m.pt2", **{stored.INSTRUCTION_SETS: "avx2,avx99_quantum"})
    (tmp_path / "input.bin").write_bytes(bytes(2 * 3 * 8 * 8 * 4))
    done = subprocess.run([runner, path, tmp_path / "input.bin", "2,3,8,8"], capture_output=True, text=True)
    assert done.returncode == 1
    assert "was built for a CPU with avx99_quantum, which this one does not have" in done.stderr
    assert subprocess.run([runner, native, tmp_path / "input.bin", "2,3,8,8"]).returncode == 0


# --- building for a lesser CPU ----------------------------------------------------------------------------------------


def disassembly(path: str, directory: Path) -> str:
    with zipfile.ZipFile(path) as archive:
        (library,) = [name for name in archive.namelist() if name.endswith(".so")]
        archive.extract(library, directory)
    command = ["objdump", "-d", "--no-show-raw-insn", directory / library]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@pytest.mark.skipif(not cpu.has(*cpu.LEVELS["avx2"].instruction_sets), reason="builds for lesser CPUs only")
@pytest.mark.skipif(not shutil.which("objdump"), reason="needs objdump")
@pytest.mark.parametrize("options", [{}, {"max_autotune": True}], ids=["default", "max-autotune"])
def test_code_for_avx2_has_nothing_else(model, tmp_path, options):
    q, x = model
    path = inductor_x86q.package(q, (x,), tmp_path / "m.pt2", cpu="avx2", options=options)
    assert compiling.read_metadata(path)[stored.INSTRUCTION_SETS].split(",") == list(
        cpu.LEVELS["avx2"].instruction_sets
    )
    code = disassembly(path, tmp_path)
    assert "%ymm" in code
    assert not re.search(r"%zmm|vpdpbusd|%[xy]mm(1[6-9]|2\d|3[01])\b|%k[0-7]\b", code)
    assert [f.layer for f in aot.read_report(path).fused] == ["0", "3"]
    torch.testing.assert_close(inductor_x86q.load(path)(x), q(x), rtol=0, atol=1e-4)


@pytest.mark.parametrize("level", cpu.LEVELS)
def test_inductor_finds_no_more_than_the_level_has(level, monkeypatch):
    names = {
        "_is_vnni_supported": "avx512_vnni",
        "_is_avx512_bf16_supported": "avx512_bf16",
        "_is_amx_tile_supported": "amx_tile",
    }
    for name in target._QUESTIONS:  # put back afterwards
        monkeypatch.setattr(torch.cpu, name, getattr(torch.cpu, name))
    target.limit_to(cpu.LEVELS[level])
    found = {name: getattr(torch.cpu, name)() for name in names}
    assert found == {name: instruction in cpu.LEVELS[level].instruction_sets for name, instruction in names.items()}


@pytest.mark.skipif(not cpu.has(*cpu.LEVELS["avx2"].instruction_sets), reason="builds for lesser CPUs only")
def test_layers_that_would_saturate_there_stop_the_package(tmp_path):
    """What is fused is decided for the CPU that is built for, and raised as if it were this one."""
    q, x = quantized(reduce_range=False)
    with pytest.raises(StrictError, match="2 layers that should run in int8 do not") as raised:
        inductor_x86q.package(q, (x,), tmp_path / "m.pt2", cpu="avx2")
    assert {miss.reason for miss in raised.value.report.missed} == {Reason.SATURATES}
    assert not (tmp_path / "m.pt2").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"cpu": "pentium"}, "cpu is 'pentium': expected one of avx2, avx2-vnni, avx512"),
        ({"options": {"cpp.march": "native"}}, "option `cpp.march` is not for packages"),
    ],
)
def test_arguments_are_checked(model, tmp_path, arguments, message):
    q, x = model
    with pytest.raises(CompileError, match=message):
        inductor_x86q.package(q, (x,), tmp_path / "m.pt2", **arguments)


def test_a_better_cpu_cannot_be_built_for(model, tmp_path, monkeypatch):
    q, x = model
    monkeypatch.setattr(cpu, "capabilities", dict)
    with pytest.raises(CompileError, match=r"this CPU has no sse4_2, .*, and builds for lesser ones only"):
        inductor_x86q.package(q, (x,), tmp_path / "m.pt2", cpu="avx2")
