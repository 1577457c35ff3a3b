"""The instruction sets for which there are kernels: how wide their vectors are, what compilers and CPUs call them."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection


@dataclasses.dataclass(frozen=True)
class Isa:
    """An instruction set.

    Args:
        lanes: 32-bit numbers of a vector.
        registers: that hold vectors.
        has_masks: whether loads and stores take masks, byte by byte.
        dot: the instruction that adds four products a lane to sums of 32 bits, and the compilers' macro that says it is there;
            without one products are added two by two.
        compiler_flags: that make the compiler use it.
        cpu_flags: what a CPU needs, as torch names them.
    """

    lanes: int
    registers: int
    has_masks: bool
    dot: tuple[str, str] | None
    compiler_flags: tuple[str, ...]
    cpu_flags: frozenset[str]

    @property
    def has_vnni(self) -> bool:
        return self.dot is not None


_AVX2, _AVX512 = ("-mavx2", "-mfma"), ("-mavx2", "-mfma", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq")
_HAS_AVX2, _HAS_AVX512 = {"avx2", "fma3"}, {"avx2", "fma3", "avx512_f", "avx512_bw", "avx512_vl", "avx512_dq"}

# The best first. Those of 256 bits with AVX-512 are for few channels, and for CPUs that run 512 bits as two halves.
ISAS: dict[str, Isa] = {
    "avx512_vnni": Isa(
        *(16, 32, True, ("_mm512_dpbusd_epi32", "__AVX512VNNI__")),
        *((*_AVX512, "-mavx512vnni"), frozenset(_HAS_AVX512 | {"avx512_vnni"})),
    ),
    "avx512_vnni_256": Isa(
        *(8, 32, True, ("_mm256_dpbusd_epi32", "__AVX512VNNI__")),
        *((*_AVX512, "-mavx512vnni"), frozenset(_HAS_AVX512 | {"avx512_vnni"})),
    ),
    "avx_vnni": Isa(
        *(8, 16, False, ("_mm256_dpbusd_avx_epi32", "__AVXVNNI__")),
        *((*_AVX2, "-mavxvnni"), frozenset(_HAS_AVX2 | {"avx_vnni"})),
    ),
    "avx512": Isa(16, 32, True, None, _AVX512, frozenset(_HAS_AVX512)),
    "avx512_256": Isa(8, 32, True, None, _AVX512, frozenset(_HAS_AVX512)),
    "avx2": Isa(8, 16, False, None, _AVX2, frozenset(_HAS_AVX2)),
}


def best(cpu_flags: Collection[str], lanes: int) -> str:
    """The best instruction set with such vectors on a CPU with these flags."""
    found = [name for name, isa in ISAS.items() if isa.lanes == lanes and isa.cpu_flags <= set(cpu_flags)]
    assert found, f"no kernels of {lanes} lanes for a CPU with {', '.join(sorted(cpu_flags))}"
    return found[0]
