"""Layers in branches, loops, checkpoints and nested regions: fused where their weights are known, and named everywhere."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed
from torch._higher_order_ops import while_loop
from torch._higher_order_ops.scan import scan

import inductor_x86q
from inductor_x86q import inspection, testing
from inductor_x86q.graph.reasons import Reason
from inductor_x86q.testing import QLinear
from inductor_x86q.testing import quantize_dequantize as QD

X = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))


class ThreeLinears(nn.Module):
    """`second` and `third` run in what `flow` makes of them."""

    def __init__(self, flow: Callable[[Any, torch.Tensor], Any]) -> None:
        super().__init__()
        self.first, self.second, self.third, self.flow = QLinear(32, 48), QLinear(48, 48), QLinear(48, 48), flow

    def forward(self, x: torch.Tensor) -> Any:
        return self.flow(self, self.first(QD(x)))


def branches(m: Any, x: torch.Tensor) -> Any:
    return torch.cond(x.sum() > 0, lambda v: torch.relu(m.second(QD(v))), lambda v: m.third(QD(v)), (x,))


def branches_in_a_branch(m: Any, x: torch.Tensor) -> Any:
    return torch.cond(x.sum() > 0, lambda v: branches(m, m.second(QD(v))), lambda v: v.clone(), (x,))


def one_weight_in_both(m: Any, x: torch.Tensor) -> Any:
    return torch.cond(x.sum() > 0, lambda v: m.second(QD(v)), lambda v: m.second(QD(-v)), (x,))


def loop(m: Any, x: torch.Tensor) -> Any:
    return while_loop(lambda i, v: i < 3, lambda i, v: (i + 1, m.second(QD(v))), (torch.tensor(0), x))[1]


def checkpoint(m: Any, x: torch.Tensor) -> Any:
    return torch.utils.checkpoint.checkpoint(lambda v: m.second(QD(v)), x, use_reentrant=False)


def region(m: Any, x: torch.Tensor) -> Any:
    layer = torch.compiler.nested_compile_region(lambda v: m.second(QD(v)))
    return layer(torch.relu(layer(x)))


def steps(m: Any, x: torch.Tensor) -> Any:
    return scan(lambda c, v: (m.second(QD(c)) + v, c.clone()), torch.zeros_like(x), torch.stack([x, -x]))


FUSED = {
    branches: 3, branches_in_a_branch: 4, one_weight_in_both: 3, loop: 2, checkpoint: 2, region: 3,
}  # fmt: skip


@pytest.mark.parametrize("exported", [False, True], ids=["traced", "exported"])
@pytest.mark.parametrize("flow", FUSED, ids=lambda flow: flow.__name__)
def test_fused(flow: Callable[..., Any], exported: bool) -> None:
    model: nn.Module = ThreeLinears(flow).eval()
    if exported:
        model = testing.qdq_graph(model, (X,))
    for x in (X, -X):
        torch._dynamo.reset()
        result, report = inspection.run_fused(model, (x,))
        assert len(report.fused) == FUSED[flow] and not report.missed and not report.kept_float, report
        with torch.no_grad():
            torch.testing.assert_close(result, model(x))


def test_layers_of_a_scan_are_named() -> None:
    model = ThreeLinears(steps).eval()
    result, report = inspection.run_fused(model, (X,))
    assert [miss.reason for miss in report.missed] == [Reason.IN_A_REGION] and len(report.fused) == 1
    assert "second" in str(report.missed[0]) and "scan" in str(report.missed[0])
    with torch.no_grad():
        torch.testing.assert_close(result, model(X))
    torch._dynamo.reset()
    with torch.no_grad(), pytest.raises(BackendCompilerFailed, match="second"):
        torch.compile(model, backend="inductor_x86q", options={"strict": True})(X)


def test_float_layers_of_a_scan_are_named() -> None:
    model = ThreeLinears(lambda m, x: scan(lambda c, v: (c @ m.w + v, c.clone()), torch.zeros_like(x), x[None]))
    model.register_buffer("w", torch.randn(48, 48))
    report = inspection.run_fused(model.eval(), (X,))[1]
    assert [miss.reason for miss in report.kept_float] == [Reason.NOT_QUANTIZED] and not report.missed


@pytest.mark.parametrize("flow", [branches, loop], ids=lambda flow: flow.__name__)
def test_compiled(flow: Callable[..., Any]) -> None:
    model = testing.qdq_graph(ThreeLinears(flow).eval(), (X,))
    compiled = torch.compile(model, backend="inductor_x86q")
    with torch.no_grad():
        for x in (X, -X, 2 * X):
            torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.usefixtures("only_generated")
def test_kernels_of_ours_in_branches() -> None:
    model = testing.qdq_graph(ThreeLinears(branches).eval(), (X,))
    compiled = torch.compile(model, backend="inductor_x86q", mode="max-autotune")
    with torch.no_grad():
        for x in (X, -X):
            torch.testing.assert_close(compiled(x), model(x))


def test_package(tmp_path: Path) -> None:
    model = testing.qdq_graph(ThreeLinears(branches).eval(), (X,))
    loaded = inductor_x86q.load(inductor_x86q.package(model, (X,), str(tmp_path / "model.pt2")))
    with torch.no_grad():
        for x in (X, -X):
            torch.testing.assert_close(loaded(x), model(x))
