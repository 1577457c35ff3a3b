"""Our compiles and other compiles in one process leave each other alone, whatever is imported and in which order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests import stock
from tests.models import quantized_net

# Plain Inductor's code and config for a model with and without q/dq nodes, before and after compiles by our backend.
ISOLATION = r"""
{stock_code}
import sys
from torch import nn
{imports}

torch.manual_seed(0)
saved = torch.export.load("net.pt2").module()
other = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Hardswish(), nn.Flatten(), nn.Linear(8 * 14 * 14, 4), nn.GELU()).eval()
x = torch.randn(2, 3, 16, 16)

def plain():
    return [*stock_code(other, x, freezing=False), *stock_code(saved, x)]

def ours():
    torch._dynamo.reset()
    with torch.no_grad():
        got = torch.compile(saved, backend="inductor_x86q")(x)
        assert 20 * torch.log10(saved(x).norm() / (got - saved(x)).norm()) > 30

def config():
    copy = torch._inductor.config.get_config_copy()
    return {{name: re.sub("0x[0-9a-f]+", "", repr(value)) for name, value in copy.items()}}

def check():
    now = config()
    assert now == settings, {{n: (settings.get(n), now.get(n)) for n in now.keys() | settings if now.get(n) != settings.get(n)}}
    torch._dynamo.reset()
    with torch.no_grad(), torch._inductor.config.patch(freezing=True):
        torch.compile(saved)(x)  # with the graph caches on, whose classes must be as they were
    for before, after in zip(first, plain(), strict=True):
        lines = before.splitlines()
        assert after == before, [line for line in after.splitlines() if line not in lines]

first, settings = plain(), config()
ours()
check()
ours()
check()
print("torchao" in sys.modules)
"""


@pytest.fixture(scope="module")
def saved_net(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("saved") / "net.pt2"
    with torch.no_grad():
        torch.export.save(torch.export.export(quantized_net(), (torch.randn(2, 3, 16, 16),)), path)
    return path.read_bytes()


@pytest.mark.parametrize(
    ("imports", "has_torchao"),
    [
        ("import torch.ao.quantization.fx._decomposed", "False"),
        ("import torchao.quantization.pt2e.quantizer.x86_inductor_quantizer", "True"),
    ],
    ids=["torch alone", "with torchao's quantizer"],
)
def test_other_compiles_are_untouched(
    run_python: Any, saved_net: bytes, tmp_path: Any, imports: str, has_torchao: str
) -> None:
    (tmp_path / "net.pt2").write_bytes(saved_net)
    assert (
        run_python(ISOLATION.format(imports=imports, stock_code=Path(stock.__file__).read_text())).stdout.strip()
        == has_torchao
    )


NO_IMPORT = """
import sys, torch
import torch.ao.quantization.fx._decomposed
model = torch.export.load("net.pt2").module()
assert not any(name.startswith(("inductor_x86q", "torchao")) for name in sys.modules)
x = torch.randn(2, 3, 16, 16)
with torch.no_grad():
    got = torch.compile(model, backend="inductor_x86q", options={"strict": True})(x)
    assert 20 * torch.log10(model(x).norm() / (got - model(x)).norm()) > 30
assert not any(name.startswith("torchao") for name in sys.modules), "compiling imported torchao"
"""


def test_needs_no_import_of_the_package(run_python: Any, saved_net: bytes, tmp_path: Any) -> None:
    (tmp_path / "net.pt2").write_bytes(saved_net)
    done = run_python(NO_IMPORT)
    assert done.stdout == ""


FIRST_COMPILE = """
import torch
from torch._inductor.fx_passes import freezing_patterns
from inductor_x86q import inspection
from inductor_x86q import testing

class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = testing.QConv2d(8, 8, 3, padding=1)

    def forward(self, x):
        return torch.sigmoid(self.conv(testing.quantize_dequantize(x)))

inputs = (torch.randn(1, 8, 6, 6),)
q = testing.qdq_graph(Block(), inputs)
lists = [freezing_patterns.pass_patterns]
report = inspection.explain(q, inputs)
assert freezing_patterns.pass_patterns is lists[0]
print(len(report.fused), len(freezing_patterns.pass_patterns))
"""

WITHOUT_US = """
from torch._inductor.fx_passes import freezing_patterns

freezing_patterns.lazy_init()
print(1, len(freezing_patterns.pass_patterns))
"""


def test_what_freezing_registers_at_first_is_filtered_and_kept(run_python: Any) -> None:
    assert run_python(FIRST_COMPILE).stdout == run_python(WITHOUT_US).stdout
