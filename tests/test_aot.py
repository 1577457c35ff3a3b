"""Packages: what is inside, what they compute in Python and in C++, and what they refuse."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

import inductor_x86q
from inductor_x86q import aot, cli
from inductor_x86q.aot import stored
from inductor_x86q.errors import CompileError, StrictError
from inductor_x86q.graph.reasons import Reason
from inductor_x86q.report import Operation, Report, RuleCount

ROOT = Path(__file__).parent.parent


class Residual(nn.Module):
    """A block with a sum, a linear behind it, and enough weights for sizes to mean something."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 64, 3, padding=1)
        self.second = nn.Conv2d(64, 64, 3, padding=1)
        self.third = nn.Conv2d(64, 64, 3, padding=1)
        self.head = nn.Linear(64, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x).relu()
        x = (self.third(self.second(x).relu()) + x).relu()
        return self.head(x.mean((2, 3)))


LAYERS = ["first", "second", "third", "head"]


def quantized() -> tuple[torch.fx.GraphModule, torch.Tensor]:
    torch.manual_seed(0)
    x = torch.randn(4, 3, 16, 16)
    return inductor_x86q.quantize(Residual().eval(), (x,), calibration=[x], reduce_range=True), x


@pytest.fixture(scope="module")
def model():
    return quantized()


@pytest.fixture(scope="module")
def static(model, tmp_path_factory):
    """A package of fixed shapes."""
    q, x = model
    return aot.package(q, (x,), tmp_path_factory.mktemp("static") / "model.pt2")


@pytest.fixture(scope="module")
def any_batch(model, tmp_path_factory):
    q, x = model
    path = tmp_path_factory.mktemp("batch") / "model.pt2"
    return aot.package(q, (x,), path, dynamic_shapes=({0: torch.export.Dim("batch")},))


def assert_close(result: torch.Tensor, reference: torch.Tensor, least: float = 35) -> None:
    """A few integers inside may differ by one step; without the int8 layers' help nothing gets this close (in dB)."""
    noise = (result - reference).pow(2).mean()
    assert result.shape == reference.shape
    assert 10 * torch.log10(reference.pow(2).mean() / noise) > least


def test_a_package_computes_what_the_graph_does(model, static):
    q, x = model
    run = torch._inductor.aoti_load_package(static)
    assert static.endswith("model.pt2")
    assert_close(run(x), q(x))
    assert torch.equal(run(x), run(x))


def test_a_package_computes_what_torch_compile_does(model, static):
    q, x = model
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(q, backend="inductor_x86q", dynamic=False)(x)
    assert torch.equal(torch._inductor.aoti_load_package(static)(x), compiled)


@pytest.mark.parametrize("batch", [1, 2, 7])
def test_dynamic_batch(model, any_batch, batch):
    q, _ = model
    x = torch.randn(batch, 3, 16, 16, generator=torch.Generator().manual_seed(batch))
    result = torch._inductor.aoti_load_package(any_batch)(x)
    assert result.shape == (batch, 32)
    assert_close(result, q(x))


@pytest.mark.parametrize("dynamic", ["per_tensor", "per_token"])
def test_scales_computed_at_every_call_with_any_batch(dynamic, tmp_path):
    net = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 16)).eval()
    x = torch.randn(4, 32)
    q = inductor_x86q.quantize(net, (x,), dynamic=dynamic)
    path = aot.package(q, (x,), tmp_path / "model.pt2", dynamic_shapes=({0: torch.export.Dim("batch")},))
    report = aot.read_report(path)
    assert [f.operator for f in report.fused] == ["linear", "linear"] and not report.missed
    run = torch._inductor.aoti_load_package(path)
    for batch, size in ((1, 1.0), (7, 100.0)):  # other sizes, other ranges
        x = size * torch.randn(batch, 32)
        assert_close(run(x), q(x))
        assert_close(run(x), net(x), least=25)


def test_the_report_inside_is_read_back(static, any_batch):
    report = aot.read_report(static)
    assert [f.layer for f in report.fused] == LAYERS
    assert [f.operator for f in report.fused] == ["conv", "conv", "conv", "linear"]
    assert report.fused[0].output_shape == (4, 64, 16, 16)
    assert report.fused[0].macs == 4 * 64 * 16 * 16 * 3 * 9
    assert report.missed == [] and report.kept_float == []
    assert not isinstance(aot.read_report(any_batch).fused[0].output_shape[0], int)


def test_the_report_is_where_torch_puts_extra_files(static):
    contents = torch.export.pt2_archive._package.load_pt2(static)
    assert '"schema": "inductor_x86q.report"' in contents.extra_files[aot.REPORT_FILE]
    assert "model" in contents.aoti_runners


