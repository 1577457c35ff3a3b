"""Recurrent layers: LSTM, GRU and RNN as one linear and one kernel call a layer, their cells, and what stays float."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import nn

import inductor_x86q
from inductor_x86q import cpp_code, cpu, inspection, testing
from inductor_x86q.graph.reasons import Reason
from inductor_x86q.graph.recurrence import RECURRENCE
from inductor_x86q.kernels import isa
from inductor_x86q.kernels.recurrence import CELLS
from inductor_x86q.testing import quantize_dequantize
from tests.fuzz import modules

pytestmark = pytest.mark.skipif(not cpu.int8_lanes(), reason="this CPU has no AVX2")
EXACT = 60.0  # dB against the q/dq graph: floats differ in their last bits, and a state is rounded the other way now and then

# --- whole layers -----------------------------------------------------------------------------------------------------


class Layers(nn.Module):
    """Recurrent layers of all kinds, that read one input (rows, steps, 24)."""

    def __init__(self) -> None:
        super().__init__()
        self.deep = nn.LSTM(24, 20, num_layers=2, bidirectional=True, batch_first=True)
        self.plain = nn.LSTM(24, 40, bias=False)
        self.gru = nn.GRU(24, 16, bidirectional=True, batch_first=True)
        self.two = nn.GRU(24, 24, num_layers=2, bias=False)
        self.tanh = nn.RNN(24, 8)
        self.relu = nn.RNN(24, 8, nonlinearity="relu", bidirectional=True)

    def forward(self, x: torch.Tensor, state: torch.Tensor) -> tuple[torch.Tensor, ...]:
        deep, (hidden, cell) = self.deep(x)
        steps = x.transpose(0, 1)
        plain, _ = self.plain(steps, (state, state))
        gru, after = self.gru(x, 3 * state[..., :16].expand(2, -1, -1).contiguous())
        two, last = self.two(steps)
        alone, _ = self.gru(x[0])
        return (deep, hidden, cell, plain, gru, after, two, last, alone, self.tanh(steps)[0], self.relu(steps)[0])


def inputs(rows: int = 3, steps: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(rows, steps, 24), torch.randn(1, rows, 40)


def layers() -> nn.Module:
    torch.manual_seed(0)
    return Layers().eval()


@pytest.fixture(scope="module", params=["per_tensor", "per_token", "static"])
def run(request: pytest.FixtureRequest) -> tuple[Any, Any, Any, Any]:
    """A compile, its results, those of the q/dq graph and of the float model."""
    model, given = layers(), inputs()
    ways: dict[str, Any] = {"static": {"calibration": [given]}}
    q = inductor_x86q.quantize(model, given, **ways.get(request.param, {"dynamic": request.param}))
    with torch.no_grad():
        done = testing.compile_once(q, given, options={"strict": True})
        return done, done.run(*given), q(*given), model(*given)


def test_steps_are_one_kernel_call_a_layer(run: tuple[Any, Any, Any, Any]) -> None:
    calls = testing.own_calls(run[0].code)
    # The GRU is there twice, and has two directions in one call.
    assert {name: calls.get(name) for name in ("x86q.lstm", "x86q.gru", "x86q.rnn")} == {
        "x86q.lstm": 3, "x86q.gru": 4, "x86q.rnn": 2,
    }  # fmt: skip
    assert testing.float_calls(run[0].code) == {}


def test_the_numbers_are_those_of_the_graph_run_eagerly(run: tuple[Any, Any, Any, Any]) -> None:
    _, results, expected, floats = run
    for number, (result, reference, float_) in enumerate(zip(results, expected, floats, strict=True)):
        assert result.shape == reference.shape and result.dtype == torch.float32
        assert testing.snr(result, reference) > EXACT, number
        assert testing.snr(reference, float_) > 25, number


def test_the_report_has_a_row_a_layer(run: tuple[Any, Any, Any, Any]) -> None:
    report = run[0].report
    assert report.missed == [] and report.kept_float == []
    rows = {fusion.layer: fusion for fusion in report.fused if fusion.operator == "lstm"}
    assert set(rows) == {"deep.l0", "deep.l1", "plain"}
    assert rows["deep.l1"].macs == 3 * 5 * 2 * 4 * 20 * 20 and rows["deep.l1"].output_shape == (3, 5, 40)
    assert rows["plain"].computed_by.startswith("x86q_lstm_")
    linears = [fusion.layer for fusion in report.fused if fusion.operator == "linear"]
    assert sorted(set(linears)) == ["deep.l0", "deep.l1", "gru", "plain", "relu", "tanh", "two.l0", "two.l1"]


def test_the_weights_are_stored_in_int8_only() -> None:
    q = inductor_x86q.quantize(layers(), inputs(), dynamic=True)
    matrices = {name: tensor.dtype for name, tensor in q.state_dict().items() if "weight" in name and tensor.dim() > 1}
    assert matrices["deep.weight_hh_l0_int8"] == torch.int8
    assert {dtype for name, dtype in matrices.items() if not name.endswith("_scale")} == {torch.int8}


@pytest.mark.parametrize("dynamic", [True, "per_token"])
def test_rows_may_be_open(dynamic: Any) -> None:
    """Steps may not: torch.export fixes how many a recurrent layer has."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(8, 12, bidirectional=True, batch_first=True)
            self.gru = nn.GRU(24, 12)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.gru(self.lstm(x)[0].transpose(0, 1))[0]

    q = inductor_x86q.quantize(Model().eval(), (torch.randn(3, 5, 8),), dynamic=dynamic)
    compiled = torch.compile(q, backend="inductor_x86q", dynamic=True)
    with torch.no_grad():
        for rows in (3, 4, 2):
            given = torch.randn(rows, 5, 8)
            torch._dynamo.mark_dynamic(given, 0)
            assert testing.snr(compiled(given), q(given)) > EXACT


