"""What this machine's CPU can do for int8, as torch and oneDNN see it."""

from __future__ import annotations

import functools
import os
from pathlib import Path

# oneDNN's names, smallest first; ONEDNN_MAX_CPU_ISA limits what it uses. VNNI starts at AVX2_VNNI.
_ISA_ORDER = (
    "SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI", "AVX512_CORE_BF16",
    "AVX10_1_512", "AVX512_CORE_FP16", "AVX10_1_512_AMX", "AVX512_CORE_AMX",
)  # fmt: skip


@functools.cache
def _facts() -> dict[str, str]:
    """What /proc/cpuinfo says of the first CPU; empty where it cannot be read."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return {}
    lines = (line.partition(":") for line in text.split("\n\n")[0].splitlines())
    return {name.strip(): value.strip() for name, _, value in lines}


@functools.cache
def flags() -> frozenset[str]:
    """The CPU's feature flags as Linux names them; empty where /proc/cpuinfo cannot be read."""
    return frozenset(_facts().get("flags", "").split())


def _allowed(instruction_set: str) -> bool:
    """Whether ONEDNN_MAX_CPU_ISA lets oneDNN use this instruction set."""
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper()
    if limit not in _ISA_ORDER:
        return True
    return _ISA_ORDER.index(instruction_set) <= _ISA_ORDER.index(limit)


# What each of Linux's flags is to oneDNN.
_NEEDED = {"avx2": "AVX2", "fma": "AVX2", "avx_vnni": "AVX2_VNNI", "avx512_vnni": "AVX512_CORE_VNNI"}


def usable_flags() -> frozenset[str]:
    """The CPU's feature flags for vectors, without those that ONEDNN_MAX_CPU_ISA hides: so ours run as oneDNN's do."""
    return _usable_flags(flags(), os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper())


@functools.cache
def _usable_flags(flags: frozenset[str], limit: str) -> frozenset[str]:
    """AVX512_CORE hides AVX-VNNI too: oneDNN then really runs without it."""
    hidden = {"avx_vnni"} if limit == "AVX512_CORE" else set()
    needed = {flag: _NEEDED.get(flag, "AVX512_CORE" if flag.startswith("avx512") else "SSE41") for flag in flags}
    return frozenset({flag for flag in flags if _allowed(needed[flag])} - hidden)


def has_vnni() -> bool:
    """Whether int8 dot products accumulate in 32 bits, so that 8-bit activations cannot saturate."""
    return bool({"avx512_vnni", "avx_vnni"} & usable_flags())


def int8_lanes() -> int:
    """How many 32-bit numbers the widest vectors of integers of this CPU hold; 0 without AVX2."""
    if {"avx512bw", "avx512vl"} <= usable_flags():
        return 16
    return 8 if {"avx2", "fma"} <= usable_flags() else 0


def halves_512() -> bool:
    """Whether 512-bit instructions are run as two of 256 bits, as by AMD's Zen 4 (family 25)."""
    return _facts().get("vendor_id") == "AuthenticAMD" and _facts().get("cpu family") == "25"


def identity() -> str:
    """What kernels' times depend on besides their code: the CPU's name, and what of it may be used."""
    return f"{_facts().get('model name', 'unknown CPU')}, {' '.join(sorted(usable_flags()))}"


def has_bf16() -> bool:
    """Whether oneDNN's int8 kernels can produce bf16 here."""
    return "avx512_bf16" in flags() and _allowed("AVX512_CORE_BF16")


def has_amx() -> bool:
    return "amx_int8" in flags() and _allowed("AVX512_CORE_AMX")
