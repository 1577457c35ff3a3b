"""What this machine's CPU can do for int8, as torch and oneDNN see it, and what code for a lesser CPU may use."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Iterable, Mapping
from typing import Any

# oneDNN's names, smallest first; ONEDNN_MAX_CPU_ISA limits what it uses. VNNI starts at AVX2_VNNI.
_ISA_ORDER = (
    "SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI", "AVX512_CORE_BF16",
    "AVX10_1_512", "AVX512_CORE_FP16", "AVX10_1_512_AMX", "AVX512_CORE_AMX",
)  # fmt: skip

# torch's names of what a compiler may use by itself, or an intrinsic of Inductor's or ours. What only an intrinsic that
# nobody here writes would use is left out: else a package of one maker's CPU would refuse the other's.
_AVX2 = ("sse4_2", "popcnt", "avx", "avx2", "fma3", "f16c", "bmi", "bmi2", "lzcnt")
_AVX512 = (*_AVX2, "avx512_f", "avx512_cd", "avx512_bw", "avx512_dq", "avx512_vl")
_VNNI = (*_AVX512, "avx512_vnni")
_USED_BY_COMPILERS = (
    *_VNNI, "avx512_bf16", "avx512_fp16", "avx512_ifma", "avx512_vbmi", "avx512_vbmi2", "avx512_bitalg",
    "avx512_vpopcntdq", "avx_vnni", "avx_vnni_int8", "avx_vnni_int16", "avx_ne_convert", "amx_tile", "amx_int8",
    "amx_bf16", "amx_fp16", "avx10_1", "avx10_2",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Level:
    """A CPU to build for: what it has, and the name that the C++ compiler, oneDNN and ATen each have for that."""

    instruction_sets: tuple[str, ...]
    march: str
    onednn: str
    aten: str


# Smallest first.
LEVELS = {
    "avx2": Level(_AVX2, "haswell", "AVX2", "avx2"),
    "avx2-vnni": Level((*_AVX2, "avx_vnni"), "alderlake", "AVX2_VNNI", "avx2"),
    "avx512": Level(_AVX512, "skylake-avx512", "AVX512_CORE", "avx512"),
    "avx512-vnni": Level(_VNNI, "cascadelake", "AVX512_CORE_VNNI", "avx512"),
    "avx512-bf16": Level((*_VNNI, "avx512_bf16"), "cooperlake", "AVX512_CORE_BF16", "avx512"),
}


@functools.cache
def capabilities() -> Mapping[str, Any]:
    """What torch knows of the CPU: a bool for each instruction set, `cpu_name`, `architecture` and the like."""
    import torch

    return torch.cpu.get_capabilities()


def has(*instruction_sets: str) -> bool:
    """Whether the CPU has all of these, by torch's names; what oneDNN is allowed plays no part."""
    return not missing(instruction_sets)


def missing(instruction_sets: Iterable[str]) -> list[str]:
    """Those that the CPU does not have."""
    known = capabilities()
    return [name for name in instruction_sets if not known.get(name, False)]


def instruction_sets() -> tuple[str, ...]:
    """What code that is compiled for exactly this CPU may use."""
    return tuple(name for name in _USED_BY_COMPILERS if has(name))


def best_level() -> str | None:
    """The highest level that this CPU reaches; None for one without AVX2."""
    return next((name for name in reversed(LEVELS) if has(*LEVELS[name].instruction_sets)), None)


def _allowed(instruction_set: str) -> bool:
    """Whether ONEDNN_MAX_CPU_ISA lets oneDNN use this instruction set."""
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper()
    if limit not in _ISA_ORDER:
        return True
    return _ISA_ORDER.index(instruction_set) <= _ISA_ORDER.index(limit)


# What oneDNN calls a CPU that has these.
_NEEDED = {"avx2": "AVX2", "fma3": "AVX2", "avx_vnni": "AVX2_VNNI", "avx512_vnni": "AVX512_CORE_VNNI"}


def usable_flags() -> frozenset[str]:
    """The CPU's instruction sets without those that ONEDNN_MAX_CPU_ISA hides: so ours run as oneDNN's do.

    AVX512_CORE hides AVX-VNNI too: oneDNN then really runs without it.
    """
    hidden = {"avx_vnni"} if os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper() == "AVX512_CORE" else set()
    return frozenset({name for name in instruction_sets() if _allowed(_needed(name))} - hidden)


def _needed(name: str) -> str:
    return _NEEDED.get(name, "AVX512_CORE" if name.startswith("avx512") else "SSE41")


def has_vnni() -> bool:
    """Whether int8 dot products accumulate in 32 bits, so that 8-bit activations cannot saturate."""
    return bool({"avx512_vnni", "avx_vnni"} & usable_flags())


def int8_lanes() -> int:
    """How many 32-bit numbers the widest vectors of integers of this CPU hold; 0 without AVX2."""
    if {"avx512_bw", "avx512_vl"} <= usable_flags():
        return 16
    return 8 if {"avx2", "fma3"} <= usable_flags() else 0


def halves_512() -> bool:
    """Whether 512-bit instructions are run as two of 256 bits, as by AMD's Zen 4.

    torch tells neither maker nor family. SSE4a is AMD's alone, Zen 4 the first of theirs with AVX-512 and Zen 5 the first
    with AVX-VNNI beside it.
    """
    return has("sse4a", "avx512_vnni") and not has("avx_vnni")


def identity() -> str:
    """What kernels' times depend on besides their code: the CPU's name, and what of it may be used."""
    return f"{capabilities().get('cpu_name', 'unknown CPU')}, {' '.join(sorted(usable_flags()))}"


def has_bf16() -> bool:
    """Whether oneDNN's int8 kernels can produce bf16 here."""
    return has("avx512_bf16") and _allowed("AVX512_CORE_BF16")


def has_amx() -> bool:
    return has("amx_int8") and _allowed("AVX512_CORE_AMX")
