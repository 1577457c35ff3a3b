"""Random q/dq graphs, drawn by hypothesis as the source text of a module.

A graph is drawn a line at a time. Each line is run as it is drawn, so that the next one knows the shapes it may work
on and the range of values a quantize has to cover. What comes out is a script: the one that a failure prints.
"""

from __future__ import annotations

import dataclasses
import linecache
import math
import random
import re
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from hypothesis import strategies as st

from inductor_x86q import cpu

PREAMBLE = '''\
import torch
import torch.ao.quantization.fx._decomposed  # registers the operators
import torch.nn.functional as F

q = torch.ops.quantized_decomposed


def integers(seed, shape, low, high, dtype):
    """Integers from `low` up to and with `high`."""
    return torch.randint(low, high + 1, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def reals(seed, shape, low, high):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * (high - low) + low

'''
_HELPERS: dict[str, Any] = {}
exec(PREAMBLE, _HELPERS)

MOST_ELEMENTS = 4096


@dataclasses.dataclass(frozen=True)
class Graph:
    """A module as text, its inputs as expressions, and what is known of it."""

    constants: tuple[tuple[str, str], ...]
    inputs: tuple[tuple[str, str], ...]
    lines: tuple[str, ...]
    outputs: tuple[str, ...]
    dynamic_batch: bool
    kinds: tuple[str, ...]  # the operators drawn, for the counts
    defects: frozenset[str]  # the report's reasons that were put in on purpose
    products: int  # convolutions, linears and matrix products in the source

    def source(self) -> str:
        """The module's definition."""
        registered = [f'        self.register_buffer("{name}", {expression})' for name, expression in self.constants]
        names = ", ".join(name for name, _ in self.inputs)
        return "\n".join([
            "class Model(torch.nn.Module):",
            "    def __init__(self):",
            "        super().__init__()",
            *registered,
            "",
            f"    def forward(self, {names}):",
            *(f"        {line}" for line in self.lines),
            f"        return {', '.join(self.outputs)}",
            "",
        ])  # fmt: skip

    def pairs(self) -> set[tuple[str, str]]:
        """Each operator that computes something, and one that reads it; what only converts is looked through."""
        behind: dict[str, set[str]] = {name: {"input"} for name, _ in self.inputs}
        found = set()
        for line in self.lines:
            name, expression = line.split(" = ", 1)
            read = set[str]().union(*(behind.get(operand, set()) for operand in re.findall(r"\b[vx]\d+\b", expression)))
            operator = _operator(expression)
            found |= {(before, operator) for before in read if operator}
            behind[name] = {operator} if operator else read
        return found

    def module(self) -> torch.nn.Module:
        namespace = dict(_HELPERS)
        source = self.source()
        # Dynamo and the traceback look a line of source up by its file's name.
        name = f"<random graph {hash(source)}>"
        linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
        exec(compile(source, name, "exec"), namespace)
        return namespace["Model"]().eval()

    def example(self, run: int, batch: int | None = None) -> tuple[torch.Tensor, ...]:
        """The inputs of call number `run`: other values each time; `batch` replaces their first dimension."""
        found = []
        for number, (_, expression) in enumerate(self.inputs):
            value = eval(expression.replace("SEED", str(1000 * run + number)), _HELPERS)
            if batch is not None:
                value = torch.cat([value] * batch)[:batch] if value.shape[0] else value
            found.append(value)
        return tuple(found)

    def script(self, run: int = 0, mode: str | None = None) -> str:
        """A file that compiles the graph and prints how far it is from itself run eagerly."""
        inputs = [expression.replace("SEED", str(1000 * run + n)) for n, (_, expression) in enumerate(self.inputs)]
        mark = "for x in inputs:\n    torch._dynamo.maybe_mark_dynamic(x, 0)\n" if self.dynamic_batch else ""
        chosen = f', mode="{mode}"' if mode else ""
        return (
            f"{PREAMBLE}\n{self.source()}\n\nmodel = Model().eval()\ninputs = ({', '.join(inputs)},)\n{mark}"
            "with torch.no_grad():\n"
            "    expected = model(*inputs)\n"
            f'    actual = torch.compile(model, backend="inductor_x86q"{chosen})(*inputs)\n'
            "if not isinstance(expected, tuple):\n    expected, actual = (expected,), (actual,)\n"
            "for e, a in zip(expected, actual, strict=True):\n"
            "    print(tuple(e.shape), e.dtype, (e.double() - a.double()).abs().max().item() if e.numel() else 0)\n"
        )


