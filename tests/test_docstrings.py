"""The reference: it names everything public, and the examples in docstrings give what they say."""

from __future__ import annotations

import doctest
import functools
import io
import re
from pathlib import Path
from typing import Any

import pytest

import inductor_x86q
from inductor_x86q import pytest_plugin, report, testing
from inductor_x86q.backend import inductor_x86q as backend

REFERENCE = Path(__file__).parent.parent / "examples" / "reference" / "index.rst"
PUBLIC = {
    **{name: getattr(inductor_x86q, name) for name in inductor_x86q.__all__ if name != "__version__"},
    **{f"testing.{name}": getattr(testing, name) for name in testing.__all__},
    "backend.inductor_x86q": backend,
}
# Where one line says it all, or the example of another name shows it.
WITHOUT_EXAMPLE = {
    "CompileError", "No", "QuantizationError", "Rule", "testing.Compiled", "testing.PINNED", "testing.QConv1d",
    "testing.QConv2d", "testing.QConv3d", "testing.QLinear", "testing.assert_expected_cpp", "testing.compile_once",
    "testing.float_calls", "testing.int8_calls", "testing.own_calls",
}  # fmt: skip
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE | doctest.IGNORE_EXCEPTION_DETAIL


@pytest.mark.parametrize("name", sorted(PUBLIC.keys() - WITHOUT_EXAMPLE))
def test_the_example_of(name: str, names: dict[str, Any]) -> None:
    test = doctest.DocTestParser().get_doctest(PUBLIC[name].__doc__, names, name, None, None)
    assert test.examples, f"{name} has no example: write one, or enter it in WITHOUT_EXAMPLE"
    output = io.StringIO()
    doctest.DocTestRunner(verbose=False, optionflags=FLAGS).run(test, out=output.write)
    assert not output.getvalue(), output.getvalue()


def test_the_reference_names_everything_public() -> None:
    page = REFERENCE.read_text()
    found = re.findall(r"^\.\. auto\w+:: (\S+)$", page, re.MULTILINE)
    for path in found:
        package, *attributes = path.split(".")
        assert package == "inductor_x86q" and functools.reduce(getattr, attributes, inductor_x86q), path
    whole = {name for name in PUBLIC if name.startswith("testing.")}  # automodule lists them
    assert {f"inductor_x86q.{name}" for name in PUBLIC.keys() - whole} <= set(found)
    assert {testing.__name__, pytest_plugin.__name__} <= set(found)
    held = {type_ for type_ in report.__all__ if type_ not in ("Node", "Obstacle", "Report", "RuleCount")}
    assert {f"{report.__name__}.{name}" for name in held} <= set(found)


def test_quantize_explains_each_argument() -> None:
    """Those of a budget, and those that it hands on."""
    explained = re.findall(r"^ {8}(\w+): ", inductor_x86q.quantize.__doc__ or "", re.MULTILINE)
    arguments = list(inductor_x86q.quantize.__signature__.parameters)  # type: ignore[attr-defined]
    assert set(arguments) == set(explained) - {"QuantizationError", "BudgetError"}
