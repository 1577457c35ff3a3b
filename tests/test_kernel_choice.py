"""Which layers are computed by kernels of ours, how wide and in which blocks, and which stay calls."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import inductor_x86q
from inductor_x86q import cpu, testing
from inductor_x86q.kernels import cost, family, isa
from inductor_x86q.kernels.convolution import Convolution
from inductor_x86q.kernels.epilogue import Epilogue
from inductor_x86q.testing import QConv2d, quantize_dequantize
from tests.models import Quantized

QD = quantize_dequantize
MODE = "max-autotune"
needs_avx2 = pytest.mark.skipif(not cpu.int8_lanes(), reason="kernels are generated for CPUs with AVX2")


@pytest.mark.parametrize(
    ("halves", "channels", "depthwise", "expected"),
    [
        (False, 8, False, 16), (False, 24, False, 16), (False, 32, True, 8), (False, 40, True, 16),
        (True, 8, False, 8), (True, 24, False, 8), (True, 48, False, 16), (True, 72, True, 8), (True, 384, True, 16),
    ],
)  # fmt: skip
def test_vectors_are_as_wide_as_channels_fill(
    halves: bool, channels: int, depthwise: bool, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "usable_flags", lambda: isa.ISAS["avx512_vnni"].cpu_flags)
    monkeypatch.setattr(cpu, "halves_512", lambda: halves)
    given = layer(
        channels if depthwise else 64, channels, (3, 3) if depthwise else (1, 1), channels if depthwise else 1
    )
    assert cost.widest(given, Epilogue(torch.uint8)).lanes == expected
    monkeypatch.setattr(cpu, "usable_flags", lambda: isa.ISAS["avx2"].cpu_flags)
    assert cost.widest(given, Epilogue(torch.uint8)).lanes == 8


def layer(c: int, out_c: int, kernel: tuple[int, int] = (1, 1), groups: int = 1, *, size: int = 14) -> Convolution:
    return Convolution(1, size, size, c, out_c, kernel, (1, 1), (0, 0), (1, 1), groups, 16, False, False)


def test_blocks_waste_little(monkeypatch: pytest.MonkeyPatch) -> None:
    """49 pixels are seven blocks of seven rows."""
    monkeypatch.setattr(cpu, "usable_flags", lambda: isa.ISAS["avx512_vnni"].cpu_flags)
    kernel = cost.choose(layer(960, 96, size=7), Epilogue(torch.uint8))[0]
    assert isinstance(kernel, family.Kernel) and kernel.rows == 7
    usual = cost.choose(layer(24, 96, size=7), Epilogue(torch.uint8))[0]
    assert isinstance(usual, family.Kernel) and usual.rows != 7, "a gain too small for one more kernel to compile"


@needs_avx2
def test_an_output_scale_that_is_far_too_small() -> None:
    """More steps than an integer holds would change their sign."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = QConv2d(8, 8, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return QD(self.layer(QD(x)), 1e-12, 0)

    q = testing.qdq_graph(Net(), (torch.randn(1, 8, 4, 4),))
    report = inductor_x86q.explain(q, (torch.randn(1, 8, 4, 4),), mode=MODE)
    assert any("an output scale so small" in note for note in report.notes)


