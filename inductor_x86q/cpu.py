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


def has_vnni() -> bool:
    """Whether int8 dot products accumulate in 32 bits, so that 8-bit activations cannot saturate.

    ONEDNN_MAX_CPU_ISA=AVX512_CORE (or AVX2) hides VNNI: oneDNN then really runs without it.
    """
    if "avx512_vnni" in flags() and _allowed("AVX512_CORE_VNNI"):
        return True
    return (
        "avx_vnni" in flags()
        and _allowed("AVX2_VNNI")
        and os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper() != ("AVX512_CORE")
    )


def int8_lanes() -> int:
    """How many 32-bit sums the widest integer dot product of this CPU makes at once; 0 without AVX2."""
    if {"avx512_vnni", "avx512bw", "avx512vl"} <= flags() and _allowed("AVX512_CORE_VNNI"):
        return 16
    return 8 if "avx2" in flags() and _allowed("AVX2") else 0


def halves_512() -> bool:
    """Whether 512-bit instructions are run as two of 256 bits, as by AMD's Zen 4 (family 25)."""
    return _facts().get("vendor_id") == "AuthenticAMD" and _facts().get("cpu family") == "25"


def identity() -> str:
    """What kernels' times depend on besides their code: the CPU's name, and what of it may be used."""
    vectors = f"{int8_lanes()} lanes, {vector_registers()} registers{', VNNI' if has_vnni() else ''}"
    return f"{_facts().get('model name', 'unknown CPU')}, {vectors}"


def vector_registers() -> int:
    """How many registers hold the vectors of `int8_lanes`."""
    return 32 if "avx512vl" in flags() and _allowed("AVX512_CORE") else 16


def has_bf16() -> bool:
    """Whether oneDNN's int8 kernels can produce bf16 here."""
    return "avx512_bf16" in flags() and _allowed("AVX512_CORE_BF16")


def has_amx() -> bool:
    return "amx_int8" in flags() and _allowed("AVX512_CORE_AMX")
