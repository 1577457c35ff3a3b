"""The steps by which a random graph grows: each draws one operator, or a few that belong together."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch

from tests.fuzz.catalogue import UNARIES, movements
from tests.fuzz.draft import Grid
from tests.fuzz.recurrent import RecurrentSteps


class Steps(RecurrentSteps):
    """Each method writes some lines, or none where nothing fits; returns its result's name."""

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
        name, grid = self.activation(name, convolved=True)
        if grid is None or grid.dtype == torch.int8:  # its rule leaves these alone
            self.defects.add("NO_KERNEL")
        channels = self.values[name].shape[1]
        kernel, stride, padding, more = self.pick((2, 2, 0, 0), (3, 2, 1, 1), (4, 2, 1, 0), (3, 1, 1, 0), (5, 3, 1, 2))
        groups = self.pick(1, 1, *[g for g in (2, 3) if channels % g == 0])
        weight = self.weight((channels, 3, kernel, kernel), grid, self.dtype(name), axis=1)
        bias = self.bias(3 * groups, self.dtype(name))
        self.note("transposed convolution", name)
        arguments = f"{name}, {weight}, {bias}, {stride}, {padding}, {more}, {groups}"
        return self.emit(f"F.conv_transpose2d({arguments})", name)

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

    def attention(self) -> str | None:
        name = self.rank(3, 4)
        if name is None or 0 in self.values[name].shape or self.types != (torch.float32,):
            return None
        low, high = (float(end) for end in self.values[name].aminmax())
        sources = (name, self.emit(f"torch.flip({name}, (-2,))", name), name)
        if self.chance(40):
            operands = [
                self.quantized_at_run_time(source, rows=True, by_matrix=position == 2)[0]
                for position, source in enumerate(sources)
            ]
            self.note("attention of rows", name)
        else:
            grids = [self.grid(low, high, "seven bits", "eight bits", "narrow") for _ in sources]
            operands = [self.quantized(source, grid) for source, grid in zip(sources, grids, strict=True)]
            self.note("attention", name)
        scale = float(f"{self.pick(1.0, 4.0, 0.1) / max(abs(low), abs(high), 1e-6) ** 2:.3g}")
        call = f"torch.ops.inductor_x86q.attention({', '.join(operands)}, None, {self.chance(30)}, {scale})"
        return self.emit(call, *operands)

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
        axis, order = self.pick(*axes), [0] * first + self.permuted(axes)
        options = movements(name, shape, axis, axes, order, self.pick, self.number)
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

    def _fresh_grid(self, name: str) -> Grid:
        value = self.values[name]
        return self.grid(float(value.min()), float(value.max())) if value.numel() else self.grid(-1.0, 1.0)