# --- between layers of int8 -------------------------------------------------------------------------------------------


class Between(nn.Module):
    """Two layers, the first of two directions, and a linear; the states of the first are read too."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.LSTM(24, 20, bidirectional=True, batch_first=True)
        self.second = nn.GRU(40, 16, batch_first=True)
        self.head = nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        first, (hidden, _) = self.first(x)
        second, _ = self.second(first)
        return self.head(second), hidden


def test_a_layer_writes_what_the_next_one_reads() -> None:
    torch.manual_seed(0)
    x = (torch.randn(3, 5, 24),)
    q = inductor_x86q.quantize(Between().eval(), x, calibration=[x])
    done = testing.compile_once(q, x, options={"strict": True})
    for result, expected in zip(done.outputs, q(*x), strict=True):
        assert testing.snr(result, expected) > 45
    rows = [fusion for fusion in done.report.fused if fusion.operator != "linear"]
    assert [(row.output_dtype, row.absorbed, row.output_zero_point is None) for row in rows] == [
        ("uint8", ("quantize",), False)
    ] * 2
    assert all(row.computed_by.endswith("_u8") for row in rows)
    # Nothing but the input is quantized by itself.
    assert len(done.report.quantizes_left) == 1
    assert len([name for name in done.calls if name.startswith("cpp")]) == 1


class Steps(nn.Module):
    """Those of a layer without a linear in front."""

    def __init__(self, cell: str, hidden: int) -> None:
        super().__init__()
        self.cell, rows = cell, CELLS[cell][1] * hidden
        self.register_buffer("weight", torch.randint(-127, 128, (1, rows, hidden), dtype=torch.int8))
        self.register_buffer("scale", torch.rand(1, rows) / 400)

    def forward(self, x: torch.Tensor) -> Any:
        return RECURRENCE(self.cell, x, None, None, self.weight, self.scale, None, False)


def test_the_generated_code_between_layers() -> None:
    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.linear, self.second = Steps("lstm", 12), testing.QLinear(12, 8), Steps("rnn_relu", 8)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            first, states = self.first(x)
            return self.second(self.linear(quantize_dequantize(first)))[0], states

    code = cpp_code(Stack(), (torch.randn(5, 3, 48),), options=testing.PINNED)
    code = re.sub(f"_({'|'.join(sorted(isa.ISAS, key=len, reverse=True))})(_fits16)?_", "_ISA_", code)
    testing.assert_expected_cpp(
        code,
        """\

kernel0(input0, constant0, buf1, buf2);
aoti_torch_cpu__qlinear_pointwise_tensor(wrap_with_raii_handle_if_needed(reinterpret_tensor_wrapper(buf1, 2, int_array_4, int_array_5, 0)), constant1, constant2, constant3, constant4, constant5, &temporary_reference(constant6.get()), 1.0, 0, &cached_torch_dtype_float32, "none", {nullptr}, 1, "", &buf3_handle);
kernel1(buf3, constant7, buf5);
output_handles[0] = buf5.release();
output_handles[1] = buf2.release();

kernel0:
    const X86qRecurrence sizes = {5, 3, 12, 1, 144, 48, 36, 12, 1, 60, 0, 127, 50.0f};
    x86q_lstm_ISA_u8(in0 + 0, nullptr, nullptr, in1 + 0, out, states, &sizes);

kernel1:
    const X86qRecurrence sizes = {5, 3, 8, 1, 24, 8, 24, 8, 1, 0, 0, 0, 1.0f};
    x86q_rnn_relu_ISA_f32(in0 + 0, nullptr, nullptr, in1 + 0, out, nullptr, &sizes);