def test_a_report_from_a_package_can_be_shown_as_the_one_of_explain(model, static):
    """All of it comes back typed: nodes, generated operations and passes too."""
    q, x = model
    inside, explained = aot.read_report(static), inductor_x86q.explain(q, (x,))
    assert inside.summary() == explained.summary()
    assert inside.table(120) == explained.table(120)
    assert [n.kind for n in inside.nodes] == [n.kind for n in explained.nodes]
    assert [n.shape for n in inside.nodes if n.kind == "input"] == [(4, 3, 16, 16)]
    assert {type(item) for item in inside.generated} == {Operation} and {type(i) for i in inside.passes} == {RuleCount}


def test_the_command_line_explains_a_package(static, tmp_path, capsys):
    assert cli.main(["explain", static, "--strict"]) == cli.DONE
    assert "4 of 4 layers in int8" in capsys.readouterr().out
    for option in ("--timing", "--drift"):
        assert cli.main(["explain", static, option]) == cli.UNUSABLE
        assert f"is a package, compiled already: {option} needs the model" in capsys.readouterr().err


def test_the_report_of_a_later_version_is_read_and_of_a_later_schema_refused():
    text = stored.to_json(Report([], [], []))
    assert stored._from_json(text.replace('"missed"', '"unheard_of": 1, "missed"'), "x.pt2") == Report([], [], [])
    with pytest.raises(CompileError, match=r"'x.pt2', made by inductor_x86q .*: the report has version 99"):
        stored._from_json(text.replace('"version": 1', '"version": 99'), "x.pt2")


def test_weights_are_stored_once_in_int8(static):
    """86,000 weights: beside them there is the code, and neither a second copy nor the float weights."""
    weights = sum(p.numel() for p in Residual().parameters())
    with zipfile.ZipFile(static) as archive:
        (library,) = [i for i in archive.infolist() if i.filename.endswith(".so")]
        text = archive.read(next(i for i in archive.infolist() if i.filename.endswith("wrapper.cpp"))).decode()
    sizes = [int(line.split("= ")[1].rstrip(";")) for line in text.splitlines() if "].data_size = " in line]
    assert weights < sum(sizes) < 1.15 * weights
    assert library.file_size < sum(sizes) + 500_000


@pytest.fixture(scope="module")
def unfusable():
    class Asymmetric(nn.Linear):
        def __init__(self) -> None:
            super().__init__(32, 32)
            self.register_buffer("integers", torch.randint(-128, 128, (32, 32), dtype=torch.int8))
            self.register_buffer("scale", torch.full((32,), 0.01))
            self.register_buffer("zero_point", torch.full((32,), 3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            ops = torch.ops.quantized_decomposed
            arguments = (self.scale, self.zero_point, 0, -128, 127, torch.int8)
            return nn.functional.linear(x, ops.dequantize_per_channel(self.integers, *arguments), self.bias)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.odd_one = Asymmetric()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            ops = torch.ops.quantized_decomposed
            x = ops.quantize_per_tensor(x, 0.02, 60, 0, 127, torch.uint8)
            return self.odd_one(ops.dequantize_per_tensor(x, 0.02, 60, 0, 127, torch.uint8))

    torch.manual_seed(0)
    x = torch.randn(8, 32)
    return Net().eval().requires_grad_(False), x


def test_a_layer_that_cannot_be_fused_stops_the_package(unfusable, tmp_path):
    net, x = unfusable
    with pytest.raises(StrictError, match=r"odd_one \(linear\): .*zero point other than 0"):
        aot.package(net, (x,), tmp_path / "net.pt2")
    assert not (tmp_path / "net.pt2").exists()


def test_without_strict_it_is_named_and_stays_float(unfusable, tmp_path, caplog):
    net, x = unfusable
    path = aot.package(net, (x,), tmp_path / "net.pt2", strict=False)
    assert "odd_one (linear)" in caplog.text
    assert [(m.layer, m.reason) for m in aot.read_report(path).missed] == [("odd_one", Reason.WEIGHT_TYPE)]
    torch.testing.assert_close(torch._inductor.aoti_load_package(path)(x), net(x))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": 3}, "model is a int"),
        ({"example_inputs": [1]}, "example_inputs is a list"),
        ({"path": "model.so"}, "ends in .pt2"),
        ({"path": "/nowhere/model.pt2"}, "the directory of '/nowhere/model.pt2' does not exist"),
        ({"options": {"fast": True}}, "unknown option 'fast'"),
    ],
)
def test_arguments_are_checked_before_anything_is_compiled(model, tmp_path, arguments, message):
    q, x = model
    with pytest.raises(CompileError, match=message):
        aot.package(**{"model": q, "example_inputs": (x,), "path": tmp_path / "model.pt2", **arguments})


