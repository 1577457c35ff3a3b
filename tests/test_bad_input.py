"""Arguments that make no sense: the error says so in a sentence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import nn

import inductor_x86q
from inductor_x86q import testing
from inductor_x86q.errors import CompileError, QuantizationError
from tests.models import EightBits, X

Q = testing.qdq_graph(EightBits(), (X,))
NET = nn.Sequential(nn.Linear(32, 32)).eval()

BAD_INPUT: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "quantize: no model": (lambda: inductor_x86q.quantize(None, (X,), calibration=[X]), QuantizationError, "Module"),  # type: ignore[arg-type]
    "quantize: a bare tensor": (lambda: inductor_x86q.quantize(NET, X, calibration=[X]), QuantizationError, "tuple"),  # type: ignore[arg-type]
    "quantize: calibration is no iterable": (
        lambda: inductor_x86q.quantize(NET, (X,), calibration=5), QuantizationError, "calibration"),  # type: ignore[arg-type]
    "quantize: calibration of another type": (
        lambda: inductor_x86q.quantize(NET, (X,), calibration=["x"]), QuantizationError, "calibration"),
    "quantize: calibration of another width": (
        lambda: inductor_x86q.quantize(NET, (X,), calibration=[X[:, :3]]), QuantizationError, "calibration"),
    "quantize: calibration of NaN": (
        lambda: inductor_x86q.quantize(NET, (X,), calibration=[X * float("nan")]), QuantizationError, "NaN"),
    "quantize: exclude is a number": (
        lambda: inductor_x86q.quantize(NET, (X,), calibration=[X], exclude=3), QuantizationError, "exclude"),  # type: ignore[arg-type]
    "quantize: exclude has a number": (
        lambda: inductor_x86q.quantize(NET, (X,), calibration=[X], exclude=[3]), QuantizationError, "exclude"),  # type: ignore[list-item]
    "convert: not prepared": (lambda: inductor_x86q.convert(5), QuantizationError, "prepared is a int"),  # type: ignore[arg-type]
    "explain: no model": (lambda: inductor_x86q.explain(3, (X,)), CompileError, "model is a int"),  # type: ignore[arg-type]
    "explain: a bare tensor": (lambda: inductor_x86q.explain(Q, X), CompileError, "expected a tuple"),  # type: ignore[arg-type]
    "explain: an unknown option": (lambda: inductor_x86q.explain(Q, (X,), options={"no": 1}), CompileError, "unknown option"),
    "explain: an unknown mode": (lambda: inductor_x86q.explain(Q, (X,), mode="no"), CompileError, "no"),
    "explain: strict is a number": (
        lambda: inductor_x86q.explain(Q, (X,), options={"strict": 1}), CompileError, "expected True or False"),
    "explain: options are a list": (lambda: inductor_x86q.explain(Q, (X,), options=["strict"]), CompileError, "options"),  # type: ignore[arg-type]
    "explain: mode is a number": (lambda: inductor_x86q.explain(Q, (X,), mode=3), CompileError, "mode"),  # type: ignore[arg-type]
    "cpp_code: no model": (lambda: inductor_x86q.cpp_code(None, (X,)), CompileError, "model is a NoneType"),  # type: ignore[arg-type]
    "cpp_code: no such layer": (lambda: inductor_x86q.cpp_code(Q, (X,), layer="no"), CompileError, "no"),
    "why: no such node": (lambda: inductor_x86q.why(Q, (X,), "no"), CompileError, "no stage's graph has"),
    "package: no model": (lambda: inductor_x86q.package(3, (X,), "x.pt2"), CompileError, "model"),  # type: ignore[arg-type]
    "package: a bare tensor": (lambda: inductor_x86q.package(Q, X, "x.pt2"), CompileError, "tuple"),  # type: ignore[arg-type]
    "register_pass: no such stage": (
        lambda: inductor_x86q.register_pass("no", inductor_x86q.Rule("r", (), lambda n: None, lambda n, f: None)),
        ValueError, "no stage 'no'"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input(name: str) -> None:
    call, error, message = BAD_INPUT[name]
    with pytest.raises(error, match=message) as caught:
        call()
    assert len(str(caught.value)) < 2000  # a sentence, no dump
