"""One compile serves every batch size and every sequence length, in static and in dynamic quantization."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn

import inductor_x86q
from inductor_x86q import cpu, testing
from inductor_x86q.inductor import fake_tensors

F = nn.functional
AUTO, Dim = torch.export.Dim.AUTO, torch.export.Dim
WIDTH, HEADS = 32, 4


class Block(nn.Module):
    """A transformer's block: [batch, tokens, 32] → the same."""

    def __init__(self) -> None:
        super().__init__()
        self.projections = nn.Linear(WIDTH, 3 * WIDTH)
        self.output = nn.Linear(WIDTH, WIDTH)
        self.first, self.second = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.norms = nn.ModuleList([nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, tokens, _ = x.shape
        heads = self.projections(self.norms[0](x)).view(batch, tokens, 3, HEADS, WIDTH // HEADS)
        attention = F.scaled_dot_product_attention(*heads.permute(2, 0, 3, 1, 4).unbind(0))
        x = x + self.output(attention.transpose(1, 2).reshape(batch, tokens, WIDTH))
        return x + self.second(F.gelu(self.first(self.norms[1](x))))


class Net(nn.Module):
    """A convolution, a residual block with a depthwise convolution, a pool and a classifier: [batch, 3, 8, 8]."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding=1)
        self.depthwise, self.pointwise = nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.Conv2d(16, 16, 1)
        self.head = nn.Linear(256, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.first(x))
        x = F.relu(self.pointwise(F.relu6(self.depthwise(x))) + x)
        return self.head(F.max_pool2d(x, 2).flatten(1))


def quantized(model: nn.Module, x: torch.Tensor, shapes: Any = None, dynamic: Any = False) -> torch.fx.GraphModule:
    data = {} if dynamic else {"calibration": [x]}
    return inductor_x86q.quantize(model.eval(), (x,), dynamic=dynamic, dynamic_shapes=shapes, **data)  # type: ignore[arg-type]


def assert_serves(done: testing.Compiled, q: nn.Module, inputs: list[torch.Tensor], min_snr: float) -> None:
    """All inputs run on the one compile and give what the q/dq graph gives."""
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for x in inputs:
            testing.assert_same(done.run(x), q(x), min_snr=min_snr, where=f"shape {tuple(x.shape)}, ")


@pytest.mark.parametrize("dynamic", [False, "per_tensor", "per_token"], ids=["static", "per tensor", "per token"])
def test_batch_and_tokens(dynamic: Any) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 9, WIDTH)
    q = quantized(Block(), x, ({0: AUTO, 1: AUTO},), dynamic)
    marked = x.clone()
    torch._dynamo.mark_dynamic(marked, 0)
    torch._dynamo.mark_dynamic(marked, 1)
    done = testing.compile_once(q, (marked,), options={"strict": True})
    calls, own = (sum(of(done.code).values()) for of in (testing.int8_calls, testing.own_calls))
    attention = cpu.int8_lanes() > 0
    assert (calls, own) == ((0, 4 + attention) if cpu.int8_lanes() else (4, 0))
    layers = [fusion for fusion in done.report.fused if fusion.operator != "attention"]  # whose heads are known
    assert all(not isinstance(size, int) for fusion in layers for size in fusion.output_shape[:-1])
    # A rounding that falls the other way changes a step of one input of a layer, no more.
    assert_serves(done, q, [torch.randn(b, t, WIDTH) for b, t in ((4, 9), (2, 5), (7, 33), (16, 16))], 40)


def test_compile_with_dynamic_true_specializes_nothing() -> None:
    torch.manual_seed(0)
    q = quantized(Block(), torch.randn(4, 9, WIDTH), ({0: AUTO, 1: AUTO},), "per_token")
    compiled = torch.compile(q, backend="inductor_x86q", dynamic=True, options={"strict": True})
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for batch, tokens in ((3, 7), (2, 2), (5, 40)):
            x = torch.randn(batch, tokens, WIDTH)
            testing.assert_same(compiled(x), q(x), min_snr=40)


def test_bounds_of_an_unbacked_size_do_not_break_the_graph() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 3, 8, 8)
    q = quantized(Net(), x, ({0: Dim("batch", min=2, max=64)},))
    inputs = [torch.randn(batch, 3, 8, 8) for batch in (4, 16, 2, 64)]
    for other in inputs:
        torch._dynamo.decorators.mark_unbacked(other, 0)
    done = testing.compile_once(q, (inputs[0],), options={"strict": True})
    assert len(done.report.fused) == 4
    assert_serves(done, q, inputs, 40)
    with pytest.raises(AssertionError, match="<= 64"):
        q(torch.randn(65, 3, 8, 8))


@pytest.mark.parametrize("kernels", ["auto", "onednn"])
def test_batches_of_one_and_of_sixteen_where_the_size_is_unbacked(kernels: str) -> None:
    """torch itself compiles a convolution anew for one row, and from 16 rows on, unless the size is unbacked."""
    torch.manual_seed(0)
    x = torch.randn(4, 3, 8, 8)
    q = quantized(Net(), x)
    marked = x.clone()
    torch._dynamo.decorators.mark_unbacked(marked, 0)
    done = testing.compile_once(q, (marked,), options={"strict": True, "kernels": kernels})
    if kernels == "onednn":
        assert testing.int8_calls(done.code) == {"qconv": 2, "qconv.binary": 1, "qlinear": 1}
    else:
        assert sum(testing.own_calls(done.code).values()) == len(done.report.fused) - len(done.report.notes)
    inputs = [torch.randn(batch, 3, 8, 8) for batch in (4, 1, 16, 7)]
    for other in inputs:
        torch._dynamo.decorators.mark_unbacked(other, 0)
    assert_serves(done, q, inputs, 40)


class Photograph(nn.Module):
    """A convolution of three channels, which may lie apart, as far as an image is large."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = testing.QConv2d(3, 16, 3, padding=1), testing.QConv2d(16, 8, 3, stride=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.first(testing.quantize_dequantize(x, 0.02, 60)))
        return self.second(testing.quantize_dequantize(x, 0.02, 0))


def test_images_of_open_size() -> None:
    inputs = [torch.randn(2, 3, height, width) for height, width in ((12, 14), (9, 30), (21, 8))]
    q = testing.qdq_graph(Photograph(), (inputs[0],), dynamic_shapes=({2: AUTO, 3: AUTO},))
    marked = inputs[0].clone()
    for dimension in (2, 3):
        torch._dynamo.mark_dynamic(marked, dimension)
    done = testing.compile_once(q, (marked,), options={"strict": True})
    assert_serves(done, q, inputs, 35)


class Halves(nn.Module):
    """The second half of a batch begins where only its size says; a layer reads each, of images or of rows."""

    def __init__(self, whole: nn.Module, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.whole, self.first, self.second = whole, first, second

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        def rounded(x: torch.Tensor) -> torch.Tensor:
            return testing.quantize_dequantize(x, 0.02, 60)

        first, second = rounded(self.whole(rounded(x))).chunk(2)
        return self.first(first), self.second(second)


@pytest.mark.parametrize("mode", [None, "max-autotune-no-cudagraphs"])
@pytest.mark.parametrize("images", [False, True], ids=["rows", "images"])
def test_halves_of_an_open_batch(images: bool, mode: str | None) -> None:
    layers: tuple[nn.Module, ...]
    if images:
        layers = (testing.QConv2d(8, 16, 1), testing.QConv2d(16, 8, 3, padding=1), testing.QConv2d(16, 24, 1))
    else:
        layers = (testing.QLinear(32, 48), testing.QLinear(48, 16), testing.QLinear(48, 24))
    inputs = [torch.randn(batch, *((8, 5, 6) if images else (32,))) for batch in (6, 4, 14)]
    q = testing.qdq_graph(Halves(*layers), (inputs[0],), dynamic_shapes=({0: 2 * Dim("half", min=2)},))
    marked = inputs[0].clone()
    torch._dynamo.mark_dynamic(marked, 0)
    done = testing.compile_once(q, (marked,), mode=mode, options={"strict": True})
    assert_serves(done, q, inputs, 35)


@pytest.mark.parametrize("lines", [False, True], ids=["images", "lines"])
def test_one_pixel_with_padding(lines: bool) -> None:
    """An image of one pixel lies both ways at once; the int8 kernels take and give channels innermost."""
    layer = (testing.QConv1d if lines else testing.QConv2d)(13, 8, 2, padding=1)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(testing.quantize_dequantize(x))

    x = torch.randn(2, 13, 1) if lines else torch.randn(2, 13, 1, 1)
    q = testing.qdq_graph(Net(), (x,), dynamic_shapes=({0: Dim.DYNAMIC},))
    torch._dynamo.mark_dynamic(x, 0)
    done = testing.compile_once(q, (x,), options={"kernels": "onednn"})
    assert testing.int8_calls(done.code) == {"qconv": 1}
    assert_serves(done, q, [torch.randn(batch, *x.shape[1:]) for batch in (2, 5)], 40)


# --- examples of size 1 -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shapes",
    [({0: AUTO, 1: AUTO},), {"x": {0: Dim("batch"), 1: Dim("tokens")}}, ((Dim("batch"), AUTO, None),)],
    ids=["auto", "by name", "as a tuple"],
)
def test_an_example_of_size_one_does_not_fix_it(shapes: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        q = quantized(Block(), torch.randn(1, 1, WIDTH), shapes, "per_tensor")
    for batch, tokens in ((1, 1), (3, 5)):
        assert q(torch.randn(batch, tokens, WIDTH)).shape == (batch, tokens, WIDTH)


class FixedBatch(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).view(1, 3, 8)


def test_what_the_model_fixes_is_said() -> None:
    x = torch.randn(1, 3, WIDTH)
    with pytest.warns(UserWarning, match=r"dimension 0 of input '\w+' was asked to be dynamic"):
        q = quantized(FixedBatch(WIDTH, 8), x, ({0: AUTO},), True)
    assert q(x).shape == (1, 3, 8)


# --- asking without answering -----------------------------------------------------------------------------------------


def test_known_adds_no_guard() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

    environment = ShapeEnv()
    context: Any = StatelessSymbolicContext([DimDynamic.DYNAMIC, DimDynamic.STATIC])
    x = FakeTensorMode(shape_env=environment).from_tensor(torch.randn(4, 4), symbolic_context=context)
    batch, width = x.shape
    assert not fake_tensors.known(batch == 4) and fake_tensors.known(width == 4)
    assert not fake_tensors.same_shape((batch, width), (4, 4)) and fake_tensors.same_shape((batch, width), (batch, 4))
    assert not fake_tensors.same_shape((batch,), (batch, 4))
    assert not environment.guards
