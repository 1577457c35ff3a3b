"""The family of kernels: what decides the machine code of each, its name and its C++."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

from inductor_x86q.kernels import library
from inductor_x86q.kernels.arguments import PARAMETERS, STRUCT
from inductor_x86q.kernels.convolution import MOST_PIXELS, Convolution
from inductor_x86q.kernels.epilogue import Epilogue, flag
from inductor_x86q.kernels.isa import ISAS

# Rows by columns of the blocks of sums that the vector registers hold beside a vector of each column and one input, by the
# number of registers, the usual ones first. More than four columns are not rounded to bytes together. Few, since each is
# compiled for every epilogue: on the layers of `measurements.json` (8, 3), (12, 2), (10, 2) and (14, 1) would gain 0.1 % of
# the time.
BLOCKS = {
    16: ((3, 4), (4, 3), (6, 2), (12, 1)),
    32: ((6, 4), (14, 2), (7, 1), (9, 3), (7, 3)),
}


@dataclasses.dataclass(frozen=True)
class Taps:
    """What a depthwise kernel has written out."""

    kernel: tuple[int, int]
    stride_w: int
    dilation_w: int
    narrow: bool  # all channels are fewer than a block's

    @property
    def name(self) -> str:
        dilation = f"d{self.dilation_w}" if self.dilation_w != 1 else ""
        return f"{self.kernel[0]}x{self.kernel[1]}s{self.stride_w}{dilation}{'_narrow' if self.narrow else ''}"


@dataclasses.dataclass(frozen=True)
class Kernel:
    """What decides machine code, and nothing of a layer or a network.

    Args:
        isa: of `ISAS`.
        kind: "convolution", by runs of contiguous bytes, or "depthwise".
        rows: pixels of the block of sums that registers hold; 1 for a depthwise kernel, which takes no other.
        columns: vectors of output channels of that block; for a depthwise kernel pixels, of four vectors each.
        taps: of a depthwise kernel.
        x_signed: whether the input is s8.
        fits_16: no sum of two products exceeds 16 bits; asked only where products are added two by two.
    """

    isa: str
    kind: str
    rows: int
    columns: int
    epilogue: Epilogue
    taps: Taps | None = None
    x_signed: bool = False
    fits_16: bool = False

    @property
    def name(self) -> str:
        """Tells type, block and instruction set, as a C identifier."""
        size = f"{self.taps.name}_{self.columns}" if self.taps else f"{self.rows}x{self.columns}"
        fits = "_fits16" if self.fits_16 else ""
        return f"x86q_{self.kind}_{self.isa}_{size}{fits}_{'s8' if self.x_signed else 'u8'}_{self.epilogue.name}"

    @property
    def flags(self) -> tuple[str, ...]:
        """The compiler's flags that it needs besides those for optimization."""
        return library.flags(self.isa)

    def shared(self) -> str:
        """The C++ in front of its definition, which others of the family need as well; a file may hold it more than once."""
        return STRUCT + library.templates(self.isa, self.kind, ("epilogue.h", "threads.h", "shape.h", f"{self.kind}.h"))

    def definition(self) -> str:
        """The C++ of its function: `void NAME(x, constants, other, out, arguments)`."""
        templates = library.namespace(self.isa, self.kind)
        return f"""\
namespace {self.name}_ {{
using namespace {templates};
struct Kernel {{
{self._constants()}}};
{self.epilogue.source()}}}
extern "C" void {self.name}(
    {PARAMETERS}) {{
    using Epilogue = {self.name}_::Epilogue;
    {templates}::{self.kind}<{self.name}_::Kernel, Epilogue>(
        (const uint8_t*)x, (const int32_t*)constants, (const Epilogue::Other*)other, (Epilogue::Out*)out, *arguments);
}}
"""

    def source(self) -> str:
        """A complete C++ translation unit."""
        return self.shared() + self.definition()

    def _constants(self) -> str:
        lines = f"    static constexpr bool SIGNED = {flag(self.x_signed)}, FITS_16 = {flag(self.fits_16)};\n"
        if self.taps is None:
            return f"    static constexpr int ROWS = {self.rows}, COLUMNS = {self.columns};\n" + lines
        (height, width), taps = self.taps.kernel, self.taps
        return f"""\
    static constexpr int COLUMNS = {self.columns}, KERNEL_H = {height}, KERNEL_W = {width};
    static constexpr int STRIDE_W = {taps.stride_w}, DILATION_W = {taps.dilation_w};
    static constexpr bool NARROW = {flag(taps.narrow)};
{lines}"""


def translation_unit(kernels: Sequence[Kernel]) -> str:
    """One C++ file for several kernels."""
    shared = dict.fromkeys(kernel.shared() for kernel in kernels)
    return "".join([*shared, *dict.fromkeys(kernel.definition() for kernel in kernels)])


def candidates(convolution: Convolution, epilogue: Epilogue, isa: str) -> list[Kernel]:
    """The kernels that compute a layer on such a CPU."""
    row = ISAS[isa]
    assert row.lanes == convolution.lanes, f"the weight is packed for {convolution.lanes} lanes, {isa} has {row.lanes}"
    make = functools.partial(Kernel, isa, epilogue=epilogue, x_signed=convolution.x_signed, fits_16=convolution.fits_16)
    if convolution.has_depthwise_kernel:
        columns = 2 if row.registers == 16 else MOST_PIXELS  # of four vectors each, which is half of the registers
        narrow = convolution.c < 4 * row.lanes
        taps = Taps(convolution.kernel, convolution.stride[1], convolution.dilation[1], narrow)
        return [make(kind="depthwise", rows=1, columns=columns, taps=taps)]
    blocks = [(rows, columns) for rows, columns in BLOCKS[row.registers] if columns <= convolution.group_vectors]
    return [make(kind="convolution", rows=rows, columns=columns) for rows, columns in blocks]
