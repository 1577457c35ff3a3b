"""Kernels of ours: their numbers in every blocking and width, and what surrounds them."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import inductor_x86q
from inductor_x86q import cpu, testing
from inductor_x86q.kernels import cost, isa
from inductor_x86q.kernels.arguments import FIELDS
from inductor_x86q.kernels.convolution import Convolution
from inductor_x86q.kernels.epilogue import Epilogue, Numbers
from inductor_x86q.testing import QConv1d, QConv2d, QConv3d, QLinear, quantize_dequantize
from tests.models import Quantized

QD = quantize_dequantize
MODE = "max-autotune"
needs_avx2 = pytest.mark.skipif(not cpu.int8_lanes(), reason="kernels are generated for CPUs with AVX2")


def to_int8(x: torch.Tensor) -> torch.Tensor:
    return torch.ops.quantized_decomposed.quantize_per_tensor.default(x, 0.04, 70, 0, 255, torch.uint8)


@dataclasses.dataclass(frozen=True)
class Case:
    """`post` takes the layer's result and what may be added to it."""

    name: str
    layer: nn.Module
    shape: tuple[int, ...]
    post: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = lambda y, other: to_int8(y)
    signed: bool = False


def add(y: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    return to_int8((y + QD(other, 0.03, 20)).relu())


CASES = (
    Case("1x1", QConv2d(16, 24, 1), (1, 16, 7, 7)),
    Case("odd channels", QConv2d(13, 11, 1, bias=False), (2, 13, 5, 3)),
    Case("3x3, stride, relu", QConv2d(19, 13, 3, stride=2, padding=1), (2, 19, 7, 9), lambda y, o: to_int8(y.relu())),
    Case("image", QConv2d(3, 16, 7, stride=2, padding=3), (1, 3, 21, 17), lambda y, o: to_int8(F.hardswish(y))),
    Case("3x1, float output", QConv2d(8, 8, (3, 1), padding=(1, 0), dilation=(2, 1)), (1, 8, 9, 6), lambda y, o: y),
    Case("dilation", QConv2d(6, 9, 3, padding=2, dilation=2), (1, 6, 9, 8), lambda y, o: to_int8(F.silu(y))),
    Case("groups", QConv2d(24, 36, 3, padding=1, groups=4), (1, 24, 5, 6), lambda y, o: to_int8(F.relu6(y))),
    Case("depthwise", QConv2d(24, 24, 3, padding=1, groups=24), (1, 24, 9, 9)),
    Case("depthwise 5x3, stride", QConv2d(21, 21, (5, 3), stride=2, padding=(2, 1), groups=21), (2, 21, 11, 9)),
    Case("depthwise, a tall window", QConv2d(24, 24, (21, 1), padding=(10, 0), groups=24), (1, 24, 25, 3)),
    Case("depthwise, a wide window", QConv2d(24, 24, 3, padding=36, dilation=36, groups=24), (1, 24, 38, 40)),
    Case("depthwise, dilation", QConv2d(33, 33, 3, dilation=2, groups=33), (1, 33, 9, 9), lambda y, o: y.relu()),
    Case("addition", QConv2d(16, 16, 3, padding=1), (2, 16, 6, 5), add),
    Case("linear", QLinear(33, 10), (3, 33)),
    Case("linear of rows", QLinear(32, 40), (2, 5, 32), lambda y, o: F.leaky_relu(y, 0.1)),
    Case("linear, s8", QLinear(18, 12, largest=63), (7, 18), lambda y, o: to_int8(torch.tanh(y)), signed=True),
    Case("linear, addition", QLinear(24, 16), (6, 24), add),
    Case("1-d", QConv1d(10, 20, 5, stride=2, padding=2), (2, 10, 15), lambda y, o: to_int8(y.relu())),
    Case("1-d, depthwise", QConv1d(24, 24, 3, padding=1, groups=24), (1, 24, 11), lambda y, o: y),
    Case("3-d", QConv3d(9, 20, (3, 3, 2), stride=(2, 1, 2), padding=(1, 1, 0)), (2, 9, 6, 4, 5)),
    Case("3-d, few channels", QConv3d(3, 20, (2, 1, 3), dilation=(2, 1, 1)), (1, 3, 4, 4, 5), lambda y, o: y),
    Case("3-d, groups", QConv3d(8, 8, 3, padding=1, groups=8), (1, 8, 3, 4, 5)),
    Case("3-d of one plane", QConv3d(8, 8, (1, 3, 3), padding=(0, 1, 1), groups=8), (2, 8, 1, 4, 5)),
)


class Together(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(case.layer for case in CASES)

    def forward(self, xs: list[torch.Tensor], others: list[torch.Tensor]) -> list[torch.Tensor]:
        results = []
        for case, layer, x, other in zip(CASES, self.layers, xs, others, strict=True):
            ranges = {"dtype": torch.int8, "quant_min": -64, "zero_point": 3} if case.signed else {}
            results.append(case.post(layer(QD(x, quant_max=63 if case.signed else 127, **ranges)), other))
        return results


def output_shape(case: Case) -> tuple[int, ...]:
    return tuple(case.layer(torch.zeros(case.shape)).shape)


@pytest.fixture(scope="module")
def graph() -> Iterator[tuple[torch.fx.GraphModule, tuple[Any, Any]]]:
    torch.manual_seed(0)
    inputs = (
        [torch.randn(case.shape) * 0.5 for case in CASES],
        [torch.randn(output_shape(case)) for case in CASES],
    )
    yield testing.qdq_graph(Together(), inputs), inputs


def arguments(code: str) -> dict[str, list[int]]:
    """What the kernels are called with, each argument of all calls."""
    calls = re.findall(r"X86qArguments arguments = {(.*)};", code)
    return {name: [int(call.split(", ")[i]) for call in calls] for i, name in enumerate(FIELDS)}


def choose_width(width: str, monkeypatch: pytest.MonkeyPatch, *, vnni: bool = True) -> None:
    """Vectors as on that CPU; "wide" for all layers. What this CPU does not have is left to the tests elsewhere."""
    wanted = isa.ISAS["avx2" if width == "AVX2" else "avx512_vnni"].cpu_flags
    if not wanted <= cpu.usable_flags():
        pytest.skip(f"this CPU has no {width}")
    flags = wanted if vnni else wanted - {"avx512_vnni"}
    monkeypatch.setattr(cpu, "usable_flags", lambda: frozenset(flags))
    monkeypatch.setattr(cpu, "int8_lanes", lambda: 8 if width == "AVX2" else 16)  # also where VNNI is hidden
    if width == "wide":
        monkeypatch.setattr(cost, "widest", lambda layer, epilogue: dataclasses.replace(layer, lanes=16))


@needs_avx2
@pytest.mark.parametrize("width", ["AVX2", "AVX-512", "wide"])
@pytest.mark.parametrize("blocking", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_numbers(
    width: str, blocking: int, graph: Any, only_generated: None, one_blocking: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every kernel against the eager graph."""
    choose_width(width, monkeypatch)
    one_blocking(blocking)
    q, inputs = graph
    with torch.no_grad():
        reference = q(*inputs)
    compiled = testing.compile_once(q, inputs, mode=MODE)
    second = compiled.run(*inputs)
    assert sum(testing.own_calls(compiled.code).values()) == len(CASES)
    assert not testing.int8_calls(compiled.code), "an onednn call is left"
    for case, mine, again, theirs in zip(CASES, compiled.outputs, second, reference, strict=True):
        testing.assert_same(mine, theirs, where=f"{case.name}, ")
        assert torch.equal(mine, again), case.name


@needs_avx2
def test_eight_bits(only_generated: None, one_blocking: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """8-bit activations and weights, whose pairs of products overflow 16 bits: exact where VNNI is taken for granted."""
    one_blocking(0)
    monkeypatch.setattr(cpu, "has_vnni", lambda: True)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.depthwise = QConv2d(8, 8, 1), QConv2d(16, 16, 3, groups=16)

        def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return self.conv(QD(x, 0.02, 0, quant_max=255)), self.depthwise(QD(y, 0.02, 0, quant_max=255))

    net = Net()
    for layer in (net.conv, net.depthwise):
        layer.weight.fill_(127)
    inputs = (torch.full((1, 8, 4, 4), 9.0), torch.full((1, 16, 5, 5), 9.0))
    q = testing.qdq_graph(net, inputs)
    testing.assert_close_to_reference(q, inputs, mode=MODE)


@needs_avx2
@pytest.mark.parametrize("width", ["AVX2", "wide"])
@pytest.mark.parametrize(("largest_input", "largest_weight"), [(127, 127), (255, 64)])
def test_sums_of_16_bits(
    width: str,
    largest_input: int,
    largest_weight: int,
    only_generated: None,
    one_blocking: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without VNNI four products are added in 16 bits only where they cannot overflow, whatever the input."""
    choose_width(width, monkeypatch, vnni=False)
    one_blocking(0)
    layer = QConv2d(22, 40, (1, 3), bias=False)
    layer.weight.clamp_(-5, 5)
    layer.weight[3:6] = largest_weight  # overflows in the first vector, in all pairs
    layer.weight[19, [8, 9, 12, 13]] = -largest_weight  # in the third, in one
    inputs = (torch.full((1, 22, 2, 5), 99.0),)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(QD(x, 0.02, 0, quant_max=largest_input))

    compiled = testing.assert_close_to_reference(testing.qdq_graph(Net(), inputs), inputs, mode=MODE)
    assert "_fits16_" in compiled.code


def test_numbers_beyond_single_precision() -> None:
    """A scale in steps of a tiny output scale: infinite, it would make a sum of 0 no number."""
    conv = Convolution(1, 1, 1, 4, 8, (1, 1), (1, 1), (0, 0), (1, 1), 1, 8, False, True)
    numbers = Numbers(1e20, 0, torch.ones(8), None, scale=1e-30)
    channels = conv.channels(torch.ones(8, 4, 1, 1, dtype=torch.int8), numbers, Epilogue(torch.uint8))
    scales = channels[8:16].view(torch.float32)
    assert torch.isfinite(scales).all() and (scales > 1e38).all()


def test_limits_are_rounded_as_quantize_does() -> None:
    """Half a step goes to the even number before the zero point is added."""
    numbers = Numbers(1.0, 0, torch.ones(8), None, scale=1.0, zero_point=1, activation=(0.0, 2.5))
    assert Epilogue(torch.uint8, "hardtanh").limits(numbers) == (1, 3)
    assert Epilogue(torch.uint8, "relu").limits(numbers) == (1, 255)
    assert Epilogue(torch.int8, "swish").limits(numbers) == (-128, 127)


def test_the_largest_step_counts_all_weights() -> None:
    """-128 has no counterpart in int8, and sums of long rows exceed 32 bits."""
    conv = Convolution(1, 1, 1, 100000, 8, (1, 1), (1, 1), (0, 0), (1, 1), 1, 8, False, True)
    numbers = Numbers(1.0, 0, torch.ones(8), None, scale=1.0, other_scale=0.0)
    weight = torch.full((8, 100000, 1, 1), -128, dtype=torch.int8)
    assert conv.largest_step(weight, numbers) == 255 * 128 * 100000


@needs_avx2
def test_tanh_of_0_is_0(only_generated: None) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = QLinear(8, 40, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(QD(x)).tanh()

    x = torch.zeros(3, 8)
    compiled = testing.compile_once(testing.qdq_graph(Net(), (x,)), (x,), mode=MODE)
    assert not testing.int8_calls(compiled.code)
    assert torch.equal(compiled.outputs, torch.zeros(3, 40))


@needs_avx2
def test_layers_of_one_shape_share_a_kernel(only_generated: None, one_blocking: Any) -> None:
    one_blocking(0)
    net = nn.Sequential(QConv2d(8, 8, 1), QConv2d(8, 8, 1))
    net[1].bias = torch.arange(8.0)
    scales = ((0.02, 60), (0.05, 40), (0.03, 7))

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = net

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer, scale in zip(self.layers, scales, strict=False):
                x = layer(QD(x, *scale))
            return QD(x, *scales[2])

    q = testing.qdq_graph(Net(), (torch.randn(1, 8, 4, 4),))
    compiled = testing.assert_close_to_reference(q, (torch.randn(1, 8, 4, 4),), mode=MODE, step=0.03)
    assert sum(testing.own_calls(compiled.code).values()) == 2
    assert len(set(re.findall(r"void (x86q_convolution_\w+)\(", compiled.code))) == 1


class Gaps(nn.Module):
    """Layers that read, or add, every other channel or a part of an int8 image that another layer gives."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = QConv2d(4, 12, 1), QConv2d(6, 12, 1), QConv2d(12, 12, 3)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        image = QD(self.first(QD(x)), 0.05, 60)
        every_other = self.second(image[:, ::2])
        part = self.third(QD(every_other, 0.02, 64)) + image[:, :, 1:-1, 1:-1]
        return every_other, QD(part, 0.05, 60)


@needs_avx2
def test_gaps(only_generated: None, one_blocking: Any) -> None:
    """Channels and pixels that lie apart are copied, rather than left to the call without a word."""
    one_blocking(0)
    x = torch.randn(1, 4, 6, 5) * 0.5
    compiled = testing.assert_close_to_reference(testing.qdq_graph(Gaps(), (x,)), (x,), mode=MODE, step=0.05)
    assert not testing.int8_calls(compiled.code)
    assert sum(testing.own_calls(compiled.code).values()) == 3
    assert arguments(compiled.code)["other_pixel"].count(12) == 1


class Planes(nn.Module):
    """Images of few channels: planes, pixels, one channel shown as three, with padding and without."""

    def __init__(self) -> None:
        super().__init__()
        self.padded, self.bare = QConv2d(3, 8, 3, stride=2, padding=1), QConv2d(3, 8, 3)
        self.two, self.four = QConv2d(2, 8, 2), QConv2d(4, 16, 1, stride=2)

    def forward(self, planes: torch.Tensor, pixels: torch.Tensor, gray: torch.Tensor) -> list[torch.Tensor]:
        images = [QD(x, 0.02, 70) for x in (planes, pixels, gray.expand(-1, 3, -1, -1))]
        results = [layer(image) for image in images for layer in (self.padded, self.bare)]
        return [*results, self.two(QD(planes[:, :2], 0.02, 70)), self.four(QD(torch.cat([planes, gray], 1), 0.02, 70))]


@needs_avx2
def test_images_of_few_channels_are_taken_as_they_lie(only_generated: None, one_blocking: Any) -> None:
    one_blocking(0)
    planes, pixels, gray = torch.randn(2, 3, 9, 8), torch.randn(2, 3, 9, 8), torch.randn(2, 1, 9, 8)
    inputs = (planes, pixels.to(memory_format=torch.channels_last), gray)
    compiled = testing.assert_close_to_reference(testing.qdq_graph(Planes(), inputs), inputs, mode=MODE)
    distances = arguments(compiled.code)["x_channel"]
    assert distances.count(72) >= 3 and distances.count(1) >= 2, distances  # layers of one shape share a kernel


@needs_avx2
def test_compiled_code_holds_what_it_reads(only_generated: None, one_blocking: Any) -> None:
    """Every constant costs at every call: those of the calls that lost are gone, but for those that something else reads."""
    one_blocking(0)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = QConv2d(16, 24, 1), QConv2d(24, 16, 3)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            y = self.first(QD(x))
            return self.second(QD(y)), y + self.first.bias.view(-1, 1, 1)

    x = torch.randn(1, 16, 6, 6)
    compiled = testing.assert_close_to_reference(testing.qdq_graph(Net(), (x,)), (x,), mode=MODE)
    (constants,) = re.findall(r"constants_tensor = \[(.*)\]", compiled.code)
    assert len(constants.split(", ")) == 3, constants


class Dots(nn.Module):
    """Views of one single element."""

    def __init__(self) -> None:
        super().__init__()
        self.line, self.linear = testing.QConv1d(1, 4, 1), QLinear(1, 8)

    def forward(self, x: torch.Tensor, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.line(QD(x.sigmoid())), self.linear(QD(rows.sigmoid()).flatten(1))


@needs_avx2
def test_single_elements(only_generated: None, one_blocking: Any) -> None:
    one_blocking(0)
    inputs = (torch.randn(1, 1, 1), torch.randn(1, 1, 1, 1))
    testing.assert_close_to_reference(testing.qdq_graph(Dots(), inputs), inputs, mode=MODE)


@needs_avx2
@pytest.mark.parametrize("apart", [False, True])
def test_shared_code_is_shown_once(apart: bool, only_generated: None, one_blocking: Any) -> None:
    """However many kernels there are, and whether they are compiled with the wrapper or apart from it."""
    one_blocking(0)
    x = torch.randn(1, 4, 6, 5) * 0.5
    q = testing.qdq_graph(Gaps(), (x,))
    options = {"max_autotune": True, "cpp_wrapper_build_separate": apart}
    compiled = testing.assert_close_to_reference(q, (x,), options=options, step=0.05)
    assert sum(testing.own_calls(compiled.code).values()) == 3
    for code in (compiled.code, inductor_x86q.cpp_code(q, (x,), options=options)):
        assert code.count("struct X86qArguments {") == 1


@needs_avx2
def test_package(tmp_path: Any, only_generated: None, one_blocking: Any) -> None:
    """Generated kernels in a package, whose kernels are compiled apart from its wrapper."""
    one_blocking(0)
    x = torch.randn(1, 8, 6, 6)
    q = testing.qdq_graph(Quantized(QConv2d(8, 8, 3)), (x,))
    path = inductor_x86q.package(q, (x,), tmp_path / "model.pt2", options={"max_autotune": True})
    run = torch._inductor.aoti_load_package(path)
    with torch.no_grad():
        testing.assert_same(run(x), q(x))
