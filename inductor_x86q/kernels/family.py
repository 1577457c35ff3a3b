"""The kernels of ours that a CPU may run, each a source of its own, and which of them suit a layer."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence

from inductor_x86q.kernels.convolution import Convolution, Epilogue, header, namespace

# What a kernel's function takes besides addresses.
ARGUMENTS = ("threads",)


@dataclasses.dataclass(frozen=True)
class Kernel:
    convolution: Convolution
    epilogue: Epilogue
    rows: int
    columns: int
    flags: tuple[str, ...] = ()

    @property
    def kind(self) -> str:
        return self.convolution.function

    @property
    def name(self) -> str:
        return f"x86q_{self.kind}_{hashlib.sha256(repr(self).encode()).hexdigest()[:16]}"

    def source(self) -> str:
        library = namespace(self.convolution.lanes)
        return f"""\
{header(self.convolution.lanes)}
namespace {{
using namespace {library};
{self.convolution.source(self.rows, self.columns)}{self.epilogue.source()}}}
{STRUCT}
extern "C" void {self.name}(const void* x, const void* constants, const void* other, void* out, const X86qArguments*) {{
    {library}::{self.kind}<Shape, Epilogue>((const uint8_t*)x, (const int32_t*)constants, (const Epilogue::Other*)other, (Epilogue::Out*)out);
}}
"""


STRUCT = f"""\
#ifndef INDUCTOR_X86Q_ARGUMENTS
#define INDUCTOR_X86Q_ARGUMENTS
#include <cstdint>
struct X86qArguments {{ int64_t {", ".join(ARGUMENTS)}; }};
#endif
"""


def arguments(convolution: Convolution) -> tuple[int | str, ...]:
    return (convolution.threads,)


def choose(convolution: Convolution, epilogue: Epilogue, registers: int) -> Sequence[Kernel]:
    return [Kernel(convolution, epilogue, *blocking) for blocking in convolution.blockings(registers)]