_SIGNS = {"+": "add", "-": "sub", "*": "mul"}


def _operator(expression: str) -> str:
    """The operator that a line computes; empty for quantize, dequantize, conversions and the parts of a split."""
    called = re.match(r"(?:torch|F)\.(\w+)\(", expression)
    if called:
        return called[1]
    sign = re.match(r"\(?[vx]\d+ ([+*-]) ", expression)
    if sign:
        return _SIGNS[sign[1]]
    method = re.match(r"[vx]\d+\.(\w+)\(", expression)
    if method:
        return method[1] if method[1] != "to" else ""
    return "slice" if ":" in expression and not expression.startswith("q.") else ""


def written(lines: str, constants: Mapping[str, str], inputs: Mapping[str, str], *, defects: str = "",
            dynamic_batch: bool = False) -> Graph:  # fmt: skip
    """A graph written by hand: assignments, one a line, whose last one is the output (or several, with commas).

    Args:
        constants: name and expression of buffers; those that no line reads are left out.
        defects: names of the reasons for which something in it may stay float.
    """
    rows = [line.strip() for line in lines.strip().splitlines()]
    outputs = rows.pop().removeprefix("return ").split(", ") if rows[-1].startswith("return ") else [
        rows[-1].split(" = ")[0]]  # fmt: skip
    read = {name: text for name, text in constants.items() if re.search(rf"\bself\.{name}\b", lines)}
    return Graph(
        tuple(read.items()), tuple(inputs.items()), tuple(rows), tuple(outputs), dynamic_batch, (),
        frozenset(defects.split()), 0,
    )  # fmt: skip


