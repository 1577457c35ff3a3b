"""A recurrent layer's kernels by themselves: what they compute of the steps, and how they quantize it."""

from __future__ import annotations

import ctypes
import dataclasses
from typing import Any

import pytest
import torch

from inductor_x86q import cpu, testing
from inductor_x86q.graph import outputs
from inductor_x86q.graph.qdq import QParams
from inductor_x86q.graph.recurrence import RECURRENCE, state_count
from inductor_x86q.inductor import objects
from inductor_x86q.kernels import isa
from inductor_x86q.kernels.recurrence import CELLS, FIELDS, FLOATS, Kernel, Recurrence
from inductor_x86q.passes.fuse import recurrent

pytestmark = pytest.mark.skipif(not cpu.int8_lanes(), reason="this CPU has no AVX2")

EXACT = 60.0  # dB against the q/dq graph: floats differ in their last bits, and a state is rounded the other way now and then


# Steps, rows, units, directions, batch first, initial states given, threads.
SHAPES = [
    (3, 7, 21, 2, True, True, 1),
    (4, 3, 32, 1, False, False, 2),
    (3, 1, 70, 2, False, True, 2),
    (2, 5, 3, 2, False, True, 3),
    (0, 2, 8, 1, False, True, 1),
    (2, 0, 8, 1, False, True, 1),
]


@dataclasses.dataclass(frozen=True)
class Case:
    """A layer's steps: what a kernel reads, and the operator's arguments."""

    given: Recurrence
    arguments: tuple[Any, ...]
    sizes: dict[str, int]

    def run(self, kernel: Kernel, grid: QParams = outputs.FLOAT32, read: str = "both") -> tuple[Any, Any]:
        """The output, quantized like that, and the states; of which a None is not asked for."""
        _, x, *states, weight, scale, bias, _ = self.arguments
        directions, batch, hidden = (self.sizes[name] for name in ("directions", "batch", "hidden"))
        result = torch.full((x.shape[0], x.shape[1], directions * hidden), 99.0).to(grid.dtype)
        after = torch.full((state_count(self.given.cell), directions, batch, hidden), torch.nan)
        results = (result if read != "states" else None, after if read != "output" else None)
        numbers = dict(zero_point=grid.zero_point, low=grid.quant_min, high=grid.quant_max)
        arguments = kernel_arguments({**self.sizes, **numbers, "inverse_scale": 1 / grid.scale})
        constants = self.given.constants(weight, scale, bias)
        addresses = [0 if t is None else t.data_ptr() for t in (x, *states, constants, *results)]
        objects.load(kernel)(*map(ctypes.c_void_p, addresses), ctypes.byref(arguments))
        return results


def kernel_arguments(values: dict[str, float]) -> ctypes.Structure:
    fields = [(name, ctypes.c_float if name in FLOATS else ctypes.c_int64) for name in FIELDS]
    return type("Arguments", (ctypes.Structure,), {"_fields_": fields})(*(values[name] for name in FIELDS))


def case(cell: str, lanes: int, fits_16: bool, shape: tuple[Any, ...], *, has_bias: bool = True) -> Case:
    steps, batch, hidden, directions, batch_first, has_states, threads = shape
    gates = CELLS[cell][1]
    weight = torch.randint(-63 if fits_16 else -127, 64 if fits_16 else 128, (directions, gates * hidden, hidden))
    scale = torch.rand(directions, gates * hidden) / 127 / hidden**0.5
    bias = torch.randn(directions, hidden) if cell == "gru" else None
    width, out, rows = (
        directions * gates * hidden,
        directions * hidden,
        (batch, steps) if batch_first else (steps, batch),
    )
    x = torch.randn(*rows, width)
    states = [3 * torch.randn(directions, batch, hidden) if has_states else None for _ in range(state_count(cell))]
    sizes = dict(steps=steps, batch=batch, hidden=hidden, directions=directions, threads=threads)
    sizes |= dict(x_step=width if batch_first else batch * width, x_row=steps * width if batch_first else width)
    sizes |= dict(out_step=out if batch_first else batch * out, out_row=steps * out if batch_first else out)
    bias = bias if has_bias else None
    arguments = (cell, x, *(*states, None)[:2], weight.to(torch.int8), scale, bias, batch_first)
    return Case(Recurrence(cell, hidden, directions, lanes, fits_16), arguments, sizes)


@pytest.mark.parametrize("name", isa.ISAS)
@pytest.mark.parametrize("cell", CELLS)
def test_a_kernel_computes_what_the_operator_says(name: str, cell: str) -> None:
    row = isa.ISAS[name]
    if not row.cpu_flags <= set(cpu.instruction_sets()):
        pytest.skip(f"this CPU has no {name}")
    # Where products are added two by two, a weight of 7 bits keeps the sum of two within 16.
    for fits_16, shape in ((fits, shape) for fits in {False, not row.has_vnni} for shape in SHAPES):
        made = case(cell, row.lanes, fits_16, shape)
        result = made.run(Kernel(name, cell, fits_16=fits_16))
        if made.sizes["steps"]:
            for actual, expected in zip(result, RECURRENCE(*made.arguments), strict=True):
                assert not actual.numel() or testing.snr(actual, expected) > EXACT, shape


def test_a_kernel_without_a_bias_adds_none() -> None:
    made = case("gru", cpu.int8_lanes(), False, SHAPES[0], has_bias=False)
    result = made.run(made.given.kernel(torch.float32))
    torch.testing.assert_close(result, RECURRENCE(*made.arguments), atol=2e-6, rtol=1e-5)


GRIDS = [QParams(0.004, 131, 0, 255, torch.uint8), QParams(0.01, -3, -60, 90, torch.int8)]


@pytest.mark.parametrize("name", isa.ISAS)
@pytest.mark.parametrize(("cell", "grid"), zip(("lstm", "gru"), GRIDS, strict=True))
def test_a_kernel_quantizes_its_output(name: str, cell: str, grid: QParams) -> None:
    row = isa.ISAS[name]
    if not row.cpu_flags <= set(cpu.instruction_sets()):
        pytest.skip(f"this CPU has no {name}")
    for shape in SHAPES[:4]:
        made = case(cell, row.lanes, False, shape)
        (result, after), expected = made.run(Kernel(name, cell, grid.dtype), grid), RECURRENCE(*made.arguments)
        difference = (result.int() - outputs.rounded(expected[0], *grid.arguments()).int()).abs()
        assert difference.max() <= 1 and difference.float().mean() < 0.01, shape
        # The states are no steps of the output, but as they were.
        torch.testing.assert_close(after, expected[1], atol=2e-6, rtol=1e-5)
        for read, number in (("output", 0), ("states", 1)):
            alone = made.run(Kernel(name, cell, grid.dtype), grid, read)
            assert torch.equal(alone[number], (result, after)[number]) and alone[1 - number] is None


@pytest.mark.parametrize(("largest", "fits"), [(64, True), (65, False), (127, False), (-64, True), (-128, False)])
def test_sums_of_two_products_are_of_16_bits_where_these_suffice(largest: int, fits: bool) -> None:
    """As a CPU without VNNI adds them: with weights of 8 bits it must not."""
    assert recurrent._fits_16(torch.tensor([[[3, largest]]], dtype=torch.int8)) is fits
