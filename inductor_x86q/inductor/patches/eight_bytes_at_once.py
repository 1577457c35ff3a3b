"""Code for AVX2 loads the eight bytes that make a vector of floats with one instruction."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from inductor_x86q.inductor.patches.patch import Patch
from inductor_x86q.inductor.patches.scopes import COMPILE
from inductor_x86q.inductor.requirements import Needs

_CALL = re.compile(r"at::vec::Vectorized<(u?int8_t)>::loadu\((.+), static_cast<int64_t>\(8\)\)")


def _load_line(stock: Callable[..., str], kernel: Any, *arguments: Any, **keywords: Any) -> str:
    from torch._inductor.cpu_vec_isa import VecAVX2

    line = stock(kernel, *arguments, **keywords)
    found = _CALL.fullmatch(line)
    if not found or not isinstance(kernel.vec_isa, VecAVX2):
        return line
    eight = f"_mm256_castsi128_si256(_mm_loadl_epi64((const __m128i*)({found[2]})))"
    return f"at::vec::Vectorized<{found[1]}>(_mm256_blend_epi32(_mm256_set1_epi8(1), {eight}, 3))"


PATCHES = (
    Patch(
        scope=COMPILE,
        module="torch._inductor.codegen.cpp",
        attribute="CppVecKernel._get_vec_load_line",
        replacement=_load_line,
        why="torch's own function writes 32 ones to memory, the bytes over them, and loads all of it, for which a CPU has to wait "
        "until the writes are done: most of the time of a kernel that stands between int8 layers. The ones stay, where "
        "integers divide.",
        since="2.13",
        until="`at::vec::Vectorized<uint8_t>::loadu` of a part is one load; pytorch/pytorch#185099 made it so for types of 32 "
        "bits and leaves this one out. None filed for it.",
        instead="There is none: the function is in torch's headers.",
        relies_on="This method giving a load as that function's call with the number of elements, and `vec_isa` being the kernel's "
        "instruction set.",
        needs=(
            Needs("torch._inductor.cpu_vec_isa", "VecAVX2"),
            Needs("torch._inductor.codegen.cpp", "CppVecKernel.__init__", looks_up=("vec_isa",)),
            Needs("torch._inductor.codegen.cpp", "CppVecKernel.load", looks_up=("_get_vec_load_line",)),
        ),
    ),
)
