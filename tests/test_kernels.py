"""Kernels by themselves, without a graph: exact sums for odd shapes on every instruction set, epilogues, names and sizes."""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from inductor_x86q import cpu
from inductor_x86q.kernels import cost, family, isa
from inductor_x86q.kernels.arguments import FIELDS, STRUCT, arguments
from inductor_x86q.kernels.convolution import Convolution, Depth
from inductor_x86q.kernels.epilogue import ACTIVATIONS, CLAMP, Epilogue, Numbers
from inductor_x86q.kernels.specification import Specification

FLOAT, BFLOAT, U8, S8 = torch.float32, torch.bfloat16, torch.uint8, torch.int8


@dataclasses.dataclass(frozen=True)
class Layer:
    """A convolution's sizes; `planes` says that channels are outermost."""

    n: int
    h: int
    w: int
    c: int
    out_c: int
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    signed: bool = False
    planes: bool = False
    threads: int = 1
    depth: Depth | None = None  # of 3-d ones

    def convolution(self, lanes: int, fits_16: bool) -> Convolution:
        size = self.h * self.w * self.c  # of a plane
        image = size * (self.depth.size if self.depth else 1)
        return Convolution(
            *(self.n, self.h, self.w, self.c, self.out_c, self.kernel, self.stride, self.padding, self.dilation),
            *(self.groups, lanes, self.signed, fits_16),
            x_strides=(image, self.w, 1) if self.planes else (image, self.w * self.c, self.c),
            x_channel=self.h * self.w if self.planes else 1,
            other_pixel=self.out_c,
            threads=self.threads,
            depth=dataclasses.replace(self.depth, x_stride=size) if self.depth else Depth(),
        )


LAYERS = {
    "1x1": Layer(1, 7, 7, 16, 200),
    "fewer pixels than rows": Layer(1, 1, 3, 20, 72),
    "one pixel": Layer(1, 1, 1, 40, 70),
    "no pixel": Layer(0, 5, 5, 16, 16),
    "odd channels": Layer(2, 5, 3, 13, 11),
    "3x3, stride": Layer(2, 7, 9, 19, 40, (3, 3), (2, 2), (1, 1), threads=2),
    "3x3 of three rows": Layer(3, 3, 7, 16, 64, (3, 3), (1, 1), (1, 1)),
    "5x3 of one row": Layer(2, 1, 9, 16, 64, (5, 3), (1, 1), (2, 1)),
    "7x1, dilation": Layer(2, 4, 14, 8, 48, (5, 1), (2, 1), (6, 0), (3, 1)),
    "1x1, stride": Layer(1, 9, 9, 12, 24, (1, 1), (2, 2)),
    "planes of 3": Layer(1, 11, 12, 3, 20, (3, 3), (2, 2), (1, 1), planes=True),
    "planes of 5": Layer(1, 6, 5, 5, 8, (2, 2), planes=True),
    "one channel": Layer(1, 21, 2, 1, 33, (9, 1)),
    "two channels": Layer(1, 4, 6, 2, 9, (2, 3), dilation=(1, 2)),
    "dilation": Layer(1, 9, 8, 6, 9, (3, 3), (1, 1), (2, 2), (2, 2)),
    "groups": Layer(1, 5, 6, 24, 36, (3, 3), (1, 1), (1, 1), groups=4),
    "1-d": Layer(2, 1, 15, 10, 20, (1, 5), (1, 2), (0, 2)),
    "3-d": Layer(2, 4, 5, 9, 40, (3, 2), (1, 2), (1, 0), (1, 2), depth=Depth(6, 3, 2, 1, 1)),
    "3-d, few channels": Layer(1, 4, 5, 3, 20, (1, 3), depth=Depth(4, 2, 1, 0, 2)),
    "s8": Layer(1, 1, 7, 18, 150, signed=True),
    "wide": Layer(1, 3, 11, 70, 96, (1, 3), threads=3),
    "depthwise": Layer(1, 9, 9, 150, 150, (3, 3), (1, 1), (1, 1), groups=150, threads=2),
    "depthwise, few channels": Layer(2, 11, 9, 21, 21, (3, 3), (1, 1), (1, 1), groups=21),
    "depthwise, few pixels": Layer(1, 3, 1, 70, 70, (3, 3), (1, 1), (1, 1), groups=70),
    "depthwise, stride": Layer(1, 9, 9, 33, 33, (5, 3), (2, 2), (2, 1), groups=33),
    "depthwise, a tall window": Layer(1, 25, 3, 33, 33, (21, 1), (1, 1), (10, 0), groups=33),
    "depthwise, a wide window": Layer(1, 2, 80, 16, 16, (1, 3), (1, 1), (0, 36), (1, 36), groups=16),
    "depthwise, dilation": Layer(1, 9, 9, 64, 64, (3, 3), (1, 1), (0, 0), (2, 2), groups=64),
}
# An instruction set, and whether inputs keep 7 bits for it.
MACHINES = [*((name, False) for name in isa.ISAS), ("avx2", True), ("avx512", True)]


