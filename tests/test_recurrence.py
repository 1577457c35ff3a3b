"""Recurrent layers: LSTM, GRU and RNN as one linear and one kernel call a layer, their cells, and what stays float."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
import torch
from torch import nn

import inductor_x86q
from inductor_x86q import cpu, inspection, testing
from inductor_x86q.graph.reasons import Reason
from inductor_x86q.graph.recurrence import RECURRENCE, state_count
from inductor_x86q.inductor import objects
from inductor_x86q.kernels import isa
from inductor_x86q.kernels.recurrence import CELLS, FIELDS, Kernel, Recurrence

pytestmark = pytest.mark.skipif(not cpu.int8_lanes(), reason="this CPU has no AVX2")
EXACT = 60.0  # dB against the q/dq graph: floats differ in their last bits, and a state is rounded the other way now and then

# --- kernels by themselves --------------------------------------------------------------------------------------------

# Steps, rows, units, directions, batch first, initial states given, threads.
SHAPES = [
    (3, 7, 21, 2, True, True, 1),
    (4, 3, 32, 1, False, False, 2),
    (3, 1, 70, 2, False, True, 2),
    (2, 5, 3, 2, False, True, 3),
    (0, 2, 8, 1, False, True, 1),
    (2, 0, 8, 1, False, True, 1),
]


def run_kernel(
    kernel: Any, given: Recurrence, x: Any, states: Any, constants: torch.Tensor, sizes: dict[str, int]
) -> Any:
    directions, batch, hidden = sizes["directions"], sizes["batch"], sizes["hidden"]
    result = torch.full((x.shape[0], x.shape[1], directions * hidden), torch.nan)
    after = torch.full((state_count(given.cell), directions, batch, hidden), torch.nan)
    arguments = (ctypes.c_int64 * len(FIELDS))(*(sizes[field] for field in FIELDS))
    addresses = [0 if t is None else t.data_ptr() for t in (x, *(*states, None)[:2], constants, result, after)]
    objects.load(kernel)(*map(ctypes.c_void_p, addresses), arguments)
    return result, after


@pytest.mark.parametrize("name", isa.ISAS)
@pytest.mark.parametrize("cell", CELLS)
def test_a_kernel_computes_what_the_operator_says(name: str, cell: str) -> None:
    row = isa.ISAS[name]
    if not row.cpu_flags <= set(cpu.instruction_sets()):
        pytest.skip(f"this CPU has no {name}")
    gates = CELLS[cell][1]
    # Where products are added two by two, a weight of 7 bits keeps the sum of two within 16.
    for fits_16, shape in ((fits, shape) for fits in {False, not row.has_vnni} for shape in SHAPES):
        steps, batch, hidden, directions, batch_first, has_states, threads = shape
        given = Recurrence(cell, hidden, directions, row.lanes, fits_16)
        weight = torch.randint(-63 if fits_16 else -127, 64 if fits_16 else 128, (directions, gates * hidden, hidden))
        weight = weight.to(torch.int8)
        scale = torch.rand(directions, gates * hidden) / 127 / hidden**0.5
        bias = torch.randn(directions, hidden) if cell == "gru" else None
        width, rows = directions * gates * hidden, (batch, steps) if batch_first else (steps, batch)
        x = torch.randn(*rows, width)
        states = [3 * torch.randn(directions, batch, hidden) if has_states else None for _ in range(state_count(cell))]
        out = directions * hidden
        sizes = dict(steps=steps, batch=batch, hidden=hidden, directions=directions, threads=threads)
        sizes |= dict(x_step=width if batch_first else batch * width, x_row=steps * width if batch_first else width)
        sizes |= dict(out_step=out if batch_first else batch * out, out_row=steps * out if batch_first else out)
        result, after = run_kernel(
            Kernel(name, given.cell, given.fits_16), given, x, states, given.constants(weight, scale, bias), sizes
        )
        if not steps:
            continue
        expected = RECURRENCE(cell, x, *(*states, None)[:2], weight, scale, bias, batch_first)
        torch.testing.assert_close((result, after), expected, atol=2e-6, rtol=1e-5, msg=lambda m: f"{shape}: {m}")  # noqa: B023


# --- whole layers -----------------------------------------------------------------------------------------------------


class Layers(nn.Module):
    """Recurrent layers of all kinds, that read one input (rows, steps, 24)."""

    def __init__(self) -> None:
        super().__init__()
        self.deep = nn.LSTM(24, 20, num_layers=2, bidirectional=True, batch_first=True)
        self.plain = nn.LSTM(24, 40, bias=False)
        self.gru = nn.GRU(24, 16, bidirectional=True, batch_first=True)
        self.two = nn.GRU(24, 24, num_layers=2)
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
