"""x86q bench: what it prints and stores of starts, and that a second process starts from what the first left."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import inductor_x86q
from inductor_x86q import cli
from inductor_x86q.inductor import compiling
from inductor_x86q.report import tables
from inductor_x86q.tools import bench, engines


def test_an_engine_compiles_at_its_first_call_and_only_then():
    started = []

    def start():
        started.append(1)
        return lambda: len(started)

    run = engines._at_first_call(start)
    assert not started
    assert [run(), run()] == [1, 1]


def test_starts_have_columns_where_they_were_measured():
    plain = {"resnet18": [bench.Result("x86q", median=2.0, low=1.0, high=3.0, compile_seconds=9.0, snr=30.0)]}
    assert "cold s" not in tables.plain(bench.text(plain), 120)
    started = {"resnet18": [bench.Result("x86q", 2.0, 1.0, 3.0, 9.0, 8.25, 2.5, 640.0, 320.0, snr=30.0)]}
    header, _, row, *_ = tables.plain(bench.text(started), 120).splitlines()
    assert header.endswith("  cold s  warm s  peak MB   MB") and row.endswith("     8.2     2.5      640  320")
    assert len(header) == len(row)


def test_json_holds_null_for_what_was_not_measured():
    table = {"resnet18": [bench.Result("x86q", median=2.0, cold_seconds=8.25)]}
    text = bench.to_json(table, bench.Settings())
    (row,) = json.loads(text, parse_constant=pytest.fail)["results"]["resnet18"]
    assert (row["cold_seconds"], row["warm_seconds"]) == (8.25, None)


_FIGURES = {"x86q": (4.0, 1000), engines.PEAK: (2.0, 5000)}


class _Stopwatch:
    """A worker that says it takes so many milliseconds for so many multiply-accumulates."""

    def __init__(self, engine: str, *_: object) -> None:
        median, self.macs = _FIGURES[engine]
        self.result = bench.Result(engine, median)

    def slice(self, seconds: float) -> None: ...

    def finish(self) -> bench.Result:
        return self.result


def test_the_share_of_the_peak_is_of_multiply_accumulates_a_second(monkeypatch):
    monkeypatch.setattr(bench, "_Worker", _Stopwatch)
    (result,) = bench.measure("resnet18", ["x86q"], bench.Settings())
    assert result.of_peak == pytest.approx((1000 / 4) / (5000 / 2))


def test_multiply_accumulates_are_those_of_layers_and_attention():
    layer = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    with torch.no_grad():
        output, macs = bench._counted(layer, x := torch.randn(1, 5, 8))
        torch.testing.assert_close(output, layer(x))
    projections, products, feed_forward = 5 * 8 * (24 + 8), 2 * 5 * 5 * 8, 2 * 5 * 8 * 16
    assert macs == projections + products + feed_forward


def test_only_starts_keep_a_package(monkeypatch, tmp_path):
    def package(model, inputs, path, options):
        path.write_text(model)
        return path

    monkeypatch.setattr(inductor_x86q, "quantize", lambda model, inputs, calibration: model)
    monkeypatch.setattr(inductor_x86q, "package", package)
    monkeypatch.setattr(compiling, "load_package", lambda path: lambda x: Path(path).read_text())
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    engine = bench.ENGINES["x86q-package"]
    assert [engine(name, torch.zeros(1))() for name in ("first", "second")] == ["first", "second"]
    monkeypatch.setenv("INDUCTOR_X86Q_BENCH_PACKAGE", str(tmp_path / "model.pt2"))
    assert [engine(name, torch.zeros(1))() for name in ("first", "second")] == ["first", "first"]


@pytest.mark.slow
def test_a_second_process_starts_from_the_package_of_the_first():
    pytest.importorskip("torchvision")
    settings = bench.Settings(size=32, seconds=0.1)
    (result,) = bench.measure("resnet18", ["x86q-package"], settings, rounds=1, starts=True)
    assert result.error == "" and result.snr > 10
    assert result.warm_seconds < result.cold_seconds / 4
    assert 100 < result.resident_megabytes < result.peak_megabytes
    assert 0 < result.of_peak < 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--json", "no/such/directory/figures.json"], "cannot write 'no/such/directory/figures.json'"),
        (["--engines", "x86q,nothing"], "unknown engine 'nothing'"),
        (["--plot", "figures.png"], "--plot: matplotlib is not installed"),
    ],
)
def test_what_cannot_be_done_is_said_before_anything_is_measured(
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bench, "obstacle", lambda: "matplotlib is not installed")
    monkeypatch.setattr(bench, "measure", lambda *_, **__: pytest.fail("it measured"))
    try:
        code = cli.main(["bench", "resnet18", *arguments])
    except SystemExit as left:  # as argparse does
        code = left.code
    assert code == cli.UNUSABLE and message in capsys.readouterr().err