# How each activation is written; the kernels take the first group, or some of them do.
UNARIES = (
    "torch.relu({0})", "F.hardtanh({0}, -0.5, 1.25)", "F.relu6({0})", "torch.clamp({0}, -1, 2)",
    "torch.clamp({0}, min=0)", "torch.clamp({0}, max=1.5)", "F.hardswish({0})", "F.silu({0})", "F.gelu({0})",
    'F.gelu({0}, approximate="tanh")', "F.leaky_relu({0}, 0.1)", "torch.tanh({0})", "{0} * torch.sigmoid({0})",
    "F.hardsigmoid({0}) * {0}",
    "torch.sigmoid({0})", "F.hardsigmoid({0})", "F.elu({0})", "F.mish({0})", "torch.abs({0})", "torch.neg({0})",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class _Grid:
    """The arguments of a quantize, as text and as numbers."""

    scale: str
    zero_point: str
    quant_min: int
    quant_max: int
    dtype: torch.dtype

    def text(self) -> str:
        return f"{self.scale}, {self.zero_point}, {self.quant_min}, {self.quant_max}, {self.dtype}"


class _Draft:
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
        self.grids: dict[str, tuple[str, _Grid]] = {}  # a dequantized value's integers and their parameters
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
        setattr(self.held, name, eval(expression, _HELPERS))
        return f"self.{name}"

    def seed(self) -> int:
        return len(self.constants)

    def emit(self, expression: str, *operands: str, is_float: bool = True) -> str:
        """Writes a line that computes `expression`; the names in `operands` count as read."""
        name = f"v{len(self.values)}"
        value = eval(expression, {**_HELPERS, **self.values, "self": self.held})
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
        if self.dtype(name) == dtype or not _fits(self.values[name], dtype):
            return name
        self.kinds.append(f"{self.dtype(name)} to {dtype}".replace("torch.", ""))
        converted = self.emit(f"{name}.to({dtype})", name)
        if name in self.grids:
            self.grids[converted] = self.grids[name]
        return converted

    def _input(self, name: str, expression: str) -> None:
        self.inputs.append((name, expression))
        self.values[name] = eval(expression.replace("SEED", str(len(self.inputs) - 1)), _HELPERS)

    # --- quantization

    def grid(self, low: float, high: float, *kinds: str) -> _Grid:
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
        return _Grid(scale_text, zero_text, quant_min, quant_max, dtype)

    def quantized(self, name: str, grid: _Grid | None = None) -> str:
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

    def dequantized(self, integers: str, grid: _Grid) -> str:
        dtype = self.pick(*self.types)
        # float16 might not hold the numbers; `typed` looks at them.
        out_dtype = ", out_dtype=torch.bfloat16" if dtype == torch.bfloat16 and self.chance(50) else ""
        name = self.emit(f"q.dequantize_per_tensor({integers}, {grid.text()}{out_dtype})", integers)
        self.grids[name] = (integers, grid)
        if out_dtype:
            self.kinds.append("dequantize to bfloat16")
        return self.typed(name, dtype)

    @property
    def quantized_from(self) -> dict[str, str]:
        return self.__dict__.setdefault("_quantized_from", {})

    def activation(self, name: str, *, convolved: bool = False) -> tuple[str, _Grid | None]:
        """What a product reads: a dequantized value as a rule, unsigned as a rule where it is `convolved`."""
        if 0 in self.values[name].shape:
            self.defects.add("NO_KERNEL")
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
                name = self.quantized(name, _Grid("0.03", "64", 0, 127, torch.uint8))
        return name, self.grids[name][1]

    def weight(self, shape: tuple[int, ...], grid: _Grid | None, dtype: torch.dtype, *, axis: int = 0) -> str:
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

    def note_saturation(self, grid: _Grid | None, limit: str) -> None:
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

    # --- steps; each writes some lines, or none where nothing fits

    def convolution(self, name: str | None = None, *, same_shape: bool = False) -> str | None:
        name = name or self.rank(3, 4, 4, 5)
        if name is None or 0 in self.values[name].shape[1:]:
            return None
        name, grid = self.activation(name, convolved=True)
        _, channels, *image = self.values[name].shape
        groups = self.pick(1, 1, 1, *[g for g in (2, 3, channels) if channels % g == 0])
        outputs = channels if same_shape else groups * self.pick(1, 2, 3, 4, 8, 17)
        kernel = [self.pick(1, 3) if same_shape else self.number(1, min(3, size)) for size in image]
        stride = 1 if same_shape else self.pick(1, 1, 2, 3)
        padding = [k // 2 if same_shape else self.number(0, 2) for k in kernel]
        dilation = 1 if same_shape or not all(s + 2 * p > 2 * (k - 1) for s, p, k in zip(image, padding, kernel, strict=True)) \
            else self.pick(1, 1, 2)  # fmt: skip
        lone = any(
            p > dilation * (k - 1) or (p > 0 and size < dilation)
            for p, k, size in zip(padding, kernel, image, strict=True)
        )
        if lone or (channels == groups > 1 and outputs > 16 * groups):
            self.defects.add("NO_KERNEL")  # the library's kernels may err
        weight = self.weight((outputs, channels // groups, *kernel), grid, self.dtype(name))
        bias = self.bias(outputs, self.dtype(name))
        rank = len(image)
        self.note("depthwise" if groups == channels > 1 else f"conv{rank}d", name)
        arguments = f"{name}, {weight}, {bias}, {stride}, {tuple(padding)}, {dilation}, {groups}"
        return self.emit(f"F.conv{rank}d({arguments})", name)

    def note(self, kind: str, x: str) -> None:
        """A product that reads `x`."""
        self.kinds.append(
            kind if self.dtype(x) == torch.float32 else f"{kind} in {self.dtype(x)}".replace("torch.", "")
        )
        self.products += 1

    def linear(self, name: str | None = None, *, same_shape: bool = False) -> str | None:
        name = name or self.choose(lambda shape: len(shape) >= 1 and shape[-1] > 0)
        if name is None:
            return None
        name, grid = self.activation(name)
        width = self.values[name].shape[-1]
        outputs = width if same_shape else self.pick(1, 2, 3, 8, 16, 17, 32)
        self.note_small(self.values[name].numel() // width, width, outputs)
        weight = self.weight((outputs, width), grid, self.dtype(name))
        self.note(f"linear {self.values[name].dim()}d", name)
        return self.emit(f"F.linear({name}, {weight}, {self.bias(outputs, self.dtype(name))})", name)

    def matrix_product(self) -> str | None:
        name = self.choose(lambda shape: len(shape) in (2, 3) and shape[-1] > 0)
        if name is None:
            return None
        name, grid = self.activation(name)
        *rows, width = self.values[name].shape
        outputs = self.pick(1, 2, 5, 16)
        operator = self.pick(*(("mm", "addmm") if len(rows) == 1 else ("bmm", "baddbmm")), "matmul")
        self.note_small(rows[-1], width, outputs)
        weight = self.weight((width, outputs), grid, self.dtype(name), axis=1)
        if operator in ("bmm", "baddbmm"):
            weight = f"{weight}.expand({name}.shape[0], {width}, {outputs})"
        self.note(operator, name)
        if operator in ("addmm", "baddbmm"):
            added = self.vector(self.pick((outputs,), (1, outputs), (1,)), self.dtype(name))
            return self.emit(f"torch.{operator}({added}, {name}, {weight})", name)
        return self.emit(f"torch.{operator}({name}, {weight})", name)

    def transposed(self) -> str | None:
        name = self.rank(4)
        if name is None or 0 in self.values[name].shape:
            return None
        name, grid = self.activation(name)
        channels = self.values[name].shape[1]
        weight = self.weight((channels, 3, 2, 2), grid, self.dtype(name), axis=1)
        self.defects |= {"NO_KERNEL", "NOT_QUANTIZED"}
        self.note("transposed convolution", name)
        return self.emit(f"F.conv_transpose2d({name}, {weight}, None, 2)", name)

    def product_of_two(self) -> str | None:
        name = self.rank(3)
        if name is None:
            return None
        name, other = self.quantized(name), self.quantized(name)
        if self.dtype(name) != self.dtype(other):
            name, other = self.typed(name, torch.float32), self.typed(other, torch.float32)
        self.defects |= {"NO_KERNEL", "NOT_QUANTIZED", "WEIGHT_NOT_CONSTANT"}
        self.note("bmm of two activations", name)
        return self.emit(f"torch.bmm({name}, {other}.transpose(1, 2))", name, other)

    def unary(self, name: str | None = None) -> str | None:
        name = name or self.choose()
        assert name is not None
        text = self.pick(*UNARIES)
        self.kinds.append(text.format("x"))
        return self.emit(text.format(name), name)

    def addition(self) -> str | None:
        name = self.choose()
        assert name is not None
        same = [n for n in self.floats if n != name and self.values[n].shape == self.values[name].shape]
        other = self.pick(*reversed(same)) if same and self.chance(85) else name
        kind = self.pick(*["plain"] * 6, "reversed", "alpha", "number", "broadcast", "minus")
        self.kinds.append(f"add: {'same tensor twice' if other == name else kind}")
        if kind == "number":
            return self.emit(f"{name} + {self.pick(1.5, 0, -2)}", name)
        if kind == "broadcast":
            other = self.broadcast(name)
        if self.chance(40) and kind != "broadcast":
            other = self.quantized(other)
        first, second = (other, name) if kind == "reversed" else (name, other)
        text = {"alpha": f"torch.add({first}, {second}, alpha=0.5)", "minus": f"{first} - {second}"}
        return self.emit(text.get(kind, f"{first} + {second}"), first, second)

    def broadcast(self, name: str) -> str:
        """An operand whose shape broadcasts to that of `name`: a constant, or another value."""
        shape = tuple(self.values[name].shape)
        fitting = self.choose(lambda s: s != shape and len(s) <= len(shape) and all(
            a in (1, b) for a, b in zip(reversed(s), reversed(shape), strict=False)))  # fmt: skip
        if fitting is not None and self.chance(50):
            return fitting
        small = self.pick((1,), shape[-1:], tuple(s if i == 1 else 1 for i, s in enumerate(shape)))
        return self.vector(small, self.pick(*self.types))

    def multiplication(self) -> str | None:
        name = self.choose()
        assert name is not None
        other = (
            self.choose(lambda shape: shape == tuple(self.values[name].shape))
            if self.chance(50)
            else self.broadcast(name)
        )
        self.kinds.append("mul")
        return self.emit(f"{name} * {other}", name, other or "")

    def residual(self) -> str | None:
        """Two branches of one shape, added: both products, or one and what it started from."""
        name = self.choose(lambda shape: 2 <= len(shape) <= 5 and 0 not in shape[1:])
        if name is None:
            return None
        start = self.quantized(name) if self.chance(80) else name
        product = self.convolution if self.values[name].dim() >= 3 and self.chance(70) else self.linear
        first = product(start, same_shape=True)
        assert first is not None
        if self.chance(40):
            first = self.unary(first) if self.chance(40) else self.quantized(first)
        assert first is not None
        other: str | None = start
        if self.chance(60):
            other = product(self.pick(start, first), same_shape=True)
            assert other is not None
            if self.chance(40):
                other = self.quantized(other)
        assert other is not None
        left, right = (first, other) if self.chance(50) else (other, first)
        self.kinds.append("residual")
        total = self.emit(f"{left} + {right}", left, right)
        if self.chance(50):
            total = self.emit(f"torch.relu({total})", total)
        if self.chance(60):
            total = self.quantized(total)
        if self.chance(20):
            self.emit(f"{self.pick(first, other)} * 2.0", first)
        return total

    def accumulated(self) -> str | None:
        """A product added to an accumulator that is needed elsewhere, or does not lie in memory as the product does."""
        name = self.choose(lambda shape: 2 <= len(shape) <= 4 and 0 not in shape)
        if name is None:
            return None
        start = self.unsigned(name)
        shape = tuple(self.values[start].shape)
        product = self.convolution if len(shape) == 4 and self.chance(80) else self.linear
        kind = self.pick("read later", "input", "view", "own input", "contiguous", "channels last", "two sums", "chain")
        same = [n for n in self.floats if tuple(self.values[n].shape) == shape]
        source = self.input(shape, integers=60) if kind == "input" else start if kind == "own input" else \
            product(start, same_shape=True) if self.chance(40) else self.pick(*reversed(same))  # fmt: skip
        assert source is not None
        laid_out = self.laid_out(source, kind)
        accumulator = self.unsigned(laid_out) if self.chance(50) else laid_out
        self.kinds.append(f"sum: {kind}")
        total = self.sum_of(product, start, accumulator)
        if kind == "two sums":
            self.sum_of(product, start, accumulator)
        if kind == "chain":
            self.sum_of(product, total, total)
        if kind == "read later" or self.chance(20):
            self.read_later(self.pick(accumulator, laid_out, source))
        return total

    def unsigned(self, name: str) -> str:
        """The value quantized to uint8 as a rule, since sums in place take no other type."""
        if self.chance(20):
            return self.quantized(name)
        value = self.values[name]
        return self.quantized(
            name, self.grid(float(value.min()), float(value.max()), "seven bits", "seven bits", "narrow")
        )

    def laid_out(self, source: str, kind: str) -> str:
        """The value in another layout, or as a view, of its own shape."""
        rank = self.values[source].dim()
        if kind == "contiguous":
            return self.emit(f"({source} * 0.5).contiguous()", source)
        if kind == "channels last" and rank == 4:
            return self.emit(f"({source} * 0.5).contiguous(memory_format=torch.channels_last)", source)
        if kind != "view":
            return source
        text = self.pick(
            f"torch.cat([{source}, {source}], 1)[:, {self.values[source].shape[1]}:]",
            f"torch.stack([{source}, {source}], 1).select(1, 0)",
            f"{source}[:, :1].expand{tuple(self.values[source].shape)}" if not self.dynamic_batch else None,
            f"{source}.flatten(1).reshape({source}.shape)",
            f"{source}.unsqueeze(1).squeeze(1)",
        )
        return self.emit(text or f"{source}.flatten(1).reshape({source}.shape)", source)

    def sum_of(self, product: Callable[..., str | None], start: str, accumulator: str) -> str:
        first = product(start, same_shape=True)
        assert first is not None
        left, right = (first, accumulator) if self.chance(50) else (accumulator, first)
        total = self.emit(f"{left} + {right}", left, right)
        if self.chance(40):
            total = self.emit(f"torch.relu({total})", total)
        return self.unsigned(total) if self.chance(60) else total

    def read_later(self, name: str) -> None:
        integers, grid = self.grids.get(name, (None, None))
        if integers is not None and grid is not None and self.chance(60):
            # Another scale, else one dequantize is made of both; a number or a tensor as the zero point is, since no
            # operator takes one of each.
            scale = "0.05" if isinstance(eval(grid.zero_point, {"self": self.held}), int) else \
                self.constant("torch.tensor(0.05)")  # fmt: skip
            self.dequantized(integers, dataclasses.replace(grid, scale=scale))
        else:
            self.emit(f"{name} * 2.0", name)

    def movement(self) -> str | None:
        name = self.choose()
        assert name is not None
        shape = tuple(self.values[name].shape)
        first = 1 if self.dynamic_batch else 0  # the batch stays in front where its size is not known
        axes = list(range(first, len(shape)))
        if not axes:
            return None
        axis, n = self.pick(*axes), f"{name}.shape[0]"
        rows = ", ".join(map(str, shape[2:]))
        order = [0] * first + self.permuted(axes)
        options = {
            "flatten": f"{name}.flatten(1)" if len(shape) > 2 else None,
            "permute": f"{name}.permute({tuple(order)})",
            "transpose": f"{name}.transpose({axis}, {self.pick(*axes)})",
            "slice": f"{name}[{':, ' * axis}{self.number(0, max(shape[axis] - 1, 0))}:]",
            "strided slice": f"{name}[{':, ' * axis}::2]",
            "select": f"{name}.select({axis}, 0)" if len(shape) > 2 and shape[axis] else None,
            "unsqueeze": f"{name}.unsqueeze({axis})" if len(shape) < 5 else None,
            "squeeze": f"{name}.squeeze({axis})" if len(shape) > 2 and shape[axis] == 1 else None,
            "flip": f"torch.flip({name}, ({axis},))",
            "roll": f"torch.roll({name}, 1, {axis})",
            "index_select": f"torch.index_select({name}, {axis}, {self.pick('INDEX')})" if shape[axis] else None,
            "pad": f"F.pad({name}, (1, 2), value={self.pick(0.0, 0.0, 0.5)})",
            "pad two": f"F.pad({name}, (1, 0, 0, 1))" if len(shape) > 2 else None,
            "expand": f"{name}.expand({n}, 3{', -1' * (len(shape) - 2)})" if len(shape) > 1 and shape[1] == 1 else None,
            "repeat": f"{name}.repeat(1{', 2' * (len(shape) - 1)})" if len(shape) in (2, 3) else None,
            "reshape": f"{name}.reshape({n}, -1, {shape[-1]})" if len(shape) > 2 and shape[-1] and 0 not in shape else None,
            "nearest": f"F.interpolate({name}, scale_factor=2.0)" if len(shape) == 4 and 0 not in shape else None,
            "pixel_shuffle": f"F.pixel_shuffle({name}, 2)" if len(shape) == 4 and shape[1] % 4 == 0 else None,
            "channel_shuffle": f"{name}.reshape({n}, 2, -1, {rows}).transpose(1, 2).reshape({n}, -1, {rows})"
                if len(shape) == 4 and shape[1] % 2 == 0 and 0 not in shape else None,
        }  # fmt: skip
        kind = self.pick(*[key for key, text in options.items() if text])
        self.kinds.append(kind)
        text = options[kind]
        assert text is not None
        if "INDEX" in text:
            index = self.constant(f"integers({self.seed()}, (3,), 0, {shape[axis] - 1}, torch.int64)")
            text = text.replace("INDEX", index)
        return self.emit(text, name)

    def split(self) -> str | None:
        first = 1 if self.dynamic_batch else 0
        name = self.choose(lambda shape: len(shape) > first and max(shape[first:]) > 1)
        if name is None:
            return None
        shape = self.values[name].shape
        axis = self.pick(*[i for i in range(first, len(shape)) if shape[i] > 1])
        sizes = [shape[axis] // 2, shape[axis] - shape[axis] // 2]
        text = self.pick(f"torch.split({name}, {sizes}, {axis})", f"torch.chunk({name}, 2, {axis})")
        parts = self.emit(text, name, is_float=False)
        self.read.add(parts)
        self.kinds.append("split")
        results = [self.emit(f"{parts}[{i}]", parts) for i in range(len(self.values[parts]))]
        if self.chance(40):
            return [self.quantized(part) for part in results][-1]
        return results[-1]

    def join(self) -> str | None:
        name = self.choose(lambda shape: len(shape) > 0)
        if name is None:
            return None
        first = 1 if self.dynamic_batch else 0
        shape = tuple(self.values[name].shape)
        if len(shape) <= first:
            return None
        axis = self.pick(*range(first, len(shape)))
        fits = lambda s: (
            len(s) == len(shape) and all(a == b or i == axis for i, (a, b) in enumerate(zip(s, shape, strict=True)))
        )  # noqa: E731
        names = [name, *(self.choose(fits) or name for _ in range(self.number(1, 2)))]
        if self.chance(60):
            grid = None
            for position, part in enumerate(names):
                names[position] = self.quantized(part, grid)
                if grid is None and self.chance(70):
                    grid = self.grids[names[position]][1]
        equal = len({tuple(self.values[n].shape) for n in names}) == 1
        kind = self.pick("cat", "stack") if equal and len(shape) < 5 else "cat"
        self.kinds.append(kind)
        return self.emit(f"torch.{kind}([{', '.join(names)}], {axis})", *names)

    def pool(self) -> str | None:
        name = self.choose(lambda shape: len(shape) in (3, 4, 5) and 0 not in shape)
        if name is None:
            return None
        image = self.values[name].shape[2:]
        rank = len(image)
        kernel = self.number(1, min(3, *image))
        kind = self.pick("max", "max", "avg", "adaptive_avg", "mean")
        self.kinds.append(f"{kind} pool {rank}d")
        if kind == "mean":
            return self.emit(f"torch.mean({name}, {tuple(range(2, 2 + rank))}, keepdim={self.pick(True, False)})", name)
        if kind == "adaptive_avg":
            return self.emit(f"F.adaptive_avg_pool{rank}d({name}, {self.pick(1, 2)})", name)
        if self.chance(50):
            name = self.quantized(name)
        if kind == "avg" and rank == 3:
            name = self.typed(name, torch.float32)  # eager mode has no other
        stride, padding = self.pick(1, 2, kernel), self.number(0, kernel // 2)
        return self.emit(f"F.{kind}_pool{rank}d({name}, {kernel}, {stride}, {padding})", name)

    def requantize(self) -> str | None:
        name = self.choose()
        assert name is not None
        return self.quantized(name, None if self.chance(50) else self._fresh_grid(name))

    def _fresh_grid(self, name: str) -> _Grid:
        value = self.values[name]
        return self.grid(float(value.min()), float(value.max())) if value.numel() else self.grid(-1.0, 1.0)


_STEPS = (
    *["convolution"] * 6, *["linear"] * 4, *["matrix_product"] * 2, *["unary"] * 4, *["addition"] * 4,
    *["residual"] * 4, *["accumulated"] * 4, *["movement"] * 4, "split", *["join"] * 2, *["pool"] * 2, "multiplication",
    *["requantize"] * 4, "transposed", "product_of_two",
)  # fmt: skip


@st.composite
def graphs(draw: Any) -> Graph:
    """Random graphs as a hypothesis strategy."""
    return drawn(lambda low, high: draw(st.integers(low, high)))


def random_graph(generator: random.Random) -> Graph:
    """A random graph, drawn evenly; what hypothesis draws repeats itself, so that it can be made small."""
    return drawn(generator.randint)


def drawn(number: Callable[[int, int], int], most_steps: int = 7) -> Graph:
    """A graph; it has at least one operator, and everything it computes is an output or is used."""
    draft = _Draft(number)
    batch = draft.pick(2, 3) if draft.dynamic_batch else 0 if draft.chance(3) else draft.pick(2, 1, 3)
    rank = draft.pick(4, 4, 4, 2, 3, 5)
    channels = draft.pick(4, 1, 2, 3, 8, 13, 16)
    image = {
        2: (),
        3: (draft.number(1, 11),),
        4: (draft.number(1, 7), draft.number(1, 7)),
        5: (3, draft.number(1, 4), 3),
    }[rank]
    for _ in range(draft.pick(1, 1, 2)):
        draft.input((batch, channels, *image))
    for _ in range(draft.number(1, most_steps)):
        step = draft.pick(*_STEPS)
        before = len(draft.floats)
        getattr(draft, step)()
        # What grew too large to be run quickly, or left the range of float32, is nothing to build on.
        draft.floats = (
            draft.floats[:before] + [n for n in draft.floats[before:] if _usable(draft.values[n])] or draft.floats
        )
    return _finished(draft)


def _usable(value: torch.Tensor) -> bool:
    return value.numel() <= MOST_ELEMENTS and _fits(value, value.dtype)


def _fits(value: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether numbers of about this size are far from the ends of what the type holds."""
    small, large = (1e-4, 1e3) if dtype == torch.float16 else (1e-12, 1e6)
    return bool(((value == 0) | ((value.abs() < large) & (value.abs() > small))).all())


def _finished(draft: _Draft) -> Graph:
    names = [line.split(" = ")[0] for line in draft.lines]
    leaves = [name for name in names if name not in draft.read]
    more = [
        name
        for name in names
        if name in draft.read and not isinstance(draft.values[name], (tuple, list)) and draft.chance(8)
    ]
    outputs = leaves + more
    if not names:
        line = f"v{len(draft.values)} = torch.relu({draft.floats[-1]})"
        draft.lines.append(line)
        outputs = [line.split(" = ")[0]]
    return Graph(
        tuple(draft.constants), tuple(draft.inputs), tuple(draft.lines), tuple(outputs), draft.dynamic_batch,
        tuple(draft.kinds), frozenset(draft.defects), draft.products,
    )  # fmt: skip
