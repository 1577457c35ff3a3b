"""Cats and pools of int8 images: what is computed at its place in another image, and what is copied there."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from inductor_x86q import cpu, testing
from inductor_x86q.kernels.arguments import FIELDS
from inductor_x86q.testing import QConv2d, quantize_dequantize

QD = quantize_dequantize
MODE = "max-autotune"
needs_avx2 = pytest.mark.skipif(not cpu.int8_lanes(), reason="kernels are generated for CPUs with AVX2")


def copies(code: str) -> list[tuple[int, int]]:
    """The channels that kernels copy to the result of a cat: from where on, and how many."""
    return [(int(start), int(count)) for start, count in re.findall(r"memcpy\(to \+ (\d+), \w+, (\d+)\)", code)]


def out_pixels(code: str) -> list[int]:
    calls = re.findall(r"X86qArguments arguments = {(.*)};", code)
    return [int(call.split(", ")[list(FIELDS).index("out_pixel")]) for call in calls]


def joined(*images: torch.Tensor) -> torch.Tensor:
    return QD(torch.cat(images, 1))


class Branches(nn.Module):
    """What an inception block is: convolutions, whole and depthwise, of one image, side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = QConv2d(16, 20, 1), QConv2d(71, 8, 1)
        self.one, self.two, self.three = (
            QConv2d(20, 11, 1),
            QConv2d(20, 20, 3, padding=1, groups=20),
            QConv2d(20, 40, 3, padding=1),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = QD(self.first(QD(x)))
        both = joined(QD(self.one(x)), QD(self.two(x)), QD(self.three(x).relu()))
        return self.last(both)


@needs_avx2
def test_layers_write_their_part_of_the_result(only_generated: None, one_blocking: Any) -> None:
    one_blocking(0)
    x = torch.randn(2, 16, 7, 6)
    q = testing.qdq_graph(Branches(), (x,))
    compiled = testing.assert_close_to_reference(q, (x,), mode=MODE)
    assert not copies(compiled.code) and "aten.cat" not in compiled.code
    assert sorted(out_pixels(compiled.code)) == [8, 20, 71, 71, 71]


class Dense(nn.Module):
    """Each layer reads what all before it gave."""

    def __init__(self) -> None:
        super().__init__()
        self.first = QConv2d(8, 12, 1)
        self.layers = nn.ModuleList(QConv2d(12 + 10 * i, 10, 3, padding=1) for i in range(4))
        self.last = QConv2d(52, 8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        images = [QD(F.max_pool2d(QD(self.first(QD(x))), 3, 2))]
        for layer in self.layers:
            images.append(QD(layer(joined(*images) if len(images) > 1 else images[0])))
        return self.last(joined(*images))


@needs_avx2
def test_a_cat_grows_in_place(only_generated: None, one_blocking: Any) -> None:
    """One image of 52 channels holds all."""
    one_blocking(0)
    x = torch.randn(1, 8, 15, 13)
    q = testing.qdq_graph(Dense(), (x,))
    compiled = testing.assert_close_to_reference(q, (x,), mode=MODE)
    assert not copies(compiled.code)
    assert sorted(out_pixels(compiled.code)) == [8, 12, 52, 52, 52, 52]


def test_a_cat_grows_by_what_is_new_where_calls_are_kept() -> None:
    x = torch.randn(1, 8, 15, 13)
    q = testing.qdq_graph(Dense(), (x,))
    compiled = testing.assert_close_to_reference(q, (x,), options={"kernels": "onednn"})
    assert copies(compiled.code) == [(12, 10), (22, 10), (32, 10), (42, 10)]  # the pool is computed where it belongs
    assert compiled.calls["cat"] == 0


class Elsewhere(nn.Module):
    """Images that something reads when the cat's own readers may be done, or that show, or that the cat has twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.shown, self.late, self.twice = (QConv2d(8, 6, 1) for _ in range(4))
        self.after, self.end = QConv2d(6, 6, 3, padding=1), QConv2d(30, 6, 1)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x = QD(x)
        first, late, twice = QD(self.first(x)), QD(self.late(x) - 1), QD(self.twice(x) + 1)
        shown = torch.ops.quantized_decomposed.quantize_per_tensor.default(self.shown(x), 0.02, 60, 0, 127, torch.uint8)
        visible = torch.ops.quantized_decomposed.dequantize_per_tensor.default(shown, 0.02, 60, 0, 127, torch.uint8)
        y = QD(self.end(joined(first, visible, late, twice, twice)))
        return self.after(late) + y, shown, QD(self.after(QD(y + late)))


@pytest.mark.parametrize("mode", [None, MODE])
def test_images_that_outlive_the_cat(mode: str | None) -> None:
    x = torch.randn(1, 8, 9, 8)
    q = testing.qdq_graph(Elsewhere(), (x,))
    compiled = testing.assert_close_to_reference(q, (x,), mode=mode, step=0.02)
    assert set(copies(compiled.code)) >= {(6, 6), (12, 6), (18, 6), (24, 6)}


class Overwritten(nn.Module):
    """A sum may write into the first cat, whose images another cat has as well."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = QConv2d(8, 6, 1), QConv2d(8, 10, 1), QConv2d(16, 12, 1), QConv2d(12, 16, 1)
        self.last = QConv2d(32, 8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = QD(x)
        a, b = QD(self.a(x)), QD(self.b(x))
        both = joined(a, b)
        total = QD(self.d(QD(self.c(both))) + both)
        return self.last(joined(a, b, total))


@pytest.mark.parametrize("mode", [None, MODE])
def test_a_cat_that_is_overwritten_is_not_added_to(mode: str | None) -> None:
    x = torch.randn(1, 8, 9, 8)
    testing.assert_close_to_reference(testing.qdq_graph(Overwritten(), (x,)), (x,), mode=mode)


class Others(nn.Module):
    """Slices, signed integers, planes, rows of an image, another dimension, and what is left to Inductor."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.read = QConv2d(8, 16, 1), QConv2d(14, 4, 1)

    def forward(self, x: torch.Tensor, planes: torch.Tensor) -> list[torch.Tensor]:
        image = QD(self.first(QD(x)))
        slices = self.read(joined(image[:, 3:10], image[:, 9:], QD(planes)[:, :0]))
        mixed = self.read(joined(image[:, ::2, 1:, 1:], QD(planes)[:, :, 1:, 1:], QD(planes)[:, :3, 1:, 1:]))
        signed = [QD(y, dtype=torch.int8, quant_min=-64, quant_max=63, zero_point=3) for y in (x, planes)]
        above = QD(torch.cat([image, image], 2))
        return [slices, mixed, torch.cat(signed, 1), self.read(above[:, :14])]


@pytest.mark.parametrize("mode", [None, MODE])
def test_other_images(mode: str | None) -> None:
    inputs = torch.randn(2, 8, 5, 6), torch.randn(2, 3, 5, 6)
    testing.assert_close_to_reference(testing.qdq_graph(Others(), inputs), inputs, mode=mode, step=0.02)


def test_an_open_batch_is_left_to_inductor() -> None:
    x = torch.randn(2, 16, 7, 6)
    q = testing.qdq_graph(Branches(), (x,), dynamic_shapes=({0: torch.export.Dim.AUTO},))
    torch._dynamo.mark_dynamic(x, 0)
    compiled = testing.assert_close_to_reference(q, (x,))
    assert compiled.calls["cat"] == 1
    testing.assert_same(compiled.run(more := torch.randn(3, 16, 7, 6)), q(more))


# channels, size, and kernel size, stride, padding, dilation and ceil mode
POOLS: tuple[tuple[int, tuple[int, int], tuple[Any, ...]], ...] = (
    (24, (9, 8), (3, 2, 1, 1, False)),
    (70, (7, 9), ((3, 2), (2, 1), (1, 0), 1, True)),
    (3, (11, 5), (2, 2, 0, 1, False)),
    (64, (6, 6), (5, 1, 2, 1, False)),
    (1, (9, 9), (3, 2, 1, 2, True)),
    (130, (5, 6), (3, 2, 0, 1, True)),
    (8, (2, 4), (2, 1, 1, (3, 1), False)),  # its windows lie beside the image
)


class Pools(nn.Module):
    def forward(self, images: list[torch.Tensor]) -> list[torch.Tensor]:
        results = []
        for image, (_, _, window) in zip(images, POOLS, strict=True):
            results.append(QD(F.max_pool2d(QD(image), *window)) + 1)
        part = QD(images[1])[1:, 5:60:3, 1:, ::2]
        return [*results, QD(F.max_pool2d(part, 2, 1)) + 1]


@pytest.mark.parametrize("mode", [None, MODE])
def test_pools(mode: str | None) -> None:
    images = [torch.randn(2, channels, *size) for channels, size, _ in POOLS]
    q = testing.qdq_graph(Pools(), (images,))
    compiled = testing.compile_once(q, (images,), mode=mode)
    for actual, expected in zip(compiled.outputs, q(images), strict=True):
        assert torch.equal(actual, expected)
    assert "quantized::max_pool2d" not in compiled.code
    assert compiled.code.count("most = value > most") == len(POOLS) + 1


def averaged(x: torch.Tensor, *window: Any, scale: float = 0.0131, **quantize: Any) -> torch.Tensor:
    return QD(F.avg_pool2d(x, *window), scale, **quantize)


class Averages(nn.Module):
    """Average pools that are a kernel of ours: of which images, and windows, and types."""

    COUNT = 8

    def forward(self, x: torch.Tensor, few: torch.Tensor) -> list[torch.Tensor]:
        many, few = QD(x), QD(few, 0.03, 60)
        signed = QD(x, 0.02, -3, dtype=torch.int8, quant_min=-128, quant_max=127)
        return [
            averaged(many, 3, 1, 1),
            averaged(many, 3, 1, 1, scale=0.02),  # its input's: no sum of nine lies at a tie
            averaged(few, (3, 2), (1, 2), (1, 0), False, False),
            averaged(few, 2, 2, 0, False, True, 3),
            averaged(many, 3, 2, 0, True, scale=0.0011),  # many of them saturate
            averaged(signed, 5, 2, 2, zero_point=3, dtype=torch.int8, quant_min=-64, quant_max=63),
            averaged(signed, 2, 1, scale=0.017, zero_point=60),
            averaged(many[:, 5:60:3, 1:, ::2], 2, 1),
        ]


@pytest.mark.parametrize("mode", [None, MODE])
def test_average_pools(mode: str | None) -> None:
    x = torch.randn(2, 70, 9, 11), torch.randn(2, 5, 8, 8)
    q = testing.qdq_graph(Averages(), x)
    compiled = testing.compile_once(q, x, mode=mode)
    for actual, expected in zip(compiled.outputs, q(*x), strict=True):
        assert torch.equal(actual, expected)
    assert compiled.code.count("both += pairs") == Averages.COUNT


LEFT_TO_INDUCTOR: dict[str, tuple[tuple[int, ...], Any]] = {
    "results at ties": ((2, 8, 6, 6), lambda x: averaged(QD(x, 0.02), 2, scale=0.02)),
    "windows beyond the padding": ((2, 8, 6, 6), lambda x: averaged(QD(x), 3, 2, 0, True)),
    "three channels": ((2, 3, 6, 6), lambda x: averaged(QD(x), 3)),
    "one image": ((8, 6, 6), lambda x: averaged(QD(x), 3)),
    "a large window": ((1, 8, 20, 20), lambda x: averaged(QD(x), 19)),
    "scales far apart": ((2, 8, 6, 6), lambda x: averaged(QD(x, 1e-20), 3, scale=1e15)),
    "reals that are read": ((2, 8, 6, 6), lambda x: (lambda y: QD(y, 0.013) + y)(F.avg_pool2d(QD(x), 3))),
}


class LeftToInductor(nn.Module):
    def forward(self, images: list[torch.Tensor]) -> list[torch.Tensor]:
        return [build(x) for x, (_, build) in zip(images, LEFT_TO_INDUCTOR.values(), strict=True)]


def test_average_pools_that_are_left_to_inductor() -> None:
    images = ([torch.randn(shape) for shape, _ in LEFT_TO_INDUCTOR.values()],)
    compiled = testing.assert_close_to_reference(testing.qdq_graph(LeftToInductor(), images), images, step=0.02)
    assert "both += pairs" not in compiled.code


class Gates(nn.Module):
    """Images whose channels are scaled, as squeeze-and-excitation scales them: by what is computed, by a constant, one pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("constant", torch.rand(1, 32, 1, 1))

    def forward(self, x: torch.Tensor, means: torch.Tensor) -> list[torch.Tensor]:
        image, gate = QD(x), QD(F.hardsigmoid(means), 1 / 255, 0)
        return [QD(gate * image, 0.012), QD(image * self.constant, 0.011), QD(QD(means) * torch.tanh(means))]


def loops_around(code: str, text: str) -> list[int]:
    """How many loops each line with that text is in."""
    lines = code.splitlines()
    depths = []
    for number in (number for number, line in enumerate(lines) if text in line):
        depth, around = 0, lines[number]
        for line in reversed(lines[:number]):
            if line.strip() not in ("", "{") and indentation(line) < indentation(around):
                around, depth = line, depth + line.strip().startswith("for(")
        depths.append(depth)
    return depths


def indentation(line: str) -> int:
    return len(line) - len(line.lstrip())


@pytest.mark.parametrize("is_open", [False, True])
def test_factors_of_channels_are_computed_once(is_open: bool) -> None:
    inputs = torch.randn(2, 32, 6, 5).to(memory_format=torch.channels_last), torch.randn(2, 32, 1, 1)
    n = torch.export.Dim("n", min=2, max=64)
    q = testing.qdq_graph(Gates(), inputs, dynamic_shapes=({0: n}, {0: n}) if is_open else None)
    compiled = testing.compile_once(q, inputs)
    for actual, expected in zip(compiled.outputs, q(*inputs), strict=True):
        assert torch.equal(actual, expected)
    assert loops_around(compiled.code, " / tmp") == [1]  # by six