def test_a_graph_that_is_not_frozen_is_no_package(model, tmp_path):
    q, x = model
    with pytest.raises(CompileError, match="freez"):
        aot.package(q, (x,), tmp_path / "model.pt2", options={"freezing": False})
    assert not (tmp_path / "model.pt2").exists()


def test_read_report_says_what_a_file_is_not(tmp_path):
    with pytest.raises(CompileError, match="there is no file"):
        aot.read_report(tmp_path / "none.pt2")
    (tmp_path / "text.pt2").write_text("text")
    with pytest.raises(CompileError, match=r"is not a \.pt2 package"):
        aot.read_report(tmp_path / "text.pt2")
    torch.export.save(torch.export.export(nn.ReLU(), (torch.ones(2),)), tmp_path / "relu.pt2")
    with pytest.raises(CompileError, match="has no report"):
        aot.read_report(tmp_path / "relu.pt2")


def test_a_saved_graph_keeps_the_names_and_source_lines_of_its_layers(model, tmp_path):
    q, x = model
    torch.export.save(torch.export.export(q, (x,)), tmp_path / "q.pt2")
    loaded = torch.export.load(tmp_path / "q.pt2").module()
    before, after = (inductor_x86q.explain(graph, (x,)).fused for graph in (q, loaded))
    assert [f.layer for f in before] == LAYERS
    assert before == after
    assert all(f.source for f in after)
    assert {name for name, _ in loaded.named_buffers() if name.endswith("_int8")} == {
        f"{n.replace('.', '__')}__weight_int8" for n in LAYERS
    }


def test_a_saved_graph_computes_the_same(model, tmp_path):
    q, x = model
    torch.export.save(torch.export.export(q, (x,)), tmp_path / "q.pt2")
    assert torch.equal(torch.export.load(tmp_path / "q.pt2").module()(x), q(x))


# --- three processes --------------------------------------------------------------------------------------------------

QUANTIZE = """
    import torch
    from tests.test_aot import quantized
    q, x = quantized()
    torch.export.save(torch.export.export(q, (x,)), "q.pt2")
    x.numpy().tofile("input.bin")
"""

PACKAGE = """
    import torch
    from inductor_x86q.aot import package
    program = torch.export.load("q.pt2")
    (x,), _ = program.example_inputs
    package(program.module(), (x,), "model.pt2")
    torch._inductor.aoti_load_package("model.pt2")(x).numpy().tofile("python.bin")
"""


def in_a_process(code: str, directory: Path) -> None:
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-c", textwrap.dedent(code)]
    subprocess.run(command, cwd=directory, env={**os.environ, "PYTHONPATH": path}, check=True, timeout=600)


@pytest.mark.slow
def test_quantize_package_and_run_in_three_processes(runner, tmp_path):
    in_a_process(QUANTIZE, tmp_path)
    in_a_process(PACKAGE, tmp_path)
    command = [runner, "model.pt2", "input.bin", "4,3,16,16", "cpp.bin"]
    out = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout.splitlines()
    python = (tmp_path / "python.bin").read_bytes()
    assert (tmp_path / "cpp.bin").read_bytes() == python and len(python) == 4 * 32 * 4
    best = torch.frombuffer(bytearray(python), dtype=torch.float32)[:32].topk(5).indices.tolist()
    assert [int(line.split()[0]) for line in out[:5]] == best
    assert out[5].startswith("median ") and out[5].endswith(" ms")


@pytest.mark.slow
def test_the_runner_refuses_another_shape(runner, static, tmp_path):
    (tmp_path / "input.bin").write_bytes(bytes(3 * 16 * 16 * 4))
    command = [runner, static, "input.bin", "1,3,16,16"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert "expected: 4, but got: 1" in done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.torchvision
def test_the_package_of_resnet50_is_at_most_three_tenths_of_the_float_one(tmp_path):
    models = pytest.importorskip("torchvision.models")
    net, x = models.resnet50().eval(), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        program = torch.export.export(net, (x,))
        path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "float.pt2"))
    q = inductor_x86q.quantize(net, (x,), calibration=[x])
    ours = aot.package(q, (x,), tmp_path / "int8.pt2")
    assert os.path.getsize(ours) <= 0.30 * os.path.getsize(path)