def test_constants_that_are_written_out_leave_the_calls() -> None:
    """A layer's numbers are no tensors then, which the choice between kernels would read."""
    x = torch.randn(1, 8, 4, 4)
    options = {"always_keep_tensor_constants": False}

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = QConv2d(8, 8, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(QD(x))

    q = testing.qdq_graph(Net(), (x,))
    compiled = testing.assert_close_to_reference(q, (x,), mode=MODE, options=options)
    assert compiled.calls["qconv"] == 1
    assert any("always_keep_tensor_constants=False" in note for note in compiled.report.notes)


def test_the_faster_one_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the call measures faster it stays, and the weight packed for the kernel is gone."""
    import torch._inductor.lowering

    from inductor_x86q.inductor.lowering import tuning

    monkeypatch.setattr(tuning.CallChoice, "benchmark", lambda self, *values, out: 0.0)
    q = testing.qdq_graph(nn.Sequential(Quantized(QConv2d(8, 8, 3))), (torch.randn(1, 8, 6, 6),))
    compiled = testing.assert_close_to_reference(q, (torch.randn(1, 8, 6, 6),), mode=MODE)
    assert sum(testing.int8_calls(compiled.code).values()) == 1
    assert "X86qArguments" not in compiled.code


class Timed:
    """A choice that takes so long."""

    def __init__(self, milliseconds: float) -> None:
        self._milliseconds = milliseconds

    def runner(self, values: Any, out: Any) -> Callable[[], float]:
        return lambda: self._milliseconds


@pytest.mark.parametrize(("usual", "other", "taken"), [(1.03, 1.0, "usual"), (1.1, 1.0, "other"), (0.9, 1.0, "usual")])
def test_timing_has_to_be_clear_and_undisturbed(
    monkeypatch: pytest.MonkeyPatch, usual: float, other: float, taken: str
) -> None:
    """What is taken without timing stays where another choice is as good, and nothing is timed beside a compiler."""
    from inductor_x86q.inductor import objects
    from inductor_x86q.inductor.lowering import tuning

    compiler: Future[None] = Future()
    monkeypatch.setattr(objects, "_started", {Path("kernel.o"): compiler})
    timed: list[bool] = []

    def fastest(run: Callable[[], float], seconds: float) -> float:
        timed.append(compiler.done())
        return run()

    monkeypatch.setattr(tuning, "_fastest", fastest)
    choices = {name: Timed(time) for name, time in (("usual", usual), ("other", other))}
    contest = tuning.Contest(list(choices.values()), usual=choices["usual"])  # type: ignore[arg-type]
    threading.Timer(0.05, compiler.set_result, [None]).start()
    times = {name: contest.milliseconds(choice, [], torch.empty(0)) for name, choice in choices.items()}  # type: ignore[arg-type]
    assert min(times, key=times.__getitem__) == taken
    assert timed and all(timed)


@needs_avx2
def test_the_default_mode_takes_what_the_cost_model_thinks_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(1, 8, 6, 6)
    q = testing.qdq_graph(Quantized(QConv2d(8, 8, 3)), (x,))
    stock = cost.choose
    monkeypatch.setattr(cost, "choose", lambda *layer: sorted(stock(*layer), key=lambda choice: choice == cost.ONEDNN))
    compiled = testing.assert_close_to_reference(q, (x,))
    assert compiled.calls["x86q.convolution"] == 1 and not testing.int8_calls(compiled.code)
    assert (compiled.report.fused[0].kernel, compiled.report.notes) == ("onednn.qconv_pointwise.default", [])

    monkeypatch.setattr(cost, "choose", lambda *layer: [cost.ONEDNN, *stock(*layer)])
    report = inductor_x86q.explain(q, (x,))
    assert report.notes == ["layer is computed by oneDNN: oneDNN is expected to be faster"]


def test_calls_are_kept_where_they_are_asked_for() -> None:
    x = torch.randn(1, 8, 6, 6)
    q = testing.qdq_graph(Quantized(QConv2d(8, 8, 3)), (x,))
    code = inductor_x86q.cpp_code(q, (x,), options={"kernels": "onednn"})
    assert testing.int8_calls(code) == {"qconv": 1} and "X86qArguments" not in code
    with pytest.raises(inductor_x86q.CompileError, match="option `kernels` is 'ours': expected 'auto' or 'onednn'"):
        inductor_x86q.cpp_code(q, (x,), options={"kernels": "ours"})


@needs_avx2
def test_a_kernel_reads_just_what_was_packed_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Passes that pack and lowering that reads the same by two rules would compute from what lies behind."""
    x = torch.randn(1, 8, 6, 6)
    q = testing.qdq_graph(Quantized(QConv2d(8, 8, 3)), (x,))
    pack = Convolution.pack
    monkeypatch.setattr(Convolution, "pack", lambda self, weight: pack(self, weight)[:-4])
    with pytest.raises(
        Exception, match=r"layer layer: \d+ bytes of constants were packed for its kernel, which reads \d+"
    ):
        inductor_x86q.cpp_code(q, (x,))
