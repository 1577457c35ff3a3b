"""A graph being drawn: its values so far, and how inputs, quantized values and weights are drawn and written down.

Each line is run as it is drawn, so that the next one knows the shapes it may work on and the range of values a quantize
has to cover.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch

from inductor_x86q import cpu
from tests.fuzz.graphs import HELPERS


@dataclasses.dataclass(frozen=True)
class Grid:
    """The arguments of a quantize, as text and as numbers."""

    scale: str
    zero_point: str
    quant_min: int
    quant_max: int
    dtype: torch.dtype

    def text(self) -> str:
        return f"{self.scale}, {self.zero_point}, {self.quant_min}, {self.quant_max}, {self.dtype}"


class Draft:
    """A graph being drawn."""

    def __init__(self, number: Callable[[int, int], int]) -> None:
        self.number = number  # a random integer from its first argument up to and with its second
        self.constants: list[tuple[str, str]] = []
        self.inputs: list[tuple[str, str]] = []
        self.lines: list[str] = []
        self.kinds: list[str] = []
        self.defects: set[str] = set()
        self.products = 0
        self.held = SimpleNamespace()
        self.values: dict[str, torch.Tensor] = {}
        self.floats: list[str] = []  # what steps work on, oldest first
        self.grids: dict[str, tuple[str, Grid]] = {}  # a dequantized value's integers and their parameters
        self.read: set[str] = set()
        self.weights: list[tuple[str, tuple[Any, ...], str]] = []
        self.dynamic_batch = self.chance(15)
        # What is not quantized is computed in these, as in a model under autocast or one converted to 16 bits.
        self.types = self.pick(*[(torch.float32,)] * 7, *[(torch.bfloat16, torch.float32)] * 2, (torch.bfloat16,),
                               (torch.bfloat16, torch.float16, torch.float32))  # fmt: skip

    # --- drawing

    def chance(self, percent: int) -> bool:
        return self.number(0, 99) >= 100 - percent  # shrinks to False

    def pick(self, *options: Any) -> Any:
        return options[self.number(0, len(options) - 1)]

    def permuted(self, values: Sequence[int]) -> list[int]:
        left = list(values)
        return [left.pop(self.number(0, len(left) - 1)) for _ in values]

    # --- writing

    def constant(self, expression: str) -> str:
        name = f"c{len(self.constants)}"
        self.constants.append((name, expression))
        setattr(self.held, name, eval(expression, HELPERS))
        return f"self.{name}"

    def seed(self) -> int:
        return len(self.constants)

    def emit(self, expression: str, *operands: str, is_float: bool = True) -> str:
        """Writes a line that computes `expression`; the names in `operands` count as read."""
        name = f"v{len(self.values)}"
        value = eval(expression, {**HELPERS, **self.values, "self": self.held})
        self.values[name] = value
        self.lines.append(f"{name} = {expression}")
        self.read.update(operands)
        if is_float:
            self.floats.append(name)
        return name

    def input(self, shape: tuple[int, ...], *, integers: int = 20) -> str:
        """A float tensor, or in so many of a hundred cases integers, dequantized."""
        name = f"x{len(self.inputs)}"
        if self.chance(integers):
            grid = self.grid(0.0, 4.0)
            expression = f"integers(SEED, {shape}, {grid.quant_min}, {grid.quant_max}, {grid.dtype})"
            self._input(name, expression)
            return self.dequantized(name, grid)
        dtype = self.pick(*self.types)
        converted = "" if dtype == torch.float32 else f".to({dtype})"
        self._input(name, f"reals(SEED, {shape}, -2.0, 2.0){converted}")
        self.floats.append(name)
        return name

    def dtype(self, name: str) -> torch.dtype:
        return self.values[name].dtype

    def typed(self, name: str, dtype: torch.dtype | None = None) -> str:
        """The value converted to `dtype`, or to one that is drawn; itself where it has that type."""
        dtype = dtype or self.pick(*self.types)
        if self.dtype(name) == dtype or not fits(self.values[name], dtype):
            return name
        self.kinds.append(f"{self.dtype(name)} to {dtype}".replace("torch.", ""))
        converted = self.emit(f"{name}.to({dtype})", name)
        if name in self.grids:
            self.grids[converted] = self.grids[name]
        return converted

    def _input(self, name: str, expression: str) -> None:
        self.inputs.append((name, expression))
        self.values[name] = eval(expression.replace("SEED", str(len(self.inputs) - 1)), HELPERS)

    # --- quantization

    def grid(self, low: float, high: float, *kinds: str) -> Grid:
        """Parameters for values from `low` to `high`, of one of `kinds` if any are given."""
        kind = self.pick(*(kinds or ("seven bits",) * 4 + ("narrow", "eight bits", "signed", "signed narrow")))
        quant_min, quant_max, dtype = {
            "seven bits": (0, 127, torch.uint8),
            "narrow": (3, 100, torch.uint8),
            "eight bits": (0, 255, torch.uint8),
            "signed": (-128, 127, torch.int8),
            "signed narrow": (-60, 61, torch.int8),
        }[kind]
        span = max(high, 0.0) - min(low, 0.0)
        factor = self.pick(1.0, 1.0, 1.0, 0.3, 3.0, 1e-3, 1e3)
        scale = float(f"{(span or 1.0) / (quant_max - quant_min) * factor:.3g}")
        if not 1e-30 < scale < 1e30:
            scale = 1.0
        natural = min(max(round(quant_min - min(low, 0.0) / scale), quant_min), quant_max)
        zero_point = self.pick(natural, natural, natural, quant_min, quant_max, (quant_min + quant_max) // 2)
        scale_text, zero_text = repr(scale), str(zero_point)
        if self.chance(8):
            scale_text, zero_text = (
                self.constant(f"torch.tensor({scale})"),
                self.constant(f"torch.tensor({zero_point})"),
            )
        return Grid(scale_text, zero_text, quant_min, quant_max, dtype)

    def quantized(self, name: str, grid: Grid | None = None) -> str:
        """Puts quantize and dequantize behind a value, or dequantizes again what is quantized already."""
        if grid is None:
            again = [d for d, (source, _) in self.grids.items() if self.quantized_from.get(source) == name]
            if again and self.chance(50):
                if self.chance(50):
                    return again[0]
                return self.dequantized(*self.grids[again[0]])
            if name in self.grids and self.chance(80):
                return name
            value = self.values[name]
            low, high = (float(value.min()), float(value.max())) if value.numel() else (-1.0, 1.0)
            grid = self.grid(low, high)
        rounded = self.typed(name, torch.float32) if self.chance(30) else name
        integers = self.emit(f"q.quantize_per_tensor({rounded}, {grid.text()})", rounded, is_float=False)
        self.quantized_from[integers] = name
        return self.dequantized(integers, grid)

    def dequantized(self, integers: str, grid: Grid) -> str:
        dtype = self.pick(*self.types)
        # float16 might not hold the numbers; `typed` looks at them.
        out_dtype = ", out_dtype=torch.bfloat16" if dtype == torch.bfloat16 and self.chance(50) else ""
        name = self.emit(f"q.dequantize_per_tensor({integers}, {grid.text()}{out_dtype})", integers)
        self.grids[name] = (integers, grid)
        if out_dtype:
            self.kinds.append("dequantize to bfloat16")
        return self.typed(name, dtype)

    def quantized_at_run_time(
        self, name: str, *, rows: bool, by_matrix: bool = False, kinds: Sequence[str] = ("seven bits", "eight bits")
    ) -> tuple[str, Grid]:
        """Puts quantize and dequantize behind a value, by a scale that is computed from it: one for each row, or for all.

        Rows have a scale in common with the others of their matrix if it is to be `by_matrix`.
        """
        name = self.typed(name, torch.float32)
        grid = self.grid(-1.0, 1.0, *kinds)
        element, dtype = ("[..., :1]", "") if rows else (".flatten()[:1]", ", dtype=torch.int64")
        scale = self.pick(0.01, 0.03, 1e-3)
        expression = f"torch.clamp(torch.abs({name}{element}), {scale}, {3 * scale:.3g})"
        scales = self.emit(expression, name, is_float=False)
        if by_matrix:
            *matrices, count, _ = self.values[scales].shape
            sizes = ", ".join(map(str, (*[-1] * len(matrices), count, 1)))
            scales = self.emit(f"{scales}[..., :1, :].expand({sizes})", scales, is_float=False)
        middle = (grid.quant_min + grid.quant_max) // 2
        zero_points = self.emit(f"torch.full_like({scales}, {middle}{dtype})", scales, is_float=False)
        how = "token" if rows else "tensor"
        arguments = f"{scales}, {zero_points}, {grid.quant_min}, {grid.quant_max}, {grid.dtype}"
        integers = self.emit(f"q.quantize_per_{how}({name}, {arguments})", name, is_float=False)
        output = ", torch.float32" if rows else ""
        self.kinds.append(f"scale at run time, per {how}")
        return self.emit(f"q.dequantize_per_{how}({integers}, {arguments}{output})", integers), grid

    @property
    def quantized_from(self) -> dict[str, str]:
        return self.__dict__.setdefault("_quantized_from", {})

    def activation(self, name: str, *, convolved: bool = False) -> tuple[str, Grid | None]:
        """What a product reads: a dequantized value as a rule, unsigned as a rule where it is `convolved`."""
        if 0 in self.values[name].shape:
            self.defects.add("NO_KERNEL")
        elif fits(self.values[name], torch.float32) and self.chance(12):
            rows = not convolved and self.chance(70)
            kinds = ["seven bits", "seven bits", "eight bits", *(["signed"] if rows else [])]
            return self.quantized_at_run_time(name, rows=rows, kinds=kinds)
        if self.chance(5):
            grid = self.grids.get(name)
            if grid is None:  # though a dequantize may reach it from further up
                self.defects |= {"ACTIVATION_NOT_QUANTIZED", "NOT_QUANTIZED", "SATURATES"}
            if convolved and (grid is None or grid[1].dtype == torch.int8):
                self.defects.add("ACTIVATION_TYPE")
            return name, grid and grid[1]
        name = self.quantized(name)
        if convolved and self.grids[name][1].dtype == torch.int8:
            if self.chance(20):
                self.defects.add("ACTIVATION_TYPE")
            else:
                name = self.quantized(name, Grid("0.03", "64", 0, 127, torch.uint8))
        return name, self.grids[name][1]

    def weight(self, shape: tuple[int, ...], grid: Grid | None, dtype: torch.dtype, *, axis: int = 0) -> str:
        """An expression for a dequantized weight; `axis` is the one of its output channels."""
        key = (*shape, axis, dtype)
        shared = [(text, known) for known, key_, text in self.weights if key_ == key]
        if shared and self.chance(40):
            self.kinds.append("shared weight")
            self.note_saturation(grid, shared[0][1])
            return shared[0][0]
        eight_bits = grid is not None and (grid.dtype == torch.int8 or grid.quant_max > 127)
        limit = self.pick(64, 64, 64, 127) if eight_bits else self.pick(127, 127, 64, 1)
        self.note_saturation(grid, str(limit))
        spread = max(math.sqrt(math.prod(shape) / shape[axis]) * limit, 1e-9)
        scale = self.pick(1.0, 1.0, 1.0, *((1.0,) if dtype == torch.float16 else (1e-4, 1e4))) / spread
        weight = self.constant(f"integers({self.seed()}, {shape}, {-limit}, {limit}, torch.int8)")
        text = self._weight_text(weight, shape, axis, float(f"{scale:.3g}"))
        if dtype != torch.float32:
            one = text.startswith("q.") and self.chance(50)
            text = f"{text[:-1]}, out_dtype={dtype})" if one else f"{text}.to({dtype})"
        self.weights.append((str(limit), key, text))
        return text

    def _weight_text(self, weight: str, shape: tuple[int, ...], axis: int, scale: float) -> str:
        low = self.pick(-128, -127)
        spelling = self.pick(*["per channel"] * 12, *["per tensor"] * 4, "zero point", "float")
        if spelling == "per tensor":
            return f"q.dequantize_per_tensor({weight}, {scale}, 0, {low}, 127, torch.int8)"
        if spelling == "float":
            self.defects |= {"WEIGHT_NOT_QUANTIZED", "NOT_QUANTIZED"}
            return self.constant(f"reals({self.seed()}, {shape}, {-scale * 64}, {scale * 64})")
        zero_points = "torch.zeros({0}, dtype=torch.int64)"
        if spelling == "zero point":
            self.defects.add("WEIGHT_TYPE")
            zero_points = "torch.full(({0},), 2)"
        channels = shape[axis]
        scales = self.constant(f"reals({self.seed()}, ({channels},), {scale / 8}, {scale})")
        zeros = self.constant(zero_points.format(channels))
        return f"q.dequantize_per_channel({weight}, {scales}, {zeros}, {axis}, {low}, 127, torch.int8)"

    def note(self, kind: str, x: str) -> None:
        """A product that reads `x`."""
        self.kinds.append(
            kind if self.dtype(x) == torch.float32 else f"{kind} in {self.dtype(x)}".replace("torch.", "")
        )
        self.products += 1

    def note_saturation(self, grid: Grid | None, limit: str) -> None:
        if grid is not None and not cpu.has_vnni():
            largest = 255 if grid.dtype == torch.int8 else grid.quant_max
            if 2 * largest * int(limit) > 32767:
                self.defects.add("SATURATES")

    def note_small(self, rows: int, width: int, outputs: int) -> None:
        """Products so small that Inductor takes them apart before freezing."""
        if width == 1 or (rows == 1 and (outputs == 1 or (width <= 16 and outputs <= 16))):
            self.defects.add("NO_KERNEL")

    def bias(self, width: int, dtype: torch.dtype) -> str:
        return self.vector((width,), dtype) if self.chance(60) else "None"

    def vector(self, shape: tuple[int, ...], dtype: torch.dtype) -> str:
        """A float constant: of that type, or of float32 and converted where it is used, as autocast does."""
        text = f"reals({self.seed()}, {shape}, -1.0, 1.0)"
        if dtype == torch.float32:
            return self.constant(text)
        return self.constant(f"{text}.to({dtype})") if self.chance(50) else f"{self.constant(text)}.to({dtype})"

    # --- choosing operands

    def choose(self, accepts: Any = lambda shape: True) -> str | None:
        """A value of a shape that `accepts`; mostly one of the newest."""
        found = [name for name in self.floats if accepts(tuple(self.values[name].shape))]
        if not found:
            return None
        return found[-1] if self.chance(50) else self.pick(*reversed(found))

    def rank(self, *ranks: int) -> str | None:
        return self.choose(lambda shape: len(shape) in ranks)


def fits(value: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether numbers of about this size are far from the ends of what the type holds."""
    small, large = (1e-4, 1e3) if dtype == torch.float16 else (1e-12, 1e6)
    return bool(((value == 0) | ((value.abs() < large) & (value.abs() > small))).all())
