"""A recurrent layer's kernel: what decides its machine code, its C++, and the order in which it reads its constants."""

from __future__ import annotations

import dataclasses
import json

import torch
from torch.nn import functional

from inductor_x86q import cpu
from inductor_x86q.kernels import isa, library
from inductor_x86q.kernels.epilogue import CPP_TYPES, SHORT_NAMES, flag

# The C++ of each cell, and how many gates it has.
CELLS = {"lstm": ("Lstm", 4), "gru": ("Gru", 3), "rnn_tanh": ("RnnTanh", 1), "rnn_relu": ("RnnRelu", 1)}
WITH_BIAS = {"gru"}  # whose kernel adds one to the product of the last gate
_MIDDLE = 128  # the zero point of a rounded state

# What a kernel is told of a layer when it is called, in order, and what it is. Strides are in elements.
FIELDS: dict[str, str] = {
    "steps": "",
    "batch": "rows of a step",
    "hidden": "units of a direction",
    "directions": "1 or 2, of which the second goes backwards",
    "x_step": "stride of a step of what the input adds to the gates, and of its rows",
    "x_row": "",
    "out_step": "stride of a step of the output, and of its rows",
    "out_row": "",
    "threads": "0: as many as there are",
    "zero_point": "of the output, and the bounds of its integers",
    "low": "",
    "high": "",
    "inverse_scale": "of the output",
}
FLOATS = frozenset({"inverse_scale"})  # all others are int64
STRUCT = library.struct("X86qRecurrence", FIELDS, FLOATS)
PARAMETERS = (
    "const float* x, const float* hidden, const float* cell, const int8_t* constants, void* out, float* states, "
    "const X86qRecurrence* sizes"
)


@dataclasses.dataclass(frozen=True)
class Kernel:
    """What decides machine code, and nothing of a layer or a network.

    Args:
        isa: of `ISAS`.
        cell: of `CELLS`.
        output_dtype: float32, uint8 or int8.
        fits_16: no sum of two products exceeds 16 bits; asked only where products are added two by two.
    """

    isa: str
    cell: str
    output_dtype: torch.dtype = torch.float32
    fits_16: bool = False

    @property
    def name(self) -> str:
        fits = "_fits16" if self.fits_16 else ""
        return f"x86q_{self.cell}_{self.isa}{fits}_{SHORT_NAMES[self.output_dtype]}"

    @property
    def flags(self) -> tuple[str, ...]:
        return library.flags(self.isa)

    def source(self) -> str:
        """A complete C++ translation unit."""
        templates = library.namespace(self.isa, "recurrence")
        return f"""\
{STRUCT}{library.templates(self.isa, "recurrence", ("threads.h", "recurrence.h"))}
namespace {self.name}_ {{
struct Kernel {{
    typedef {templates}::{CELLS[self.cell][0]} Cell;
    typedef {CPP_TYPES[self.output_dtype]} Out;
    static constexpr bool FITS_16 = {flag(self.fits_16)};
}};
}}
extern "C" void {self.name}(
    {PARAMETERS}) {{
    {templates}::recurrence(
        {templates}::Steps<{self.name}_::Kernel>{{
            *sizes, x, hidden, cell, constants, ({CPP_TYPES[self.output_dtype]}*)out, states}});
}}
"""


@dataclasses.dataclass(frozen=True)
class Recurrence:
    """A layer as its constants and its kernel depend on it."""

    cell: str
    hidden: int
    directions: int
    lanes: int  # 32-bit numbers of a vector
    fits_16: bool  # no sum of two products exceeds 16 bits

    def text(self) -> str:
        """As an argument of an operator."""
        return json.dumps(dataclasses.asdict(self))

    @staticmethod
    def read(text: str) -> Recurrence:
        return Recurrence(**json.loads(text))

    def kernel(self, output_dtype: torch.dtype) -> Kernel:
        """The one for this CPU."""
        return Kernel(isa.best(cpu.usable_flags(), self.lanes), self.cell, output_dtype, self.fits_16)

    def macs(self) -> int:
        """Of a row and a step."""
        return self.directions * CELLS[self.cell][1] * self.hidden**2

    def constants(self, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """All that a kernel reads besides inputs, as int8.

        Args:
            weight: int8 (directions, gates · hidden, hidden).
            scale: of the weight's rows.
            bias: (directions, hidden), of the product of the last gate; none is zeros to a cell `WITH_BIAS`.
        """
        parts = []
        for direction in range(self.directions):
            rows = weight[direction]
            compensation = -_MIDDLE * rows.sum(1, dtype=torch.int32)
            parts += [self._by_vector(values) for values in (compensation, scale[direction].float())]
            if self.cell in WITH_BIAS:
                own = torch.zeros(self.hidden) if bias is None else bias[direction].float()
                parts.append(self._by_vector(own))
            parts.append(self._by_vector(functional.pad(rows, (0, -self.hidden % 4)).unflatten(1, (-1, 4))))
        return torch.cat([part.contiguous().view(torch.int8).flatten() for part in parts])

    def _by_vector(self, values: torch.Tensor) -> torch.Tensor:
        """What belongs to (gates · units, …) as vector, …, gate, lane; vectors are filled up with zeros."""
        rest = values.dim() - 1  # of a weight the fours and what is in one
        gates = values.unflatten(0, (-1, self.hidden))
        filled = functional.pad(gates, (*(0, 0) * rest, 0, -self.hidden % self.lanes))
        vectors = filled.unflatten(1, (-1, self.lanes))  # gate, vector, lane, four, 4
        return vectors.permute(1, 3, 0, 2, 4) if rest else vectors.permute(1, 0, 2)
