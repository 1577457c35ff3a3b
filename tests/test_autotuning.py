"""max-autotune's choices: silent on the user's screen, in the debug log, shown where they are asked for."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

import inductor_x86q
from inductor_x86q import cpu, progress

pytestmark = pytest.mark.skipif(not cpu.int8_lanes(), reason="kernels are generated for CPUs with AVX2")
UNCACHED = {"max_autotune": True, "fx_graph_cache": False, "autotune_local_cache": False}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    x = torch.randn(8, 32)
    return inductor_x86q.quantize(nn.Linear(32, 48).eval(), (x,), calibration=[x]), x


def compiled(model, **options):
    q, x = model
    torch.compiler.reset()
    with torch.no_grad():
        return torch.compile(q, backend="inductor_x86q", options={**UNCACHED, **options})(x)


def test_nothing_is_printed_and_times_are_in_the_debug_log(model, capfd, caplog):
    with caplog.at_level(logging.DEBUG, "inductor_x86q.inductor.autotuning"):
        compiled(model)
    out, err = capfd.readouterr()
    assert "AUTOTUNE" not in out + err and "Choices" not in out + err
    lines = [record.getMessage() for record in caplog.records if record.name == "inductor_x86q.inductor.autotuning"]
    assert len(lines) >= 2 and all(" takes " in line and " ms" in line for line in lines)
    assert any("qlinear" in line for line in lines)


def test_tables_can_be_asked_for(model, capfd):
    compiled(model, autotune_num_choices_displayed=3)
    assert "AUTOTUNE" in capfd.readouterr().err


def test_choices_count_as_progress(model, monkeypatch, capsys):
    monkeypatch.setattr(progress, "is_visible", lambda: True)
    compiled(model)
    err = capsys.readouterr().err
    assert "choosing kernels" in err and " 1 " in err
    assert progress._shown is None


def test_other_compiles_are_not_followed(model, caplog):
    """What follows the choices is gone when the compile has ended, and Inductor's own settings are as before."""
    from torch._inductor import config, select_algorithm

    before = config.autotune_num_choices_displayed
    compiled(model)
    assert select_algorithm.get_algorithm_selector_cache().feedback_saver_fns == []
    assert config.autotune_num_choices_displayed == before != 0