def numbers(layer: Layer, **changed: Any) -> Numbers:
    """With which a float output is the sum itself."""
    given = {"x_scale": 1.0, "x_zero_point": 3, "weight_scale": torch.ones(layer.out_c), "bias": None}
    return Numbers(**{**given, **changed})


@functools.cache
def tensors(layer: Layer, fits_16: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Input (n, h, w, c) and weight, of the largest values that there may be; s8 inputs are moved to u8, 8 bits always."""
    generator = torch.Generator().manual_seed(layer.c * 100 + layer.out_c)
    low, high = (-128, 128) if layer.signed else (0, 256)
    largest = 128
    if fits_16:
        low, high, largest = low // 2, high // 2, 64 if layer.signed else 128
    planes, kernel = ((layer.depth.size,), (layer.depth.kernel,)) if layer.depth else ((), ())
    size = (layer.n, *planes, layer.h, layer.w, layer.c)
    x = torch.randint(low, high, size, generator=generator, dtype=S8 if layer.signed else U8)
    shape = (layer.out_c, layer.c // layer.groups, *kernel, *layer.kernel)
    return x, torch.randint(-largest, largest, shape, generator=generator, dtype=S8)


def sums(layer: Layer, x: torch.Tensor, weight: torch.Tensor, zero_point: int = 3) -> torch.Tensor:
    """The convolution's result (n, h, w, c) in exact numbers."""
    image = (x.double() - zero_point).movedim(-1, 1)
    if layer.n == 0:
        return image.new_zeros(0, 1)
    depth = layer.depth
    stride, padding, dilation = (
        ((getattr(depth, name),) if depth else ()) + getattr(layer, name) for name in ("stride", "padding", "dilation")
    )
    function = F.conv3d if depth else F.conv2d
    return function(image, weight.double(), None, stride, padding, dilation, layer.groups).movedim(1, -1).contiguous()


def compile_(kernels: list[family.Kernel], directory: Path, *flags: str) -> ctypes.CDLL:
    from torch._inductor.cpp_builder import get_cpp_compiler

    source, target = directory / "kernels.cpp", directory / "kernels.so"
    source.write_text(family.translation_unit(kernels))
    subprocess.run([get_cpp_compiler(), "-O1", "-shared", "-fPIC", *flags, str(source), "-o", str(target)], check=True)
    return ctypes.CDLL(str(target))


def run(
    library: ctypes.CDLL, kernel: family.Kernel, layer: Layer, conv: Convolution, x: torch.Tensor, weight: torch.Tensor,
    given: Numbers, other: torch.Tensor | None = None, grid: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:  # fmt: skip
    """What a kernel makes of a layer, between guards that it must not touch.

    Args:
        grid: the input's scales and zero points, of a dynamic kernel.
    """
    constants = conv.constants(weight, given, kernel.epilogue)
    assert len(constants) == conv.constants_size
    image = x.movedim(-1, 1).contiguous() if layer.planes else x
    count = conv.pixels * conv.out_c
    out = torch.full((count + 128,), 77).to(kernel.epilogue.output_dtype)
    open_: dict[str, int] = {}
    for name, values in zip(("x_scales", "x_zero_points"), grid or (), strict=False):
        open_ |= {name: values.data_ptr(), f"{name}_step": int(len(values) > 1)}
    sizes = (ctypes.c_int64 * len(FIELDS))(*map(int, arguments(conv, **open_)))
    begin = out.data_ptr() + 64 * out.element_size()
    addresses = image.data_ptr(), constants.data_ptr(), 0 if other is None else other.data_ptr(), begin
    getattr(library, kernel.name)(*map(ctypes.c_void_p, addresses), sizes)
    assert (out[:64] == 77).all() and (out[-64:] == 77).all(), "it wrote beside its output"
    return out[64:-64].view(conv.n, *(conv.out_d,) * bool(layer.depth), conv.out_h, conv.out_w, conv.out_c)


@pytest.fixture(scope="module", params=MACHINES, ids=lambda machine: f"{machine[0]}{'-7bit' * machine[1]}")
def machine(request: pytest.FixtureRequest, tmp_path_factory: Any) -> Iterator[tuple[str, bool, ctypes.CDLL]]:
    """An instruction set, whether sums fit in 16 bits, and all kernels for `LAYERS` on it.

    AVX-VNNI is compiled without its instruction where the CPU lacks it: then the same code adds exactly, two by two.
    """
    name, fits_16 = request.param
    row = isa.ISAS[name]
    flags: tuple[str, ...] = ("-fopenmp",)
    if name == "avx_vnni" and not row.cpu_flags <= set(cpu.instruction_sets()):
        row, flags = isa.ISAS["avx2"], (*flags, *isa.ISAS["avx2"].compiler_flags)
    if not row.cpu_flags <= set(cpu.instruction_sets()):
        pytest.skip(f"this CPU has no {name}")
    kernels = dict.fromkeys(kernel for _, _, kernel in cases(name, fits_16))
    flags = flags if name == "avx_vnni" and len(flags) > 1 else next(iter(kernels)).flags
    yield name, fits_16, compile_(list(kernels), tmp_path_factory.mktemp(name), *flags)


def cases(name: str, fits_16: bool) -> Iterator[tuple[str, Layer, family.Kernel]]:
    """Each layer with one of its kernels, in turns, so that all blocks are there."""
    for number, (title, layer) in enumerate(LAYERS.items()):
        conv = layer.convolution(isa.ISAS[name].lanes, fits_16)
        found = family.candidates(conv, Epilogue(FLOAT), name)
        yield title, layer, found[number % len(found)]


@pytest.mark.parametrize("zero_point", [3, 0])
def test_sums_are_exact(machine: tuple[str, bool, ctypes.CDLL], zero_point: int) -> None:
    """Padding of 0 is left out by whole rows of the kernel, any other is not."""
    name, fits_16, library = machine
    for title, layer, kernel in cases(name, fits_16):
        x, weight = tensors(layer, fits_16)
        conv = layer.convolution(isa.ISAS[name].lanes, fits_16)
        result = run(library, kernel, layer, conv, x, weight, numbers(layer, x_zero_point=zero_point))
        expected = sums(layer, x, weight, zero_point).float()
        assert torch.equal(result, expected.view(result.shape)), f"{title}, {kernel.name}"


EPILOGUES = [
    *(Epilogue(dtype, activation) for dtype in (U8, FLOAT) for activation in sorted(ACTIVATIONS)),
    *(Epilogue(S8, "relu", other) for other in (U8, S8, FLOAT)),
    Epilogue(FLOAT, "none", FLOAT),
    *(Epilogue(BFLOAT, "gelu_erf", other) for other in (None, BFLOAT)),
    *(Epilogue(output, "relu", None, dynamic=True) for output in (FLOAT, U8)),
]
PLAIN = Layer(1, 5, 5, 12, 40)
DEPTHWISE = Layer(1, 5, 5, 70, 70, (3, 3), (1, 1), (1, 1), groups=70)
ACTIVATION = {
    "none": lambda v: v,
    "relu": torch.relu,
    "hardtanh": lambda v: v.clamp(-1.0, 4.0),
    "hardswish": F.hardswish,
    "leaky_relu": lambda v: F.leaky_relu(v, 0.1),
    "swish": F.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "hardsigmoid": F.hardsigmoid,
    "gelu_erf": F.gelu,
    "gelu_tanh": lambda v: F.gelu(v, approximate="tanh"),
}
SCALARS = {"hardtanh": (-1.0, 4.0), "leaky_relu": (0.1,)}


@pytest.mark.parametrize("name", ["avx512_vnni", "avx2"])
@pytest.mark.parametrize("layer", [PLAIN, DEPTHWISE], ids=["plain", "depthwise"])
def test_epilogues(name: str, layer: Layer, tmp_path: Path) -> None:
    """Integers are off by a step at most, where a value lies between two; floats by rounding."""
    row = isa.ISAS[name]
    if not row.cpu_flags <= set(cpu.instruction_sets()):
        pytest.skip(f"this CPU has no {name}")
    epilogues = EPILOGUES if layer is PLAIN else [epilogue for epilogue in EPILOGUES if epilogue.code == CLAMP]
    conv, (x, weight) = layer.convolution(row.lanes, False), tensors(layer, False)
    kernels = [family.candidates(conv, epilogue, name)[-1] for epilogue in epilogues]
    library = compile_(kernels, tmp_path, *kernels[0].flags)
    generator = torch.Generator().manual_seed(0)
    scale = torch.rand(layer.out_c, generator=generator) * 1e-4 + 1e-5
    bias = torch.randn(layer.out_c, generator=generator)
    for epilogue, kernel in zip(epilogues, kernels, strict=True):
        other = torch.randint(0, 100, (1, 5, 5, layer.out_c), generator=generator).to(epilogue.other_dtype or U8)
        grid = (torch.tensor([0.5]), torch.tensor([3], dtype=torch.int32)) if epilogue.dynamic else None
        given = numbers(
            layer, weight_scale=scale, bias=bias, scale=0.03, zero_point=5, other_scale=0.01, other_zero_point=50,
            activation=SCALARS.get(epilogue.activation, ()),
        )  # fmt: skip
        result = run(library, kernel, layer, conv, x, weight, given, other, grid)
        value = sums(layer, x, weight) * scale.double() * (0.5 if epilogue.dynamic else 1.0) + bias
        if epilogue.other_dtype is not None:
            value = value + (other.double() - 50) * 0.01
        value = ACTIVATION[epilogue.activation](value.float())
        if not epilogue.is_integer:
            tolerance = 1e-2 if epilogue.output_dtype == BFLOAT else 1e-5
            torch.testing.assert_close(
                result.float(), value, rtol=tolerance, atol=1e-5, msg=lambda m, k=kernel: f"{k.name}: {m}"
            )
            continue
        limits = torch.iinfo(epilogue.output_dtype)
        steps = (value / 0.03).round().add(5).clamp(limits.min, limits.max)
        off = (result.double() - steps).abs()
        assert off.max() <= 1 and (off > 0).float().mean() < 0.01, f"{kernel.name}: {off.max()}, {(off > 0).sum()}"


@pytest.mark.parametrize("name", ["avx512_vnni", "avx2"])
@pytest.mark.parametrize("rows", [3, 7, 14])
def test_scales_and_zero_points_of_rows(name: str, rows: int, tmp_path: Path) -> None:
    """Each row of a linear has a scale, and perhaps a zero point, of its own, which are not known when compiling."""
    row = isa.ISAS[name]
    if not row.cpu_flags <= set(cpu.instruction_sets()):
        pytest.skip(f"this CPU has no {name}")
    layer = Layer(1, 1, rows, 40, 20, signed=True)
    conv, (x, weight) = layer.convolution(row.lanes, False), tensors(layer, False)
    kernel = family.candidates(conv, Epilogue(FLOAT, dynamic=True), name)[0]
    library, scales = compile_([kernel], tmp_path, *kernel.flags), torch.rand(rows)
    for zero_points in (torch.tensor([-5]), torch.arange(rows) * 9 - 60):
        result = run(library, kernel, layer, conv, x, weight, numbers(layer), None, (scales, zero_points.int()))
        centered = x[0, 0].double() - zero_points[:, None]
        torch.testing.assert_close(result[0, 0], (centered @ weight.flatten(1).double().t() * scales[:, None]).float())


def test_sums_of_16_bits_that_overflow(tmp_path: Path) -> None:
    """Four products are added in 16 bits only where the weights say that they fit."""
    layer = Layer(1, 2, 5, 22, 40, (1, 3))
    weight = torch.randint(-5, 6, (40, 22, 1, 3), dtype=S8)
    weight[3:6] = 127  # overflows in the first vector, in all pairs
    weight[19, [8, 9, 12, 13]] = -127  # in the third, in one
    conv = layer.convolution(8, True)
    kernel = family.candidates(conv, Epilogue(FLOAT), "avx2")[0]
    x = torch.full((1, 2, 5, 22), 127, dtype=U8)
    library = compile_([kernel], tmp_path, *kernel.flags)
    result = run(library, kernel, layer, conv, x, weight, numbers(layer))
    assert torch.equal(result, sums(layer, x, weight).float())


def test_names_tell_kernels_apart() -> None:
    found = {
        kernel
        for name, fits_16 in MACHINES
        for layer in LAYERS.values()
        for epilogue in EPILOGUES
        if epilogue.other_dtype is None or layer.groups == 1
        for kernel in family.candidates(layer.convolution(isa.ISAS[name].lanes, fits_16), epilogue, name)
    }
    sources = {kernel.definition() for kernel in found}
    names = {kernel.name for kernel in found}
    assert len(names) == len(sources) and all(name.isidentifier() for name in names)
    kernel = family.Kernel("avx512_vnni", "convolution", 6, 4, Epilogue(U8, "relu"))
    assert kernel.name == "x86q_convolution_avx512_vnni_6x4_u8_clamp_u8"


def test_sources_hold_nothing_of_a_layer() -> None:
    one, other = (
        family.candidates(Layer(1, 7, 7, c, 64, (k, k)).convolution(16, False), Epilogue(U8), "avx512_vnni")
        for c, k in ((16, 1), (48, 3))
    )
    assert [kernel.source() for kernel in one] == [kernel.source() for kernel in other]


def test_open_sizes() -> None:
    """What is only known when it runs is C++."""
    values = arguments(Layer(1, 1, 5, 16, 32).convolution(16, False), w="rows", x_image="16 * rows")
    assert dict(zip(FIELDS, values, strict=True))["w"] == "rows"
    assert all(f"int64_t {name};" in STRUCT for name in FIELDS)


def test_the_model_ranks_all_candidates() -> None:
    conv = Layer(1, 7, 7, 16, 96).convolution(cpu.int8_lanes() or 8, not cpu.has_vnni())
    ranked = cost.choose(conv, Epilogue(U8))
    assert cost.ONEDNN in ranked and len(ranked) > 2


def test_specifications_are_text() -> None:
    for layer in LAYERS.values():
        given = Specification(layer.convolution(16, False), Epilogue(S8, "swish", BFLOAT, dynamic=True))
        places = {"x_strides": (0, 0, 0), "x_channel": 1, "other_pixel": 0, "out_pixel": 0}
        assert Specification.read(given.text()).convolution == dataclasses.replace(given.convolution, **places)
        assert Specification.read(given.text()).epilogue == given.epilogue
