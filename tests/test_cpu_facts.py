"""What is concluded from what torch says of a CPU."""

from __future__ import annotations

import pytest
import torch

from inductor_x86q import cpu

AVX2 = ("sse4_2", "popcnt", "avx", "avx2", "fma3", "f16c", "bmi", "bmi2", "lzcnt")
AVX512 = (*AVX2, "avx512_f", "avx512_cd", "avx512_bw", "avx512_dq", "avx512_vl")
CPUS = {
    "Haswell": AVX2,
    "Zen 3": (*AVX2, "sse4a"),
    "Alder Lake": (*AVX2, "avx_vnni"),
    "Skylake": AVX512,
    "Cascade Lake": (*AVX512, "avx512_vnni"),
    "Zen 4": (*AVX512, "avx512_vnni", "avx512_bf16", "avx512_vbmi", "sse4a"),
    "Zen 5": (*AVX512, "avx512_vnni", "avx512_bf16", "avx512_vbmi", "avx_vnni", "avx512_vp2intersect", "sse4a"),
    "Sapphire Rapids": (*AVX512, "avx512_vnni", "avx512_bf16", "avx512_fp16", "avx_vnni", "amx_tile", "amx_int8"),
}


@pytest.fixture
def on(monkeypatch):
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)

    def choose(name: str) -> None:
        monkeypatch.setattr(cpu, "capabilities", lambda: dict.fromkeys(CPUS[name], True))

    return choose


@pytest.mark.parametrize(
    "name, vnni, lanes, bf16, halves, level",
    [
        ("Haswell", False, 8, False, False, "avx2"),
        ("Zen 3", False, 8, False, False, "avx2"),
        ("Alder Lake", True, 8, False, False, "avx2-vnni"),
        ("Skylake", False, 16, False, False, "avx512"),
        ("Cascade Lake", True, 16, False, False, "avx512-vnni"),
        ("Zen 4", True, 16, True, True, "avx512-bf16"),
        ("Zen 5", True, 16, True, False, "avx512-bf16"),
        ("Sapphire Rapids", True, 16, True, False, "avx512-bf16"),
    ],
)
def test_facts(on, name, vnni, lanes, bf16, halves, level):
    on(name)
    found = cpu.has_vnni(), cpu.int8_lanes(), cpu.has_bf16(), cpu.halves_512()
    assert found == (vnni, lanes, bf16, halves)
    assert cpu.best_level() == level


@pytest.mark.parametrize("level", cpu.LEVELS)
def test_the_limit_of_a_level_leaves_what_the_level_has(on, level, monkeypatch):
    """So a process that builds for it takes this CPU for one of that level."""
    on("Zen 5")
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", cpu.LEVELS[level].onednn)
    limited = cpu.has_vnni(), cpu.int8_lanes(), cpu.has_bf16()
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA")
    monkeypatch.setattr(cpu, "capabilities", lambda: dict.fromkeys(cpu.LEVELS[level].instruction_sets, True))
    assert limited == (cpu.has_vnni(), cpu.int8_lanes(), cpu.has_bf16())


def test_what_only_one_maker_has_binds_no_package(on):
    on("Zen 4")
    assert "sse4a" not in cpu.instruction_sets() and "avx512_vbmi" in cpu.instruction_sets()


def test_torch_says_what_is_asked_of_it():
    """A name that torch does not know would never be found."""
    known = torch.cpu.get_capabilities()
    asked = {name for level in cpu.LEVELS.values() for name in level.instruction_sets}
    assert asked | {"sse4a", "amx_int8", "cpu_name"} <= known.keys()
