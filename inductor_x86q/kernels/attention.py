"""Attention between int8 tensors: what decides its kernel's machine code, and what that is told at a call."""

from __future__ import annotations

import dataclasses

import torch

from inductor_x86q import cpu
from inductor_x86q.kernels import isa, library
from inductor_x86q.kernels.epilogue import CPP_TYPES, SHORT_NAMES, flag

# Names in order, and what they are. Strides are in elements.
FIELDS: dict[str, str] = {
    "batch": "",
    "heads": "of queries",
    "key_heads": "of keys and values, each for as many heads of queries",
    "queries": "",
    "keys": "",
    "width": "of a query and a key",
    "value_width": "",
    "query_batch": "strides of a batch, of its heads and rows",
    "query_head": "",
    "query_row": "",
    "key_batch": "",
    "key_head": "",
    "key_row": "",
    "value_batch": "",
    "value_head": "",
    "value_row": "",
    "mask_batch": "0 where it is the same for all",
    "mask_head": "",
    "mask_row": "",
    "mask_key": "0 where a query's element stands for all keys, else 1",
    "out_batch": "",
    "out_head": "",
    "out_row": "",
    "is_causal": "whether a query sees no key behind its own place",
    "query_zero_point": "",
    "key_zero_point": "",
    "value_zero_point": "",
    "zero_point": "of the output, and the bounds of its integers",
    "low": "",
    "high": "",
    "threads": "0: as many as there are",
    "query_scales": "where they are, one for each row, if each has its own",
    "key_scales": "",
    "value_scales": "one for each head",
    "factor": "of a score, the product of the softmax's scale and, where these are numbers, query's and key's",
    "value_scale": "",
    "inverse_scale": "of the output",
}
FLOATS = frozenset({"factor", "value_scale", "inverse_scale"})  # all others are int64

STRUCT = library.struct("X86qAttention", FIELDS, FLOATS)

PARAMETERS = (
    "const void* query, const void* key, const void* value, const void* mask, void* out, const X86qAttention* arguments"
)
MASKS = {None: "none", torch.bool: "boolean", torch.float32: "added"}  # by the mask's type

LARGEST_WIDTH, MOST_KEYS = 8192, 32768  # whose sums the kernel's integers hold


@dataclasses.dataclass(frozen=True)
class AttentionKernel:
    """What decides machine code, and nothing of a layer or a network.

    Args:
        isa: of `ISAS`.
        mask: of the values of `MASKS`.
        output_dtype: float32, uint8 or int8.
        fits_16: query, key and value keep 7 bits, so that no sum of two products exceeds 16 bits.
        by_rows: each row of the query and the key has a scale of its own, and each head of the value.
    """

    isa: str
    mask: str
    output_dtype: torch.dtype
    fits_16: bool = False
    by_rows: bool = False

    @property
    def name(self) -> str:
        """Tells type, mask and instruction set, as a C identifier."""
        kind = f"{'_fits16' if self.fits_16 else ''}{'_rows' if self.by_rows else ''}"
        return f"x86q_attention_{self.isa}{kind}_{self.mask}_{SHORT_NAMES[self.output_dtype]}"

    @property
    def flags(self) -> tuple[str, ...]:
        return library.flags(self.isa)

    def source(self) -> str:
        """A complete C++ translation unit, with the function `void NAME(PARAMETERS)`."""
        templates = library.namespace(self.isa, "attention")
        return f"""\
#include <stdexcept>
{STRUCT}{library.templates(self.isa, "attention", ("threads.h", "attention.h"))}\
namespace {self.name}_ {{
struct Kernel {{
    using Out = {CPP_TYPES[self.output_dtype]};
    static constexpr auto MASK = {templates}::Mask::{self.mask.upper()};
    static constexpr bool FITS_16 = {flag(self.fits_16)}, BY_ROWS = {flag(self.by_rows)};
    static constexpr int64_t MOST_KEYS = {MOST_KEYS};
}};
}}
extern "C" void {self.name}(
    {PARAMETERS}) {{
    using Out = {CPP_TYPES[self.output_dtype]};
    {templates}::attention<{self.name}_::Kernel>(
        (const uint8_t*)query, (const uint8_t*)key, (const uint8_t*)value, (const uint8_t*)mask, (Out*)out, *arguments);
}}
"""


def choose(mask: torch.dtype | None, output_dtype: torch.dtype, largest: int, *, by_rows: bool) -> AttentionKernel:
    """The kernel for this CPU; `largest` is the largest integer that query, key and value hold."""
    best, fits_16 = isa.best(cpu.usable_flags(), cpu.int8_lanes()), not cpu.has_vnni() and largest <= 127
    return AttentionKernel(best, MASKS[mask], output_dtype, fits_16, by_rows)