""",
    )


@pytest.mark.parametrize("is_read_too", [False, True])
def test_an_output_is_quantized_where_nobody_else_reads_it(is_read_too: bool) -> None:
    class Read(Steps):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            result, _ = super().forward(x)
            grid = dict(scale=0.02, zero_point=-4, quant_min=-40, quant_max=41, dtype=torch.int8)
            rounded = quantize_dequantize(result, **grid)
            return (rounded, result.sum()) if is_read_too else (rounded,)

    done = testing.assert_close_to_reference(Read("rnn_tanh", 12), (torch.randn(5, 3, 12),), min_snr=45)
    (fusion,) = done.report.fused
    expected = ("float32", (), None, None) if is_read_too else ("int8", ("quantize",), 0.02, -4)
    assert (fusion.output_dtype, fusion.absorbed, fusion.output_scale, fusion.output_zero_point) == expected


# --- what stays float -------------------------------------------------------------------------------------------------


class Few(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.projected = nn.LSTM(8, 16, proj_size=4)
        self.gru = nn.GRU(4, 8)
        self.head = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.gru(self.projected(x)[0])[0])


def test_what_cannot_be_quantized_and_what_is_excluded_stays_float() -> None:
    x = torch.randn(3, 2, 8)
    for exclude in (["gru"], [nn.GRU]):
        q = inductor_x86q.quantize(Few().eval(), (x,), dynamic=True, exclude=exclude)
        report = inductor_x86q.explain(q, (x,))
        assert {fusion.layer for fusion in report.fused} == {"head"}
        assert report.missed == []
        for name in ("projected", "gru"):
            misses = [miss for miss in report.kept_float if miss.layer.startswith(name)]
            assert misses and {miss.reason for miss in misses} == {Reason.NOT_QUANTIZED}
            assert "projection" in str(misses[0])
    assert "gru" in {fusion.layer for fusion in inductor_x86q.explain(
        inductor_x86q.quantize(Few().eval(), (x,), dynamic=True, config={"head": "float"}), (x,)
    ).fused}  # fmt: skip


def test_one_layer_of_several_may_stay_float() -> None:
    model, x = nn.LSTM(8, 16, num_layers=3, bidirectional=True).eval(), torch.randn(5, 2, 8)
    outer = nn.Sequential().eval()
    outer.add_module("lstm", model)
    q = inductor_x86q.quantize(outer, (x,), dynamic=True, exclude=["lstm.l1"])
    assert [node.target for node in q.graph.nodes if node.target in (RECURRENCE, torch.ops.aten.lstm.input)] == [
        RECURRENCE, torch.ops.aten.lstm.input, RECURRENCE,
    ]  # fmt: skip
    for ours, float_ in zip(q(x)[1], outer(x)[1], strict=True):
        assert testing.snr(ours, float_) > 30


# --- cells ------------------------------------------------------------------------------------------------------------


class Cells(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.gru, self.rnn = nn.LSTMCell(16, 32), nn.GRUCell(32, 24), nn.RNNCell(24, 8)

    def forward(self, x: torch.Tensor, h: torch.Tensor) -> tuple[torch.Tensor, ...]:
        hidden, cell = self.lstm(x, (h, h))
        hidden, cell = self.lstm(x, (hidden, cell))
        gated = self.gru(hidden, h[:, :24])
        return hidden, cell, gated, self.rnn(gated, h[:, :8])


def test_the_linears_of_cells_are_int8() -> None:
    model, given = Cells().eval(), (torch.randn(3, 16), torch.randn(3, 32))
    q = inductor_x86q.quantize(model, given, dynamic="per_token")
    with torch.no_grad():
        (result, report), floats = inspection.run_fused(q, given), model(*given)
    # The LSTM cell reads its input twice, and once is enough.
    assert len([fusion for fusion in report.fused if fusion.operator == "linear"]) == 7
    assert report.missed == [] and report.kept_float == []
    for ours, float_ in zip(result, floats, strict=True):
        assert testing.snr(ours, float_) > 25


# --- random modules ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
def test_random_modules_give_the_numbers_of_their_graphs(seed: int) -> None:
    check_module(modules.draw(seed), generate=False)


def check_module(case: modules.Case, *, generate: bool) -> None:
    q = inductor_x86q.quantize(case.network, case.inputs, **case.options())
    with torch.no_grad():
        expected = q(*case.inputs)
        if generate:
            done = testing.compile_once(q, case.inputs)
            results, report = done.outputs, done.report
        else:
            results, report = inspection.run_fused(q, case.inputs)
    missed = [*report.missed, *report.kept_float]
    assert {miss.reason for miss in missed} <= case.reasons, f"{case}: {missed}"
    for result, reference in zip(results, expected, strict=True):
        assert (result.shape, result.dtype) == (reference.shape, reference.dtype), case
        # An integer may fall the other way, and what comes of it is told by the next ones.
        torch.testing.assert_close(result, reference, atol=0.03 * float(reference.abs().max()), rtol=0.0, msg=str(case))
