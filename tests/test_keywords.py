"""Arguments by name: quantize(), calibration, the compiled graph, packages and what inspects; results of any type."""

from __future__ import annotations

import dataclasses
from collections import UserDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

import inductor_x86q
from inductor_x86q import inspection, testing
from inductor_x86q.graph import qdq


@dataclasses.dataclass
class Output:
    state: torch.Tensor
    pooled: torch.Tensor


torch.export.register_dataclass(Output, serialized_type_name="tests.test_keywords.Output")


class Encoder(nn.Module):
    """As encoders are called: by names, in any order, some left out; what it returns is a type of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 16)
        self.first, self.second = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor, kinds: torch.Tensor | None = None) -> Output:
        x = self.embedding(ids) * mask[..., None]
        x = x if kinds is None else x + kinds[..., None]
        x = self.second(torch.relu(self.first(x)))
        return Output(x, x.mean(1))


def call(rows: int = 2, *, largest: int = 50) -> dict[str, torch.Tensor]:
    return {"mask": torch.ones(rows, 6), "ids": torch.randint(0, largest, (rows, 6))}


def encoder() -> nn.Module:
    torch.manual_seed(0)
    return Encoder().eval()


def quantized(**keywords: Any) -> Any:
    example = call()
    return inductor_x86q.quantize(
        encoder(), (), kwargs=example, **{"calibration": [example], "reduce_range": True, **keywords}
    )


def scales(graph_module: Any) -> list[float]:
    return [qdq.qparams(node).scale for node in graph_module.graph.nodes if qdq.is_quantize(node)]


# --- what quantize() gives --------------------------------------------------------------------------------------------


def test_the_graph_takes_names_in_any_order_positions_and_any_batch() -> None:
    graph_module, x = quantized(), call(5)
    by_name = graph_module(ids=x["ids"], mask=x["mask"])
    by_position = graph_module(x["mask"], x["ids"])  # the example's order
    assert isinstance(by_name, Output)
    assert torch.equal(by_name.state, by_position.state)
    assert testing.snr(by_name.state, encoder()(**x).state) > 25


def test_some_by_position_and_some_by_name() -> None:
    x = call()
    graph_module = inductor_x86q.quantize(
        encoder(), (x["ids"],), kwargs={"kinds": x["mask"], "mask": x["mask"]}, calibration=[{**x, "kinds": x["mask"]}]
    )
    found = graph_module(x["ids"], mask=x["mask"], kinds=x["mask"])
    assert testing.snr(found.state, encoder()(**x, kinds=x["mask"]).state) > 25


def test_calibration_takes_dictionaries_and_tuples_alike() -> None:
    x = call()
    forms: list[Any] = [[x], [UserDict(x)], [(x["mask"], x["ids"])], [[x["mask"], x["ids"]]], ({**x} for _ in range(1))]
    found = [scales(quantized(calibration=form)) for form in forms]
    assert found[1:] == found[:1] * 4


def test_calibration_by_name_of_a_graph_that_was_made_by_position() -> None:
    x = call()
    example = (x["ids"], x["mask"])
    found = [
        scales(inductor_x86q.quantize(encoder(), example, calibration=[data], reduce_range=True))
        for data in (x, example)
    ]
    assert found[0] == found[1]


def test_dimensions_that_are_named_by_their_argument_stay_open() -> None:
    sizes = {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}
    example = call(1)
    graph_module = inductor_x86q.quantize(
        encoder(), (), kwargs=example, dynamic="per_token", dynamic_shapes={"ids": sizes, "mask": sizes}
    )
    assert graph_module(ids=torch.ones(3, 9, dtype=torch.long), mask=torch.ones(3, 9)).state.shape == (3, 9, 16)


def test_training_takes_names() -> None:
    prepared = inductor_x86q.prepare_qat(encoder().train(), (), kwargs=call())
    prepared(**call()).pooled.sum().backward()
    assert inductor_x86q.convert(prepared)(**call(3)).pooled.shape == (3, 16)


# --- compiled ---------------------------------------------------------------------------------------------------------


def test_compiled_calls_by_name_give_the_models_type() -> None:
    graph_module, x = quantized(), call()
    outputs, report = inspection.run_fused(graph_module, (), x)
    assert [fusion.layer for fusion in report.fused] == ["first", "second"]
    assert isinstance(outputs, Output)
    testing.assert_same(outputs.state, graph_module(**x).state, min_snr=35)


def test_torch_compile_and_the_assertions_take_names() -> None:
    graph_module, x = quantized(), call()
    compiled = testing.assert_close_to_reference(graph_module, (), kwargs=x, min_snr=35)
    assert isinstance(compiled.outputs, Output)
    testing.assert_fused(graph_module, (), {"qlinear": 2}, kwargs=x)
    with torch.no_grad():
        front = torch.compile(graph_module, backend="inductor_x86q")(ids=x["ids"], mask=x["mask"])
    testing.assert_same(front.state, compiled.outputs.state)


def test_inspection_takes_names() -> None:
    graph_module, x = quantized(), call()
    report = inductor_x86q.explain(graph_module, (), kwargs=x, drift=encoder())
    assert len(report.fused) == 2
    assert report.drift is not None
    assert {row.layer for row in report.drift.layers} == {"first", "second"}
    assert inductor_x86q.why(graph_module, (), "first", kwargs=x)
    code = inductor_x86q.cpp_code(graph_module, (), kwargs=x, options={"kernels": "onednn"})
    assert testing.kernel_calls(code)["qlinear"] == 2


def test_a_package_takes_names_and_gives_the_models_type(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graph_module, x = quantized(), call()
    path = inductor_x86q.package(graph_module, (), tmp_path / "encoder.pt2", kwargs=x)
    outputs = inductor_x86q.load(path)(ids=x["ids"], mask=x["mask"])
    assert isinstance(outputs, Output)
    testing.assert_same(outputs.state, graph_module(**x).state, min_snr=35)

    known = pytree.treespec_loads

    def loads(spec: str) -> Any:
        if "Output" in spec:
            raise NotImplementedError("the serialized type is not registered")
        return known(spec)

    monkeypatch.setattr(pytree, "treespec_loads", loads)
    with pytest.raises(inductor_x86q.CompileError, match=r"import the library .*tests\.test_keywords\.Output"):
        inductor_x86q.load(path)


# --- errors -----------------------------------------------------------------------------------------------------------


def test_names_that_the_model_does_not_take() -> None:
    x = call()
    with pytest.raises(
        inductor_x86q.QuantizationError, match=r"example does not fit.*no argument named 'labels'.*'ids'"
    ):
        inductor_x86q.quantize(encoder(), (), kwargs={**x, "labels": x["ids"]}, dynamic=True)
    with pytest.raises(inductor_x86q.QuantizationError, match="not given 'mask'"):
        inductor_x86q.quantize(encoder(), (x["ids"],), dynamic=True)
    with pytest.raises(inductor_x86q.QuantizationError, match=r"call 1 .*ids: \(2, 6\).*no argument named 'kinds'"):
        quantized(calibration=[x, {**x, "kinds": x["mask"]}])
    with pytest.raises(inductor_x86q.QuantizationError, match="expected an iterable of calls"):
        quantized(calibration=x)
    with pytest.raises(inductor_x86q.QuantizationError, match="kwargs is a list: expected a dictionary"):
        inductor_x86q.quantize(encoder(), (), kwargs=[x], dynamic=True)  # type: ignore[arg-type]


def test_names_that_the_graph_does_not_take(tmp_path: Path) -> None:
    graph_module, x = quantized(), call()
    with pytest.raises(inductor_x86q.CompileError, match="no argument named 'kinds': it takes 'mask', 'ids'"):
        inductor_x86q.explain(graph_module, (), kwargs={**x, "kinds": x["mask"]})
    with pytest.raises(inductor_x86q.CompileError, match="was not given 'ids'"):
        inductor_x86q.package(graph_module, (x["mask"],), tmp_path / "x.pt2")
