"""Which CPU Inductor generates code for."""

from __future__ import annotations

from collections.abc import Callable

import torch

from inductor_x86q.cpu import Level

# What Inductor asks of the CPU before it writes code for more than ATEN_CPU_CAPABILITY says.
_QUESTIONS = {
    "_is_vnni_supported": "avx512_vnni",
    "_is_avx512_bf16_supported": "avx512_bf16",
    "_is_amx_tile_supported": "amx_tile",
    "_is_amx_fp16_supported": "amx_fp16",
}


def limit_to(level: Level) -> None:
    """From now on Inductor finds no more in this process than the level has, given ATEN_CPU_CAPABILITY as the level says.

    Relies on `cpu_vec_isa` asking torch.cpu's functions once in a process, hence this has to come before any compile.
    """

    def answer(supported: bool) -> Callable[[], bool]:
        return lambda: supported

    for name, instruction_set in _QUESTIONS.items():
        setattr(torch.cpu, name, answer(instruction_set in level.instruction_sets))
