"""The operators that random graphs are made of, and how they are written in Python."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from inductor_x86q.graph.operators import OPERATORS, Role

# How the operators that Python has a sign for are called.
SIGNS = {"+": "add", "-": "sub", "*": "mul"}

# How activations are written; the kernels take the first group, or some of them do.
_SPELLED = (
    "torch.relu({0})", "F.hardtanh({0}, -0.5, 1.25)", "F.relu6({0})", "torch.clamp({0}, -1, 2)",
    "torch.clamp({0}, min=0)", "torch.clamp({0}, max=1.5)", "F.hardswish({0})", "F.silu({0})", "F.gelu({0})",
    'F.gelu({0}, approximate="tanh")', "F.leaky_relu({0}, 0.1)", "torch.tanh({0})", "{0} * torch.sigmoid({0})",
    "F.hardsigmoid({0}) * {0}",
    "torch.sigmoid({0})", "F.hardsigmoid({0})", "F.elu({0})", "F.mish({0})", "torch.abs({0})", "torch.neg({0})",
)  # fmt: skip
_NAMES = frozenset(re.findall(r"\b(?:torch|F)\.(\w+)\(", " ".join(_SPELLED)))
# And those that have a row in the table of operators and nothing that need be said of them here.
UNARIES = _SPELLED + tuple(
    f"torch.ops.{row.overloads[0]}({{0}})"
    for row in OPERATORS
    if row.role is Role.ACTIVATION and not _NAMES & {target._schema.name.split("::")[1] for target in row.overloads}
)

# How often each step is drawn; they are methods of `tests.fuzz.steps.Steps`.
STEPS = (
    *["convolution"] * 6, *["linear"] * 4, *["matrix_product"] * 2, *["unary"] * 4, *["addition"] * 4,
    *["residual"] * 4, *["accumulated"] * 4, *["movement"] * 4, "split", *["join"] * 2, *["pool"] * 2, "multiplication",
    *["requantize"] * 4, "transposed", "product_of_two", "attention",
    "recurrence", "recurrent_cell",
)  # fmt: skip


def movements(
    name: str,
    shape: tuple[int, ...],
    axis: int,
    axes: Sequence[int],
    order: Sequence[int],
    pick: Callable[..., Any],
    number: Callable[[int, int], int],
) -> dict[str, str | None]:
    """How each operator that moves data is written for a value of this shape, where it takes one.

    Args:
        axis: the dimension to work on, one of `axes`.
        order: a permutation of all dimensions.
        pick, number: draw one of several, an integer between two.
    """
    n, rows = f"{name}.shape[0]", ", ".join(map(str, shape[2:]))
    return {
        "flatten": f"{name}.flatten(1)" if len(shape) > 2 else None,
        "permute": f"{name}.permute({tuple(order)})",
        "transpose": f"{name}.transpose({axis}, {pick(*axes)})",
        "slice": f"{name}[{':, ' * axis}{number(0, max(shape[axis] - 1, 0))}:]",
        "strided slice": f"{name}[{':, ' * axis}::2]",
        "select": f"{name}.select({axis}, 0)" if len(shape) > 2 and shape[axis] else None,
        "unsqueeze": f"{name}.unsqueeze({axis})" if len(shape) < 5 else None,
        "squeeze": f"{name}.squeeze({axis})" if len(shape) > 2 and shape[axis] == 1 else None,
        "flip": f"torch.flip({name}, ({axis},))",
        "roll": f"torch.roll({name}, 1, {axis})",
        "index_select": f"torch.index_select({name}, {axis}, {pick('INDEX')})" if shape[axis] else None,
        "pad": f"F.pad({name}, (1, 2), value={pick(0.0, 0.0, 0.5)})",
        "pad two": f"F.pad({name}, (1, 0, 0, 1))" if len(shape) > 2 else None,
        "expand": f"{name}.expand({n}, 3{', -1' * (len(shape) - 2)})" if len(shape) > 1 and shape[1] == 1 else None,
        "repeat": f"{name}.repeat(1{', 2' * (len(shape) - 1)})" if len(shape) in (2, 3) else None,
        "reshape": f"{name}.reshape({n}, -1, {shape[-1]})" if len(shape) > 2 and shape[-1] and 0 not in shape else None,
        "nearest": f"F.interpolate({name}, scale_factor=2.0)" if len(shape) == 4 and 0 not in shape else None,
        "pixel_shuffle": f"F.pixel_shuffle({name}, 2)" if len(shape) == 4 and shape[1] % 4 == 0 else None,
        "channel_shuffle": f"{name}.reshape({n}, 2, -1, {rows}).transpose(1, 2).reshape({n}, -1, {rows})"
            if len(shape) == 4 and shape[1] % 2 == 0 and 0 not in shape else None,
    }  # fmt: skip
