"""What of torch is replaced and relied on: all of it is declared, and missed at the first compile where it is missing."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from inductor_x86q import CompileError, inspection, testing
from inductor_x86q.inductor import supported
from inductor_x86q.inductor.patches import PATCHES
from inductor_x86q.inductor.requirements import Needs
from inductor_x86q.testing import QLinear, quantize_dequantize
from inductor_x86q.version import __version__
from tests import structure


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = QLinear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(quantize_dequantize(x))


@pytest.fixture
def first_compile() -> Iterator[None]:
    """What is relied on is looked up again."""
    supported.require.cache_clear()
    yield
    supported.require.cache_clear()


def test_all_is_there_on_this_torch(first_compile: None) -> None:
    supported.require()


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.attribute)
def test_a_patch_says_what_it_is_for(patch: Any) -> None:
    for field in ("why", "since", "until", "instead", "relies_on"):
        assert re.fullmatch(r"\S.*\S", getattr(patch, field), re.DOTALL), field
    assert re.search(r"#\d+|[Nn]one filed", patch.until), "until: an issue or pull request, or that there is none"


def test_the_page_lists_all() -> None:
    page = supported.page()
    for patch in PATCHES:
        assert f"`{patch.module}.{patch.attribute}`" in page and patch.why in page
    for part in supported.INTERFACES:
        assert f"### {part.name}" in page


def test_what_reaches_inductor_declares_it() -> None:
    declared = {part.name.rstrip("/").removesuffix(".py") for part in supported.INTERFACES} | {"patches"}
    modules = [(name, path) for name, path in structure.sources().items() if name.startswith("inductor.")]
    undeclared = {
        name for name, path in modules if any(structure.private_uses(path)) and name.split(".")[1] not in declared
    }
    assert undeclared == set()


def test_what_is_missing_is_named_at_the_first_compile(first_compile: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import compile_fx, graph

    inputs = (torch.randn(4, 16),)
    quantized = testing.qdq_graph(Block(), inputs)
    monkeypatch.delattr(graph, "maybe_layout_constraints")
    monkeypatch.setattr(compile_fx, "fake_tensor_prop", lambda gm: None)
    with pytest.raises(CompileError) as raised:
        inspection.explain(quantized, inputs)
    said = str(raised.value)
    assert said.startswith(f"torch {torch.__version__} is not supported by inductor_x86q {__version__}: ")
    assert "torch._inductor.graph has no maybe_layout_constraints (patches/operand_layouts.py)" in said
    assert "torch._inductor.compile_fx.fake_tensor_prop does not use `FakeTensorProp` (patches/fake_values.py)" in said
    assert "2.13.0" in said


@pytest.mark.parametrize(
    ("needs", "missing"),
    [
        (Needs("torch._inductor.no_such"), "there is no module torch._inductor.no_such"),
        (Needs("torch.fx", "Graph.no_such"), "torch.fx has no Graph.no_such"),
        (Needs("torch.fx", "Graph.lint"), None),
        (Needs("torch.fx", "Graph.node_copy", parameters=("node", "how")), "torch.fx.Graph.node_copy takes no `how`"),
        (Needs("torch.fx", "Graph.lint", looks_up=("Graph",)), "torch.fx.Graph.lint does not use `Graph`"),
    ],
)
def test_needs(needs: Needs, missing: str | None) -> None:
    assert needs.missing() == missing


def test_no_two_patches_replace_the_same() -> None:
    assert len({(patch.module, patch.attribute) for patch in PATCHES}) == len(PATCHES)
