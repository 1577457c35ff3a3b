"""Channel shuffles: absorbed into the weights where only convolutions read the channels, kept where their order shows."""

from __future__ import annotations

import pytest
import torch
from torch import fx, nn

import inductor_x86q
from inductor_x86q import testing
from inductor_x86q.inspection import run_fused


def block(inputs: int, outputs: int, **arguments: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, **arguments), nn.ReLU())


class Unit(nn.Module):
    """A unit of ShuffleNet V2: half of the channels through a branch, the two halves mixed."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.branch = nn.Sequential(
            block(half, half, kernel_size=1),
            nn.Conv2d(half, half, 3, padding=1, groups=half),
            block(half, half, kernel_size=1),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        left, right = x.chunk(2, dim=1)
        return shuffle(torch.cat([left, self.branch(right)], 1), 2)


def shuffle(x: torch.Tensor, groups: int) -> torch.Tensor:
    n, c, h, w = x.shape
    return x.view(n, groups, c // groups, h, w).transpose(1, 2).reshape(n, c, h, w)


class Shuffles(nn.Module):
    """Three units between convolutions; the last one's channels are read by a depthwise and by a full convolution.

    `shown` returns the shuffled channels too.
    """

    def __init__(self, shown: bool = False) -> None:
        super().__init__()
        self.first = block(3, 16, kernel_size=3, padding=1)
        self.units = nn.ModuleList(Unit(16) for _ in range(3))
        self.depthwise = nn.Conv2d(16, 16, 3, stride=2, padding=1, groups=16)
        self.behind_depthwise = block(16, 8, kernel_size=1)
        self.full = block(16, 8, kernel_size=3, stride=2, padding=1)
        self.last = nn.Conv2d(16, 4, 1)
        self.shown = shown

    def forward(self, x: torch.Tensor) -> object:
        x = self.first(x)
        for unit in self.units:
            x = unit(x)
        both = torch.cat([self.behind_depthwise(self.depthwise(x)), self.full(x)], 1)
        y = self.last(shuffle(both, 2))
        return (y, shuffle(both, 4)) if self.shown else y


@pytest.fixture(scope="module")
def image() -> torch.Tensor:
    return torch.rand(2, 3, 9, 9, generator=torch.Generator().manual_seed(0))


def quantized(model: nn.Module, x: torch.Tensor) -> fx.GraphModule:
    return inductor_x86q.quantize(model.eval(), (x,), calibration=[x])


CALLS = {"kernels": "onednn"}


def kernels(code: str) -> tuple[int, int, int]:
    """Calls of int8 convolutions, of cats, and of other generated kernels."""
    calls = testing.kernel_calls(code)
    generated = [name for name in calls.elements() if name.startswith("cpp_")]
    cats = sum(name.startswith("cpp_fused_cat_") for name in generated)
    return calls["qconv"], cats, len(generated) - cats


def test_no_shuffle_runs_between_convolutions(image: torch.Tensor) -> None:
    torch.manual_seed(0)
    q = quantized(Shuffles(), image)
    # Generated: the quantize of the input and the change of the output's layout. A cat for each set of channels that is
    # read together: by the second unit, by the third, by the two behind the units, by the last.
    assert kernels(inductor_x86q.cpp_code(q, (image,), options=CALLS)) == (14, 4, 2)
    output, report = run_fused(q, (image,))
    assert not report.missed
    testing.assert_same(output, q(image))


def test_the_order_of_channels_that_show_is_kept(image: torch.Tensor) -> None:
    torch.manual_seed(0)
    q = quantized(Shuffles(shown=True), image)
    outputs, _ = run_fused(q, (image,))
    for output, reference in zip(outputs, q(image), strict=True):
        testing.assert_same(output, reference)


@pytest.mark.parametrize("groups", [2, 4, 8])
def test_groups_and_open_batch(groups: int) -> None:
    class Grouped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = block(3, 16, kernel_size=1)
            self.second = block(16, 16, kernel_size=1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(shuffle(self.first(x), groups))

    torch.manual_seed(0)
    x = torch.rand(2, 3, 5, 5)
    q = quantized(Grouped(), x)
    assert kernels(inductor_x86q.cpp_code(q, (x,), options=CALLS)) == (2, 0, 2)
    compiled = torch.compile(q, backend="inductor_x86q", dynamic=True)
    for batch in (2, 5):
        x = torch.rand(batch, 3, 5, 5)
        testing.assert_same(compiled(x), q(x))
