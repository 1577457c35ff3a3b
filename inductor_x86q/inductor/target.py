"""Which CPU Inductor generates code for."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from inductor_x86q.cpu import Level
from inductor_x86q.inductor.scoping import replaced

# What Inductor asks of the CPU before it writes code for more than ATEN_CPU_CAPABILITY says.
_QUESTIONS = {
    "_is_vnni_supported": "avx512_vnni",
    "_is_avx512_bf16_supported": "avx512_bf16",
    "_is_amx_tile_supported": "amx_tile",
    "_is_amx_fp16_supported": "amx_fp16",
}


@contextlib.contextmanager
def limited_to(level: Level) -> Iterator[None]:
    """Within this context Inductor finds no more than the level has, given ATEN_CPU_CAPABILITY as the level says.

    Relies on `cpu_vec_isa` asking torch.cpu's functions once in a process, hence this has to come before any compile.
    """
    with contextlib.ExitStack() as stack:
        for name, instruction_set in _QUESTIONS.items():
            supported = instruction_set in level.instruction_sets
            stack.enter_context(replaced(torch.cpu, name, lambda supported=supported: supported))
        yield
